"""Volumes on disk: finding, reading and preparing them (no Lightning)."""

from gvsl_lightning.data.preparation import Preparation

__all__ = ["Preparation"]
