"""``python -m amkd_monai``: see :mod:`amkd_monai.cli`."""

import sys

from amkd_monai.cli import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())
