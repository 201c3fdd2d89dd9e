"""`python -m relaymta`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current folder: nothing is imported from there from now on

from relaymta.cli import main

if __name__ == "__main__":
    main()
