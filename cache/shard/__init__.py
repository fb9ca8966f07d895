"""One shard as one object: which arrays it has (layout), and the zip that holds them (container).

Belongs here: what a single shard looks like.
Does not: stores, manifests, or more than one shard.
"""
