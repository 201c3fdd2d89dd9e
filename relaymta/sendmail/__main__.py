"""`python -I -S .../relaymta/sendmail [OPTIONS]`, also by a link called mailq or newaliases."""

import sys

if __name__ == "__main__":
    import os

    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [one for one in sys.path if one != folder]  # its modules are those of the package
    sys.path.insert(0, os.path.dirname(os.path.dirname(folder)))
    from relaymta.sendmail import main

    sys.exit(main(sys.argv))
