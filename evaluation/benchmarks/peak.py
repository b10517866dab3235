"""The machine's own matrix-product peak, and how near the model's linear layers come to it.

Unusual: on a CPU there are two libraries, MKL (through torch.mm) and oneDNN; the better one counts, also where the
model uses the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ... import packing_sail
from ...kernels_sail import PACKED, plain_kernels
from .turns import seconds_of

SIDES = (512, 1024, 2048)  # square products: in the caches, and beyond
REPEATS = 5

# Operators that are a linear layer's product, however the model computes it.
LINEARS = ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise")


def matrix_peak(dtype: torch.dtype, device: str = "cpu", sides: tuple[int, ...] = SIDES) -> dict[str, float]:
    """GFLOP/s of the best square product by library; those that this build of torch lacks are left out."""
    best: dict[str, float] = {}
    for side in sides:
        one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for name, product in _products(one, other).items():
            product()
            seconds = statistics.median(seconds_of(product) for _ in range(REPEATS))
            best[name] = max(best.get(name, 0.0), 2 * side**3 / seconds / 1e9)
    return best


def _products(one: Tensor, other: Tensor) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(one, other)}
    if one.device.type != "cpu":
        return found
    try:  # private operators: another version may not have them
        packed = torch.ops.mkldnn._reorder_linear_weight(other, len(one))
        torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return found
    found["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")
    return found


def flops_of(work: Callable[[], Any], unpadded: Any = None) -> dict[str, int]:
    """Floating-point operations of a run of the model, counted from shapes: "linears" and "all".

    Counted with plain kernels, whose operators torch knows; the faster ones compute the same products.

    Args:
        work: the run.
        unpadded: the text tower that computes without padding, if one does: padding is no work that was done.
    """
    padded = None if unpadded is None else unpadded.config._attn_implementation
    if padded is not None:
        unpadded.set_attn_implementation(PACKED)
    try:
        # What fills a pass up to one of few sizes is no work that was asked for.
        with plain_kernels(), patch.object(packing_sail, "in_few_sizes", lambda rows: rows):
            if padded is not None:
                work()  # packed rows are tried when they are first wanted, which is not to be counted
            with FlopCounterMode(display=False) as counter:
                work()
    finally:
        if padded is not None:
            unpadded.set_attn_implementation(padded)
    by_operator = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    names = {name.replace("::", ".") for name in LINEARS}
    return {
        "linears": sum(count for name, count in by_operator.items() if name in names),
        "all": sum(by_operator.values()),
    }


def linear_seconds(work: Callable[[], Any], plain: bool = False) -> float:
    """Seconds that a run on a CPU spends in the products of linear layers, by torch's profiler."""
    with plain_kernels() if plain else nullcontext(), torch.profiler.profile() as profiler:
        work()
    return sum(event.cpu_time_total for event in profiler.key_averages() if event.key in LINEARS) / 1e6
