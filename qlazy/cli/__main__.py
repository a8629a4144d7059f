"""`python -m qlazy.cli` is the `qlazy` command."""

from qlazy.cli import main

if __name__ == "__main__":
    main()
