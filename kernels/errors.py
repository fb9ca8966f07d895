"""The one error class of the loss and its kernels."""


class KDError(ValueError):
    """What was passed cannot be computed with: the message names the argument, what was found and what would be right."""
