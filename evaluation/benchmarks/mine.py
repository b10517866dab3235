"""The exact threshold and the hard negatives beside the bare matrix product and sentence-transformers' miner.

    python -m modeling_sail.evaluation.benchmarks mine --size 100000

The bare side is what nobody can go below: all scores, block by block, into one buffer, and nothing done with them. All
sides get the same ready embeddings. The peer has no threshold: it takes the k highest that are no positives.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from ...training.mining import mine
from ...training.mining_blocks import TILE
from .child import ALLOCATORS, measured, run_child
from .figures import figure

WIDTH, NEGATIVES = 768, 8
TWINS = 0.02  # share of pairs whose target answers another query too
# Noise of a query over its target's length, and how many targets there are (None: one a pair).
CASES: dict[str, tuple[float, int | None]] = {
    "a good model": (1.2, None),
    "a weak model": (12.0, None),
    "200 names": (1.2, 200),
}
PEER_BATCH = 16_384  # sentence-transformers' own default


def planted(size: int, case: str = "a good model") -> tuple[Tensor, Tensor, np.ndarray]:
    """(N, D) queries and targets near them, some targets nearly those of their neighbours; (N,) targets' numbers."""
    noise, names = CASES[case]
    generator = torch.Generator().manual_seed(0)
    targets = F.normalize(torch.randn(names or size, WIDTH, generator=generator), dim=1)
    if names is None:
        twins = torch.arange(1, max(2, int(size * TWINS) * 2), 2)
        targets[twins] = F.normalize(targets[twins - 1] + 0.3 * targets[twins], dim=1)
    numbers = np.arange(size) % len(targets)
    targets = targets[torch.from_numpy(numbers)]
    queries = targets + noise * F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
    return F.normalize(queries, dim=1), targets, numbers


def bare(queries: Tensor, targets: Tensor, numbers: np.ndarray) -> dict[str, float]:
    """All scores, and nothing done with them."""
    buffer, total = queries.new_empty(TILE[0] * TILE[1]), 0.0
    for rows in queries.split(TILE[0]):
        for columns in targets.split(TILE[1]):
            out = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            total += float(torch.mm(rows, columns.T, out=out)[0, 0])
    return {"total": total}


def ours(queries: Tensor, targets: Tensor, numbers: np.ndarray) -> dict[str, float]:
    """lambda* and the negatives."""
    rows = np.arange(len(queries))
    found = mine(queries, targets, query_ids=rows, target_ids=numbers, num_negatives=NEGATIVES)
    return {
        "lambda": found.threshold.value,
        "f1": found.threshold.f1,
        "false_negatives": int(found.false_negatives.sum()),
        "hardest": float(found.scores[:, 0].nan_to_num().double().sum()),
    }


class ReadyVectors:
    """As much of a SentenceTransformer as the miner asks for; texts are numbers of queries and of targets."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __init__(self, queries: Tensor, targets: Tensor) -> None:
        self.queries, self.targets = queries, targets  # the target of number n is that of row n

    def encode_query(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return self.queries[[int(text[1:]) for text in texts]].cpu().numpy()

    def encode_document(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return self.targets[[int(text[1:]) for text in texts]].cpu().numpy()

    def similarity(self, one: Any, other: Any) -> Tensor:
        first, second = (torch.as_tensor(part, device=self.device) for part in (one, other))
        return first @ second.T  # they are normalised already

    def similarity_pairwise(self, one: Any, other: Any) -> Tensor:
        first, second = (torch.as_tensor(part, device=self.device) for part in (one, other))
        return (first * second).sum(dim=1)


def peer(queries: Tensor, targets: Tensor, numbers: np.ndarray) -> dict[str, float]:
    """sentence-transformers' miner, by its default way (torch) at its default batch."""
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers.util import mine_hard_negatives

    disable_progress_bars()
    size = len(queries)
    pairs = Dataset.from_dict({"query": [f"q{n}" for n in range(size)], "target": [f"t{n}" for n in numbers]})
    found = mine_hard_negatives(
        pairs,
        ReadyVectors(queries, targets),
        num_negatives=NEGATIVES,
        output_format="n-tuple",
        faiss_batch_size=PEER_BATCH,
        verbose=False,
    )
    return {"rows": len(found)}


SIDES: dict[str, Callable[[Tensor, Tensor, np.ndarray], dict[str, float]]] = {"ours": ours, "bare": bare, "peer": peer}
NAMES = {"bare": "bare blockwise product", "peer": "sentence_transformers.util.mine_hard_negatives"}


def mine_benchmark(
    size: int,
    rounds: int,
    allocators: Mapping[str, Mapping[str, str]] = ALLOCATORS,
    cases: Sequence[str] = tuple(CASES),
) -> Iterator[dict[str, Any]]:
    """Figures of time and memory at N = ``size`` pairs, each side in processes of its own, in turn.

    Raises:
        ValueError: fewer pairs than hold the negatives of each beside itself, twice.
    """
    if size < 2 * NEGATIVES:
        raise ValueError(f"--size {size}: {2 * NEGATIVES} pairs at least, for {NEGATIVES} negatives each.")
    for kind, (allocator, environment) in product(cases, allocators.items()):
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, results in found.items():
                results.append(run_child(__spec__.name, {"side": side, "size": size, "case": kind}, environment))
        case = f"{kind}, N = {size}, D = {WIDTH}, {NEGATIVES} negatives, allocator: {allocator}"
        seconds = {side: [result["seconds"][-1] for result in results] for side, results in found.items()}
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        memory = {side: max(4096, *(one["extra_bytes"] for one in results)) / 2**20 for side, results in found.items()}
        for side, name in NAMES.items():
            yield figure("mine", case, "lambda* and negatives", "s", medians["ours"], medians[side], name)
            yield figure("mine", case, "peak extra memory", "MiB", memory["ours"], memory[side], name)
        spread = max((max(values) - min(values)) / medians[side] for side, values in seconds.items())
        yield figure("mine", case, "spread of the rounds, over the median", "", spread, None, "")
        yield figure("mine", case, "F1 at lambda*", "", found["ours"][0]["f1"], None, "")


def _one(side: str, size: int, case: str) -> dict[str, Any]:
    *sides, numbers = planted(size, case)
    queries, targets = (part.to(ReadyVectors.device) for part in sides)
    SIDES[side](queries[:64], targets[:64], numbers[:64])  # imports, threads
    result: dict[str, float] = {}

    def work() -> None:
        result.update(SIDES[side](queries, targets, numbers))

    return {**measured(work, 1), **result}


if __name__ == "__main__":
    print(json.dumps(_one(**json.loads(sys.argv[1]))))
