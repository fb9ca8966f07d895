"""Documents, conversations and examples as token ids or arrays: the input of teachers and students.

Belongs here: reading, tokenizing and packing datasets.
Does not: models, caches.
"""
