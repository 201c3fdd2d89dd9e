"""`python -m relaymta`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the folder we were started in: nothing more is imported from there

from relaymta.cli import main

if __name__ == "__main__":
    main()
