"""`python -m fastkd` is `fastkd`."""

from typing import NoReturn

from .cli import main
from .ending import end
from .stopping import final


def run() -> NoReturn:
    """Run the command, and end with its status."""
    final()
    end(main())


if __name__ == "__main__":
    run()
