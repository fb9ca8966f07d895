"""Students made from a teacher: pruned copies, and configs, that fit a budget.

Belongs here: the size of a shape, what of a teacher matters by its answers in a cache, the choice between shapes.
Does not: how parts are removed from a model (models/prune, models/pruned), training (train), or its export (deploy).
"""
