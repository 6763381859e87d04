"""`python -m fleetflow`, which torchrun needs: the command line."""

import sys

from fleetflow.cli.main import main

sys.exit(main())
