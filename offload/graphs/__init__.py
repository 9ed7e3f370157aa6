"""Decode steps on a GPU off the host's critical path: graphs of the dense parts, and experts found on the device."""
