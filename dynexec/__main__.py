"""``python -m dynexec``: the command line."""

import sys

from dynexec.cli import main

sys.exit(main())
