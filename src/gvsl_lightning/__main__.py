"""``python -m gvsl_lightning``."""

from gvsl_lightning.cli import main

if __name__ == "__main__":
    main()
