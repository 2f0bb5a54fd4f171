import sys

from dynexec.cli import main

sys.exit(main())
