"""The memory-linear NCE beside the dense one, value, gradients and all: seconds and peak extra memory.

    python -m modeling_sail.evaluation.benchmarks loss --size 16384

The peer is the loss as the paper writes it, in torch: normalise each prefix, the (B, B) product, cross entropy.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from ...training.contrastive import matryoshka_nce
from .child import ALLOCATORS, measured, run_child
from .figures import figure

WIDTH, DIMS = 1536, (128, 768, 1536)


def dense_nce(query: Tensor, target: Tensor, temperature: Tensor) -> Tensor:
    """The peer."""
    labels = torch.arange(len(query), device=query.device)
    terms = []
    for dim in DIMS:
        scores = F.normalize(query[:, :dim], dim=-1) @ F.normalize(target[:, :dim], dim=-1).T / temperature
        terms.append(F.cross_entropy(scores, labels))
    return torch.stack(terms).sum()


def blocked_nce(query: Tensor, target: Tensor, temperature: Tensor) -> Tensor:
    """Ours."""
    return matryoshka_nce(query, target, dims=DIMS, temperature=temperature)


SIDES = {"ours": blocked_nce, "dense": dense_nce}


def loss_benchmark(
    size: int, rounds: int, allocators: Mapping[str, Mapping[str, str]] = ALLOCATORS
) -> Iterator[dict[str, Any]]:
    """Figures of time and memory at B = ``size``, each side in processes of its own, in turn.

    Raises:
        ValueError: fewer than two pairs.
    """
    if size < 2:
        raise ValueError(f"--size {size}: in-batch negatives need two pairs at least.")
    for allocator, environment in allocators.items():
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "dense": []}
        for _ in range(rounds):
            for side, results in found.items():
                results.append(run_child(__spec__.name, {"side": side, "size": size}, environment))
        case = f"B = {size}, D = {WIDTH}, dims {DIMS}, allocator: {allocator}"
        seconds = {side: [result["seconds"][-1] for result in results] for side, results in found.items()}
        memory = {side: max(result["extra_bytes"] for result in results) for side, results in found.items()}
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        yield figure("loss", case, "forward + backward", "s", medians["ours"], medians["dense"], "dense")
        spread = max((max(values) - min(values)) / medians[side] for side, values in seconds.items())
        yield figure("loss", case, "spread of the rounds, over the median", "", spread, None, "")
        yield figure("loss", case, "peak extra memory", "MB", memory["ours"] / 1e6, memory["dense"] / 1e6, "dense")
        ours, dense = (found[side][0] for side in ("ours", "dense"))
        difference = max(abs(one - other) / abs(other) for one, other in zip(ours["sums"], dense["sums"], strict=True))
        yield figure("loss", case, "largest relative difference of value and gradient norms", "", difference, None, "")


def _one(side: str, size: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    query, noise = (torch.randn(size, WIDTH, generator=generator).to(device) for _ in range(2))
    target = (query + 2 * noise).requires_grad_()
    query, temperature = query.requires_grad_(), torch.tensor(0.05, device=device, requires_grad=True)
    small = SIDES[side](query[:64], target[:64], temperature)  # first use of kernels is not what is measured
    small.backward()
    leaves = (query, target, temperature)
    for leaf in leaves:  # a gradient that is there already would not be counted
        leaf.grad = None
    del small, noise
    sums: list[float] = []

    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss = SIDES[side](query, target, temperature)
        loss.backward()
        sums[:] = [loss.item(), *(float(leaf.grad.norm()) for leaf in leaves)]

    return {**measured(work, 1), "sums": sums}


if __name__ == "__main__":
    print(json.dumps(_one(**json.loads(sys.argv[1]))))
