"""What a teacher is run on: documents, conversations and examples, as token ids or arrays.

Belongs here: reading, tokenizing and packing of datasets.
Does not: anything about a model, or about a cache.
"""
