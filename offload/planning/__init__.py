"""What memory there is, what a model needs, and how a budget is split."""
