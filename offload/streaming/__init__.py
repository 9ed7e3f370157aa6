"""Experts from the disk into memory."""
