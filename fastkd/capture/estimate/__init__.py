"""The estimate of a capture: time, size, requests and cost, from a measured sample.

Belongs here: running a sample as capture does, and extrapolating from it.
Does not: anything that writes to a store.
"""
