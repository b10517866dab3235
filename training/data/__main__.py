"""`python -m modeling_sail.training.data [names]`: fetch and unpack datasets ahead of time, and say what they hold."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from . import DATASETS


def prepare_all(subset: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Fetch, unpack and read datasets.

    Args:
        subset: names in `DATASETS`; None takes all.

    Returns:
        The rows of each.

    Raises:
        ValueError: a name is unknown. RuntimeError: one cannot be fetched.
    """
    names = list(subset or DATASETS)
    unknown = sorted(set(names) - set(DATASETS))
    if unknown:
        raise ValueError(f"There are no datasets {unknown}; take some of {sorted(DATASETS)}.")
    return {name: DATASETS[name]() for name in tqdm(names, desc="datasets")}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    prepare_all(sys.argv[1:])
