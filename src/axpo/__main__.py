"""`python -m axpo` is the command `axpo`."""

from axpo.cli import main

if __name__ == "__main__":
    main()
