"""Recording what a model does as it runs: routing, the cache, predictions, transfers, and where the time goes."""
