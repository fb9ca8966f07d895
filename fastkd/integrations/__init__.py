"""fastkd inside other people's training code: a file or a package for each framework.

Belongs here: what gives a framework its own kind of model, dataset, loop or callback, made of the student, the batch
sources, the objectives and the evaluation of the rooms below. Each imports its framework when it is used, not before.
Does not: losses, order, or anything that our own training needs too.
"""
