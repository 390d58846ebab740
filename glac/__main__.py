"""``python -m glac``: the command line without an installed script."""

from glac.cli import main

if __name__ == "__main__":
    main()
