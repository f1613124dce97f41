"""Published data sets in the layout that their owners distribute."""
