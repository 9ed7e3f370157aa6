"""The memories that experts are computed from and kept in."""
