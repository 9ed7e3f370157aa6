"""Fits a predictor of routing to one model, from traces of it."""
