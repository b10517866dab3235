"""How exact: an item alone and in a mixed batch, in float32 and bfloat16, one item of each modality subset.

python -m modeling_sail.evaluation.benchmarks exact --model build/mini
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...encode_job import load_module
from ...sentence_transformer_sail import SailSentenceTransformer
from .figures import figure
from .items import made_items

FIELDS = ("title", "image", "audio")


def exact_benchmark(model: Path) -> Iterator[dict[str, Any]]:
    """Largest difference of a component of unit vectors, and lowest cosine, of each pair of ways."""
    module = load_module(model)
    whole = made_items(1, "omni")[0]
    subsets = [part for size in (1, 2, 3) for part in combinations(FIELDS, size)]
    items = [{name: whole[name] for name in part} for part in subsets]
    wide = _both_ways(module, items)
    module.model.to(torch.bfloat16)
    half = _both_ways(module, items)
    pairs = {
        "float32, alone and in a batch": (wide[0], wide[1]),
        "bfloat16, alone and in a batch": (half[0], half[1]),
        "bfloat16 and float32": (half[1], wide[1]),
    }
    for case, (one, other) in pairs.items():
        yield figure("exact", case, "largest difference", "", float((one - other).abs().max()), None, "")
        yield figure("exact", case, "lowest cosine", "", float((one * other).sum(dim=1).min()), None, "")


@torch.inference_mode()
def _both_ways(module: SailSentenceTransformer, items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(N, D) unit vectors of items one by one, and in one batch."""
    batches = [[item] for item in items], [items]
    ways = []
    for batch in batches:
        found = [module.model(**module.processor(part)).embeddings.float() for part in batch]
        ways.append(torch.nn.functional.normalize(torch.cat(found), dim=-1))
    return ways[0], ways[1]
