"""Volumes on disk: find, read, prepare."""
