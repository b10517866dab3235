"""Steps of training: towers computed each step or their features cached, beside sentence-transformers' own trainer.

    python -m modeling_sail.evaluation.benchmarks train --model build/mini

All sides train the same model on the same pairs with the same loss (in-batch NCE of the whole length, at temperature
0.05) and the same frozen parts; the first step's losses are compared. A step is all that a Trainer does between two
steps: reading and decoding files, forward, backward, AdamW. Each side runs in processes of its own, in turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ...encode_job import load_module, require_folder
from ...training.collate import Collator
from ...training.feature_cache import cache_media
from ...training.objective import Objective, Options
from ...training.recipe import StageSpec
from ...training.rows import Row, TrainingDataset
from ...training.sampler import SpecializedBatches
from ...training.stages import freeze
from ...training.trainer import ContrastiveTrainer
from .child import ALLOCATORS, measured, run_child
from .figures import figure
from .items import items_for, write_media
from .models import check_device
from .turns import seconds_of, synchronize

NAME, TEMPERATURE = "benchmark", 0.05
STEPS = 3  # counted ones of a process, after one that is not
TOWERS = ("vision_tower.*", "audio_tower.*")
BUDGET, PEER_MINI = 2048, 32  # tokens of ours, rows of the peer's mini-batch, with cached gradients

# What a side is: whose trainer, what is frozen, and what is cached.
SIDES: dict[str, dict[str, Any]] = {
    "all parts trained": {"freeze": ()},
    "all parts trained, gradients cached": {"freeze": (), "token_budget": BUDGET},
    "frozen towers, computed each step": {"freeze": TOWERS},
    "frozen towers, features cached": {"freeze": TOWERS, "cached": True},
    "frozen towers, features and gradients cached": {"freeze": TOWERS, "cached": True, "token_budget": BUDGET},
    "MultipleNegativesRankingLoss, all parts trained": {"freeze": (), "peer": "MultipleNegativesRankingLoss"},
    "MultipleNegativesRankingLoss, frozen towers": {"freeze": TOWERS, "peer": "MultipleNegativesRankingLoss"},
    "CachedMultipleNegativesRankingLoss": {"freeze": (), "peer": "CachedMultipleNegativesRankingLoss"},
}

# Which sides stand beside each other, by kind of pairs. The peer's cached gradients cut features by row, which flat
# lists of pictures and sounds do not have: it stands beside texts alone.
PAIRS: dict[str, list[tuple[str, str]]] = {
    "text": [
        ("all parts trained", "MultipleNegativesRankingLoss, all parts trained"),
        ("all parts trained, gradients cached", "CachedMultipleNegativesRankingLoss"),
    ],
    "omni-full": [
        ("all parts trained", "MultipleNegativesRankingLoss, all parts trained"),
        ("frozen towers, computed each step", "MultipleNegativesRankingLoss, frozen towers"),
        ("frozen towers, features cached", "MultipleNegativesRankingLoss, frozen towers"),
        ("frozen towers, features cached", "frozen towers, computed each step"),
        ("frozen towers, features and gradients cached", "MultipleNegativesRankingLoss, frozen towers"),
    ],
}


def train_benchmark(
    model: Path,
    size: int,
    rounds: int,
    allocators: Mapping[str, Mapping[str, str]] = ALLOCATORS,
    kinds: Sequence[str] = tuple(PAIRS),
    device: str = "cpu",
    bfloat16: bool = False,
) -> Iterator[dict[str, Any]]:
    """Figures by kind of pairs: items/s, tokens/s, peak memory above what was there before, and the first loss.

    Args:
        model: folder of a model.
        size: pairs of a batch.
        rounds: processes of each side, of `STEPS` counted steps each.
        allocators: environments by name; all is measured in each. One counts where the device is no CPU.
        kinds: of `PAIRS`.
        device: "cpu" or "cuda".
        bfloat16: mixed precision on all sides.

    Raises:
        ValueError: no model in the folder; no such device; fewer than two pairs.
    """
    require_folder(model)
    check_device(device)
    if size < 2:
        raise ValueError(f"--size {size}: in-batch negatives need two pairs at least.")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    for kind in kinds:
        for allocator, environment in dict(list(allocators.items())[: None if device == "cpu" else 1]).items():
            sides = list(dict.fromkeys(side for pair in PAIRS[kind] for side in pair))
            precision = "bfloat16" if bfloat16 else "float32"
            case = f"{kind}, {size} pairs, {device}, {precision}, allocator: {allocator}"
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            with tempfile.TemporaryDirectory() as folder:
                child = partial(run_child, __spec__.name, environment={**environment, **hidden})
                settings = {"model": str(model), "kind": kind, "size": size, "folder": folder}
                if any(SIDES[side].get("cached") for side in sides):  # its memory is no part of a step's
                    filling = child({"side": "fill", **settings})["seconds"]
                    yield figure("train", case, "filling the cache of features, once", "s", filling, None, "")
                for _ in range(rounds):
                    for side, results in found.items():
                        results.append(child({"side": side, "device": device, "bfloat16": bfloat16, **settings}))
            yield from train_figures(case, found, PAIRS[kind])


def train_figures(
    case: str, found: Mapping[str, list[dict[str, Any]]], pairs: Sequence[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Lines of the sides that stand beside each other, out of what their processes found."""
    seconds = {
        side: statistics.median(one for result in results for one in result["steps"]) for side, results in found.items()
    }
    memory = {side: max(4096, *(one["extra_bytes"] for one in results)) / 1e6 for side, results in found.items()}
    work = found[pairs[0][0]][0]  # the pairs are the same for all sides
    for ours, peer in pairs:
        for unit, count in (("items/s", work["items"]), ("tokens/s", work["tokens"])):
            yield figure("train", case, ours, unit, count / seconds[ours], count / seconds[peer], peer)
        yield figure("train", case, f"{ours}: peak extra memory", "MB", memory[ours], memory[peer], peer)
        difference = abs(found[ours][0]["loss"] - found[peer][0]["loss"])
        yield figure("train", case, f"{ours}: difference of the first loss", "", difference, None, peer)


# --- one side, in a process of its own ------------------------------------------------------------------------------


class _Marks(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter())


def fill(model: str, kind: str, size: int, folder: str) -> dict[str, float]:
    """Fill the cache that sides with cached features read from ``folder``; its seconds."""
    module = load_module(Path(model))
    pairs = made_pairs(module, size, kind, Path(folder))
    return {"seconds": seconds_of(lambda: _batches(module, pairs, Path(folder)))}


def one_side(
    side: str, model: str, kind: str, size: int, folder: str, device: str = "cpu", bfloat16: bool = False
) -> dict[str, Any]:
    """Seconds of the counted steps, memory, the first loss, and what a step has: items and tokens.

    ``folder`` is shared by all sides: the pairs' files, and the cache that `fill` has filled.
    """
    torch.manual_seed(0)
    settings = SIDES[side]
    module = load_module(Path(model))
    without_dropout(module.model)
    module.model.temperatures.add({NAME: TEMPERATURE})
    freeze(module.model, StageSpec(freeze=["temperatures.*", *settings["freeze"]]), [{"nce": 1.0}])
    pairs = made_pairs(module, size, kind, Path(folder))
    with tempfile.TemporaryDirectory() as output:
        arguments = {
            "output_dir": output,
            "max_steps": 1 + STEPS,
            "learning_rate": 1e-6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "bf16": bfloat16,
            "use_cpu": device == "cpu",
        }
        batches = _batches(module, pairs, Path(folder) if settings.get("cached") else None)
        if "peer" in settings:
            trainer = _peer(module, pairs, arguments, settings["peer"])
        else:
            trainer = _ours(module, batches, arguments, settings.get("token_budget"))
        marks = _Marks()
        trainer.add_callback(marks)
        result = measured(trainer.train, 1)
        items = batches.batch(0)["items"]["attention_mask"]
    return {
        "steps": [later - earlier for earlier, later in zip(marks.times, marks.times[1:], strict=False)],
        "extra_bytes": result["extra_bytes"],
        "loss": trainer.state.log_history[0]["loss"],
        "items": len(items),
        "tokens": int(items.sum()),
    }


def without_dropout(model: nn.Module) -> None:
    """So that all sides compute the same loss; what is drawn at random is little of a step."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob", "activation_dropout", "dropout_p", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def made_pairs(module: Any, size: int, kind: str, folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Queries of text, and their targets, whose pictures and sounds are files."""
    items = write_media(items_for(module, 2 * size, kind)[:size], folder)
    queries = items_for(module, size, "text")
    return [
        ({"title": f"{n} {query['title']}"}, item) for n, (query, item) in enumerate(zip(queries, items, strict=True))
    ]


def _batches(module: Any, pairs: list[tuple[dict[str, Any], dict[str, Any]]], cache: Path | None) -> SpecializedBatches:
    """All pairs in every batch; with a folder for it, their towers' features are cached."""
    rows = [Row(str(n), query, target, str(n)) for n, (query, target) in enumerate(pairs)]
    dataset = TrainingDataset(NAME, rows, temperature=TEMPERATURE)
    caches = () if cache is None else cache_media(module.model, module.processor, [dataset], cache)
    return SpecializedBatches([dataset], Collator(module.processor, *caches), len(rows))


def _ours(module: Any, batches: SpecializedBatches, arguments: dict[str, Any], token_budget: int | None) -> Any:
    objective = Objective(options=Options(matryoshka=False, symmetric=False))
    return ContrastiveTrainer(
        module.model,
        TrainingArguments(**arguments),
        objective=objective,
        token_budget=token_budget,
        train_dataset=batches,
    )


def _peer(module: Any, pairs: list[tuple[Any, Any]], arguments: dict[str, Any], loss: str) -> Any:
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    disable_progress_bars()
    device = "cpu" if arguments["use_cpu"] else "cuda"
    model = SentenceTransformer(modules=[module], device=device)
    options = {"mini_batch_size": PEER_MINI} if loss.startswith("Cached") else {}
    rows = Dataset.from_dict({"anchor": [query for query, _ in pairs], "positive": [target for _, target in pairs]})
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(per_device_train_batch_size=len(pairs), **arguments),
        train_dataset=rows,
        loss=getattr(losses, loss)(model, scale=1 / TEMPERATURE, **options),
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    side = asked.pop("side")
    print(json.dumps(fill(**asked) if side == "fill" else one_side(side, **asked)))
