"""What a network is to fastkd: its outputs, its LM head, its tokenizer, and how one is found on disk or on the Hub.

Belongs here: what teachers and students have in common.
Does not: running a teacher over data, or training.
"""
