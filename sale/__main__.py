"""``python -m sale``: the command line, also where the console script is not on the path."""

from sale.cli.main import main

if __name__ == "__main__":
    main()
