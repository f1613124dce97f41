"""Scores, feature measures, displacement fields, prediction and figures."""
