"""Sides of a benchmark in turn: one round that is not counted, then rounds in which each side runs once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Turns:
    """Median seconds by side, what each side returned in the first round, and the largest spread over a median."""

    seconds: dict[str, float]
    results: dict[str, Any]
    spread: float


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int) -> Turns:
    """Run the sides one after the other, ``rounds`` times, after one round that is not counted."""
    results = {name: run() for name, run in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds_of(run))
    medians = {name: statistics.median(found) for name, found in times.items()}
    spread = max((max(found) - min(found)) / medians[name] for name, found in times.items())
    return Turns(medians, results, spread)


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one run; a GPU's work is waited for."""
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begun


def synchronize() -> None:
    """Wait for what a GPU was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
