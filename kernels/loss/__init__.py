"""The distillation loss: arguments, operators and implementations in PyTorch and Triton.

Belongs here: what turns logits or hidden states and targets into a loss and its gradients.
Does not: divergences (../divergences), targets, or how targets are made (../topk).
"""
