"""What is found before, beside and after the passes of a capture with features: basis, step, block, size, and checks.

Belongs here: whatever runs teacher passes for features.
Does not: where features are and what a pass makes of them (feature_places, feature_collect), or their objects (cache).
"""
