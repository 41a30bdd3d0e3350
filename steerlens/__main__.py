"""`python -m steerlens` is the command line."""

from steerlens.cli import main

if __name__ == "__main__":
    main()
