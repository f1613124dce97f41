"""The command ``benchmark``: many runs, one table."""
