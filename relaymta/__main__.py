"""`python -m relaymta`."""

from relaymta.cli import main

if __name__ == "__main__":
    main()
