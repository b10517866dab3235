"""Cached gradients beside direct backward and sentence-transformers' CachedMultipleNegativesRankingLoss.

    python -m modeling_sail.evaluation.benchmarks cache --size 2048

One encoder of MiniLM's size with random weights, the same pairs of ragged texts, one training step without the
optimizer. The peers get the padded batch that their collators make; all sides the same loss (in-batch NCE, one length).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, TrainingArguments

from ...configuration_sail import SailEmbeddingConfig
from ...modeling_sail import SailEmbeddingModel
from ...training.grad_cache import select
from ...training.objective import Objective, Options
from ...training.trainer import ContrastiveTrainer
from .child import ALLOCATORS, RETURN_MEMORY, measured, run_child
from .figures import figure

BUDGET = 2048
PEER_SIZES = (256,)  # its mini-batches; with several, the best one is its figure. 64 was far slower here


def cache_benchmark(
    size: int, rounds: int, allocators: Mapping[str, Mapping[str, str]] = ALLOCATORS
) -> Iterator[dict[str, Any]]:
    """Figures at B = ``size`` pairs and, for the memory, at a quarter of it; sides in turn, in their own processes.

    Raises:
        ValueError: fewer than two pairs in the quarter.
    """
    if size < 8:
        raise ValueError(f"--size {size}: 8 pairs at least; a quarter of them is measured too, and needs negatives.")
    sides: dict[str, dict[str, Any]] = {"ours": {}, "direct": {}}
    sides |= {f"peer {mini}": {"mini": mini} for mini in PEER_SIZES}
    for allocator, environment in allocators.items():
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, more in sides.items():
                settings = {"side": name.split()[0], "size": size, **more}
                found[name].append(run_child(__spec__.name, settings, environment))
        case = f"B = {size} pairs, MiniLM-size encoder, allocator: {allocator}"
        median = {name: statistics.median(one["seconds"][-1] for one in results) for name, results in found.items()}
        memory = {name: max(one["extra_bytes"] for one in results) / 1e6 for name, results in found.items()}
        best = min((name for name in sides if name.startswith("peer")), key=lambda name: median[name])
        peer = f"CachedMultipleNegativesRankingLoss, mini-batch {best.split()[1]}"
        spread = max(
            (max(one["seconds"][-1] for one in results) - min(one["seconds"][-1] for one in results)) / median[name]
            for name, results in found.items()
        )
        yield figure("cache", case, "one step", "s", median["ours"], median["direct"], "direct backward")
        yield figure("cache", case, "one step", "s", median["ours"], median[best], peer)
        yield figure("cache", case, "spread of the rounds, over the median", "", spread, None, "")
        yield figure("cache", case, "peak extra memory", "MB", memory["ours"], memory["direct"], "direct backward")
        yield figure("cache", case, "peak extra memory", "MB", memory["ours"], memory[best], peer)
        norms = {name: results[0]["norm"] for name, results in found.items()}
        difference = max(abs(norm / norms["direct"] - 1) for norm in norms.values())
        yield figure("cache", case, "largest relative difference of the gradient's norm", "", difference, None, "")
    in_use = [
        run_child(__spec__.name, {"side": "ours", "size": part}, RETURN_MEMORY)["extra_bytes"] / 1e6
        for part in (size, size // 4)
    ]
    case = f"B = {size} pairs, MiniLM-size encoder, allocator: glibc hands memory back"
    yield figure("cache", case, "peak extra memory", "MB", in_use[0], in_use[1], f"ours at B = {size // 4}")


def ragged_batch(size: int, seed: int = 0) -> dict[str, Any]:
    """``size`` pairs of texts of 4 to 64 random tokens, mostly short, as `Collator` gives them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (4 + torch.empty(2 * size).exponential_(1 / 16, generator=generator)).clamp_max(64).long()
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(5, 30_000, (2 * size, longest), generator=generator) * mask
    return {
        "items": {"input_ids": ids, "attention_mask": mask, "modality_ids": mask * 4},
        "parts": torch.zeros(2 * size, 5, dtype=torch.bool),
        "target_ids": torch.arange(size),
        "negative_slots": torch.zeros(0, 2, dtype=torch.long),
        "negative_mask": torch.zeros(0, dtype=torch.bool),
        "scores": torch.full((size,), float("nan")),
        "teacher_scores": torch.full((size, 1), float("nan")),
        **{"dataset": "default", "patterns": [], "losses": {}, "skipped": [], "asked": size},
    }


def encoder() -> SailEmbeddingModel:
    """Text alone, of MiniLM's size, random weights without dropout."""
    torch.manual_seed(0)
    text = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = SailEmbeddingModel(SailEmbeddingConfig(text_config=text))
    model.temperatures.requires_grad_(False)  # the peers' is fixed
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class _Module(nn.Module):
    """The encoder as a module of sentence-transformers."""

    def __init__(self, model: SailEmbeddingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        inputs = {"input_ids": features["input_ids"], "attention_mask": features["attention_mask"]}
        features["sentence_embedding"] = self.model(**inputs).embeddings
        return features


def _step(side: str, model: SailEmbeddingModel, batch: dict[str, Any], mini: int) -> Any:
    if side == "peer":
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

        wrapped = SentenceTransformer(modules=[_Module(model)], device=str(model.device))
        loss = CachedMultipleNegativesRankingLoss(wrapped, scale=20.0, mini_batch_size=mini)
        size = len(batch["target_ids"])
        columns = [select(batch["items"], places) for places in torch.arange(2 * size).split(size)]

        def step() -> None:
            loss(
                [{name: part.to(model.device) for name, part in column.items()} for column in columns], None
            ).backward()

        return step
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=1, report_to=[], use_cpu=not torch.cuda.is_available()
        )
    budget = BUDGET if side == "ours" else None
    objective = Objective(options=Options(symmetric=False))
    trainer = ContrastiveTrainer(model, arguments, objective=objective, token_budget=budget)
    trainer.current_gradient_accumulation_steps = 1
    return lambda: trainer.training_step(model, batch)


def _one(side: str, size: int, mini: int = 0) -> dict[str, Any]:
    model = encoder()
    _step(side, model, ragged_batch(min(64, size)), mini)()  # first use of kernels is not what is measured
    step = _step(side, model, ragged_batch(size), mini)
    model.zero_grad()
    result = measured(step, 1)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {**result, "norm": float(norm)}


if __name__ == "__main__":
    print(json.dumps(_one(**json.loads(sys.argv[1]))))
