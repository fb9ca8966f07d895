"""Features of a cache: hidden states and feature maps of its teacher, coded beside the targets. See FORMAT.md.

Belongs here: what a feature is, its basis, its shards, and how they are written, read, checked and dropped.
Does not: where states come from, or what a student does with them.
"""
