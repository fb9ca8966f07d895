"""Arrays to streams of small integers and back: targets, their parts, ragged rows, grid and vocabulary.

Belongs here: pure functions from arrays to arrays.
Does not: files, compressors, stores.
"""
