"""Measurements of speed and memory on the user's own device; every one is checked against fp64 before it is timed."""
