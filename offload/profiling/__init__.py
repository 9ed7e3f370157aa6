"""What a run or a trace tells: where the bytes and the time went, and what to change first."""
