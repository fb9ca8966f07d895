"""The one error class of the loss and its kernels."""


class KDError(ValueError):
    """The message names the argument, what was found, and what would be right."""
