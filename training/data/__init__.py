"""Datasets, one file each: plain functions that give lists of rows (dicts) with paths to pictures and sounds."""

from .emoji import load_emoji
from .openclipart import load_openclipart
from .tuxpaint import load_tuxpaint

DATASETS = {"tuxpaint": load_tuxpaint, "openclipart": load_openclipart, "emoji": load_emoji}

__all__ = ["DATASETS", "load_emoji", "load_openclipart", "load_tuxpaint"]
