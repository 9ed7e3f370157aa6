"""A model's experts at run time: found, fetched, computed, predicted."""
