"""The one error class of the loss and its kernels."""


class KDError(ValueError):
    """The message names the argument, what was found, and what would be right.

    row: the row of the call that it speaks of, where it speaks of one.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
