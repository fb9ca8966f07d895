"""Capture of hidden states and feature maps: where they are in a teacher, which rows are stored, how they are coded.

Belongs here: from the names of features to the arrays of a shard, and what is found before the first of them (basis,
step, block).
Does not: the losses that use them (kernels), or the objects that hold them (cache).
"""
