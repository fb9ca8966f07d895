"""The one error class of the loss and its kernels, and a word for its messages."""


class KDError(ValueError):
    """A wrong argument. The message names it, what was got, and what is expected.

    row: the row of the call that the message is about, or None.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def type_name(value: object) -> str:
    """What a value is, for messages: its type, or None."""
    return "None" if value is None else type(value).__name__
