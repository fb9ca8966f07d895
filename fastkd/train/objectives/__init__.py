"""Objectives that match inner states of a student with those of its teacher, one file each.

Belongs here: what compares an output of the student with a feature of the cache, and the projectors between them.
Does not: the losses themselves (kernels/features/losses), which state is matched with which (train/matching.py), or the
distillation of answers (train/objective.py).
"""
