"""What `benchmarks/peers.py` is made of: shapes, files of random weights, memory limits, engines and the table."""
