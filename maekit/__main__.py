"""`python -m maekit`, and what launchers start: `torchrun --nproc_per_node 2 -m maekit ...`."""

import sys

from maekit.cli import main

if __name__ == "__main__":
    sys.exit(main())
