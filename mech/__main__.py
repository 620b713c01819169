"""``python -m mech``: the command line, where its script is not on the path."""

from mech.cli import main

if __name__ == "__main__":
    main()
