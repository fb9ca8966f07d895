"""Small tools that every room may use: atomic files, hashes, progress, signals, intervals, text, process groups.

Belongs here: helpers that know nothing of models, teachers or students.
Does not: anything that needs another room.
"""
