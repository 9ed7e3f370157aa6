"""Which experts stay: slots, policies, statistics. Imports no torch and moves no bytes."""
