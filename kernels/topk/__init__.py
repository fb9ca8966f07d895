"""Top-k, tails and draws: from a teacher's logits to SparseTargets, in PyTorch, Numba and Triton.

Belongs here: what runs on the teacher's side of a cache.
Does not: losses (../loss).
"""
