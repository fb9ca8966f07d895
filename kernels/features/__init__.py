"""What a student learns from a teacher's hidden states, feature maps and attention. Importing it imports no torch.

Belongs here: HiddenTargets and its basis, the attention block that is recomputed from a state, rows of segments, and
losses/, one file each. Does not: files, projectors, and which layer is matched with which (fastkd/train).
"""
