"""``python -m llamatune``."""

from llamatune.cli import main

if __name__ == "__main__":
    main()
