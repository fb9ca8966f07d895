"""Entry point of `python -m fastkd` and of the command `fastkd`."""

from typing import NoReturn

from .cli.main import main
from .utils.signals import end, final


def run() -> NoReturn:
    """Run the command and exit with its status."""
    final()
    end(main())


if __name__ == "__main__":
    run()
