"""The command ``export``: networks for other programs."""
