"""`python -m fastkd` is `fastkd`."""

from typing import NoReturn

from .cli.main import main
from .utils.exit import end
from .utils.signals import final


def run() -> NoReturn:
    """Run the command, and end with its status."""
    final()
    end(main())


if __name__ == "__main__":
    run()
