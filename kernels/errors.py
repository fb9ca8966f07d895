"""The one error class of the loss and its kernels."""


class KDError(ValueError):
    """A wrong argument. The message names it, what was got, and what is expected.

    row: the row of the call that the message is about, or None.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
