"""The command line: `python -m aevb`."""

import sys

from .cli import main

sys.exit(main())
