"""``python -m natlab``: the command."""

import sys

from .cli import main

sys.exit(main())
