"""``python -m sae_engine.cli`` is the console command."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
