"""``python -m ep_backend.cli``: the same as the console command ``ep-backend``."""

import sys

from ep_backend.cli import main

if __name__ == "__main__":
    sys.exit(main())
