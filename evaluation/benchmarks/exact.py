"""How exact: an item alone and in a mixed batch, in float32 and bfloat16, one item of each modality subset; real items
in bfloat16 beside float32.

python -m modeling_sail.evaluation.benchmarks exact --model build/mini --real FOLDER
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...encode_job import encode_items, load_module
from ...encode_source import BadLine, read_items
from ...kernels_sail import plain_kernels
from ...sentence_transformer_sail import SailSentenceTransformer
from .figures import figure
from .items import made_items

FIELDS = ("title", "image", "audio")
NEAR = 0.99
WEIGHTS = "float32, weights of bfloat16"
SAID: dict[str, Callable[[np.ndarray], float]] = {
    "lowest cosine": lambda cosines: float(cosines.min()),
    "mean cosine": lambda cosines: float(cosines.mean()),
    f"items whose cosine is below {NEAR}": lambda cosines: float((cosines < NEAR).sum()),
}


def exact_benchmark(model: Path, real: Sequence[Path] = ()) -> Iterator[dict[str, Any]]:
    """Largest difference of a component of unit vectors, and lowest cosine, of each pair of ways.

    Args:
        model: the model's folder.
        real: JSONL files or folders of items. Of their good items the lowest and mean cosine, and how many lie below
            `NEAR`, in bfloat16 with float32; the peers are bfloat16 with plain kernels, and float32 with weights that
            were rounded to bfloat16.

    Raises:
        ValueError: a source has no items, or no good one.
    """
    sources = [(source.name, _real_items(source)) for source in real]  # a bad path is said before the model is loaded
    module = load_module(model)
    whole = made_items(1, "omni")[0]
    subsets = [part for size in (1, 2, 3) for part in combinations(FIELDS, size)]
    items = [{name: whole[name] for name in part} for part in subsets]
    wide = _both_ways(module, items)
    exact = [encode_items(module, found, progress=f"{name}, float32") for name, found in sources]
    for (name, _), (_, statuses) in zip(sources, exact, strict=True):
        if not any(one.status == "ok" for one in statuses):
            raise ValueError(f"{name} has no good item; the first: {statuses[0].reason}")
    module.model.to(torch.bfloat16)
    half = _both_ways(module, items)
    rounded = [_in_bfloat16(module, name, found) for name, found in sources]
    module.model.float()
    pairs = {
        "float32, alone and in a batch": (wide[0], wide[1]),
        "bfloat16, alone and in a batch": (half[0], half[1]),
        "bfloat16 and float32": (half[1], wide[1]),
        "float32 with weights of bfloat16, and float32": (_both_ways(module, items)[1], wide[1]),
    }
    for case, (one, other) in pairs.items():
        yield figure("exact", case, "largest difference", "", float((one - other).abs().max()), None, "")
        yield figure("exact", case, "lowest cosine", "", float((one * other).sum(dim=1).min()), None, "")
    for (name, found), (expected, statuses), (ours, plain) in zip(sources, exact, rounded, strict=True):
        weights, _ = encode_items(module, found, progress=f"{name}, {WEIGHTS}")
        case = f"{name}: {sum(one.status == 'ok' for one in statuses)} real items, bfloat16 and float32"
        for said, of in SAID.items():
            for peer, vectors in (("bfloat16, plain kernels", plain), (WEIGHTS, weights)):
                one, other = ((expected * some).sum(axis=1) for some in (ours, vectors))
                yield figure("exact", case, said, "", of(one), of(other), peer)


def _in_bfloat16(
    module: SailSentenceTransformer, name: str, items: list[tuple[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) with our kernels, and with plain ones."""
    ours, _ = encode_items(module, items, progress=f"{name}, bfloat16")
    with plain_kernels():
        plain, _ = encode_items(module, items, progress=f"{name}, bfloat16, plain kernels")
    return ours, plain


def _real_items(source: Path) -> list[tuple[str, Any]]:
    found = [(name, item) for name, item in read_items(source.absolute()) if not isinstance(item, BadLine)]
    if not found:
        raise ValueError(f"{source} has no items.")
    return found


@torch.inference_mode()
def _both_ways(module: SailSentenceTransformer, items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(N, D) unit vectors of items one by one, and in one batch."""
    batches = [[item] for item in items], [items]
    ways = []
    for batch in batches:
        found = [module.model(**module.processor(part)).embeddings.float() for part in batch]
        ways.append(torch.nn.functional.normalize(torch.cat(found), dim=-1))
    return ways[0], ways[1]
