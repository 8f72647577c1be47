"""``python -m llavolta.bench``: the command's short name; what it does is in ``llavolta.cost.bench``."""

import sys

from llavolta.cost.bench import main

if __name__ == "__main__":
    sys.exit(main())
