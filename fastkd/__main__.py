"""`python -m fastkd` is `fastkd`."""

import sys

from .cli import main

sys.exit(main())
