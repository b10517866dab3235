"""Retrieval on held-out names of Tux Paint and on GCompris, beside a linear baseline on the same features, in one go.

    python -m modeling_sail.evaluation.tuxpaint_retrieval --model build/mini --work runs/mini

The baseline is ridge regression from mean-pooled tower features to the text backbone's own embeddings of names, fitted
on the same rows as the model; for pictures blended with the class names that EfficientNet-lite0's own classifier gives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from ..modeling_sail import SailEmbeddingModel
from ..training.build import load_built
from ..training.collate import Collator
from ..training.data.mini_pairs import load_sources, teacher_probabilities
from ..training.feature_cache import FeatureCache
from ..training.mini import cache_features
from ..training.rows import Item
from ..training.towers import imagenet_class_names
from ..training.warm_start import text_encoder
from .metrics import recall_at
from .tasks.classification import both_to_name, picture_to_name, speech_to_name
from .tasks.content import picture_to_speech
from .tasks.held_out import gcompris, tuxpaint
from .tasks.names import item_to_name
from .tasks.queries import names_to_items
from .tasks.task import Retrieval

Rows = list[dict[str, Any]]
Task = tuple[list[Item], list[Item], Tensor]
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
BLENDS = (0.0, 0.2, 0.4, 0.6, 0.8)


# --- what is retrieved ----------------------------------------------------------------------------------------------


def tasks(rows: Rows) -> dict[str, Task]:
    """Name of a task -> (queries, candidates, (Q, N) relevance): those of tasks/ that `mini` is made for, on any rows.

    Candidates that are names are one for each distinct name. Unlike tasks/, whose rows are `held_out.tuxpaint`, the
    test rows hold two dozen drawings that openclipart has under another title (`held_out.SEEN`).
    """
    pictures, speech = picture_to_name(rows), speech_to_name(rows)
    found = {
        "picture -> name": pictures["en"],
        "speech -> name": speech["fr"],
        "picture -> name (both languages)": pictures["en-fr"],
        "speech -> name (both languages)": speech["en-fr"],
        "picture+speech -> name (both languages)": both_to_name(rows)["en-fr"],
        "name -> item (picture+speech)": names_to_items(rows)["en-fr"],
        "picture -> speech": picture_to_speech(rows),
    }
    return {name: _as_matrix(data) for name, data in found.items()}


def evaluation_sources() -> dict[str, Rows]:
    """`load_sources` with, as "test", the rows of `tasks.held_out` alone, and "gcompris".

    Of the held-out names some drawings are trained on under another name; they are left out, as in the tasks.
    """
    held_out = {"test": [dict(row) for row in tuxpaint()], "gcompris": [dict(row) for row in gcompris()]}
    return load_sources() | held_out


def unseen_tasks(rows: Rows) -> dict[str, Task]:
    """The same for pictures of another source: photographs and drawings of first words."""
    return {"picture -> name (GCompris)": _as_matrix(item_to_name(rows, ("en",), "image"))}


def _as_matrix(data: Retrieval) -> Task:
    relevant = [[one in data.relevant[name] for one in data.corpus] for name in data.queries]
    return list(data.queries.values()), list(data.corpus.values()), torch.tensor(relevant)


# --- the model ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed(
    model: SailEmbeddingModel, collate: Collator, items: list[Item], task: str | None, side: str, size: int = 64
) -> Tensor:
    """(N, D) normalised embeddings from cached tower features."""
    instruction = collate.processor.instruction_for(task, side)
    parts = []
    for start in range(0, len(items), size):
        batch = collate.encode_items(items[start : start + size], instruction)
        parts.append(model(**{name: value.to(model.device) for name, value in batch.items()}).embeddings)
    return F.normalize(torch.cat(parts), dim=-1).cpu()


def family(queries: list[Item], candidates: list[Item]) -> str:
    """The task family whose instructions fit: names as queries are q2i, names as candidates cls, else i2i."""
    if "text" in queries[0]:
        return "q2i"
    return "cls" if "text" in candidates[0] else "i2i"


# --- the linear baseline --------------------------------------------------------------------------------------------


class LinearBaseline:
    """Ridge regression from pooled features to name embeddings; strength and blend are chosen on validation names.

    Args:
        encode_text: names to (N, D) normalised vectors of the text backbone as it was published.
        images, sounds: cached tower features.
        sources: rows by source, with "validation".
    """

    def __init__(
        self,
        encode_text: Any,
        images: FeatureCache,
        sounds: FeatureCache,
        sources: dict[str, Rows],
    ) -> None:
        self.encode_text, self.images, self.sounds = encode_text, images, sounds
        fit = [row for name in ("tuxpaint", "openclipart", "emoji") for row in sources[name]]
        self.words = encode_text(imagenet_class_names())
        self.classes: dict[str, Tensor] = {}
        self.classify(row["image"] for part in sources.values() for row in part)
        pairs = {"image": _picture_pairs(fit, images), "audio": _speech_pairs(fit, sounds)}
        held = {
            "image": _picture_pairs(sources["validation"], images),
            "audio": _speech_pairs(sources["validation"], sounds),
        }
        self.maps = {field: self._fit(field, pairs[field], held[field]) for field in pairs}

    def classify(self, paths: Iterable[str]) -> None:
        """Name the classes of further pictures, before they are embedded."""
        found = teacher_probabilities(self.images, paths, 1.0)
        self.classes |= {path: probabilities @ self.words for path, probabilities in found.items()}

    def _fit(self, field: str, pairs: Sequence[tuple[str, str]], held: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        features, targets = self._pooled(field, [p for p, _ in pairs]), self.encode_text([name for _, name in pairs])
        centre, middle = features.mean(dim=0), targets.mean(dim=0)
        gram, cross = (features - centre).T @ (features - centre), (features - centre).T @ (targets - middle)
        relevant = torch.tensor([[name == other for _, other in held] for _, name in held])
        best: tuple[float, dict[str, Any]] = (-1.0, {})
        for ridge in RIDGES:
            weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), cross)
            for blend in BLENDS if field == "image" else (0.0,):
                found = {"weight": weight, "centre": centre, "middle": middle, "blend": blend}
                scores = self._project(field, [p for p, _ in held], found) @ self.encode_text([n for _, n in held]).T
                score = recall_at(scores, relevant, 10)
                best = max(best, (score, found), key=lambda pair: pair[0])
        return best[1]

    def _pooled(self, field: str, paths: Sequence[str]) -> Tensor:
        cache = self.images if field == "image" else self.sounds
        return F.normalize(torch.stack([cache[path].float().mean(dim=(0, 1)) for path in paths]), dim=-1)

    def _project(self, field: str, paths: Sequence[str], fitted: dict[str, Any]) -> Tensor:
        linear = (self._pooled(field, paths) - fitted["centre"]) @ fitted["weight"] + fitted["middle"]
        result = F.normalize(linear, dim=-1)
        if fitted["blend"]:
            named = F.normalize(torch.stack([self.classes[path] for path in paths]), dim=-1)
            result = F.normalize((1 - fitted["blend"]) * result + fitted["blend"] * named, dim=-1)
        return result

    def embed(self, items: list[Item]) -> Tensor:
        """(N, D): names by the text backbone, pictures and sounds by their maps, both by the sum of the two."""
        if "text" in items[0]:
            return self.encode_text([item["text"] for item in items])
        parts = [self._project(field, [item[field] for item in items], self.maps[field]) for field in items[0]]
        return F.normalize(torch.stack(parts).sum(dim=0), dim=-1)


def _picture_pairs(rows: Rows, images: FeatureCache) -> list[tuple[str, str]]:
    named = [(row["image"], row["title"] if "title" in row else row["names"]["en"]) for row in rows]
    return [(path, name) for path, name in named if path in images]


def _speech_pairs(rows: Rows, sounds: FeatureCache) -> list[tuple[str, str]]:
    spoken = [(path, row["names"].get(language)) for row in rows for language, path in row.get("speech", {}).items()]
    return [(path, name) for path, name in spoken if name and path in sounds]


# --- the run --------------------------------------------------------------------------------------------------------


def evaluate(
    model: SailEmbeddingModel, collate: Collator, baseline: LinearBaseline | None, sources: dict[str, Rows]
) -> list[dict[str, Any]]:
    """One result for each task: sizes, and R@1 and R@10 of the model and of the baseline."""
    results = []
    for name, (queries, candidates, relevant) in (tasks(sources["test"]) | unseen_tasks(sources["gcompris"])).items():
        task = family(queries, candidates)
        ours = embed(model, collate, queries, task, "query") @ embed(model, collate, candidates, task, "target").T
        result: dict[str, Any] = {"task": name, "queries": len(queries), "candidates": len(candidates)}
        scores = {"model": ours}
        if baseline is not None:
            scores["linear"] = baseline.embed(queries) @ baseline.embed(candidates).T
        for who, matrix in scores.items():
            result |= {f"{who} R@{k}": round(recall_at(matrix, relevant, k), 4) for k in (1, 10)}
        results.append(result)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Command line of the evaluation: prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/mini"))
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="feature cache, shared with the training")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    args = parser.parse_args(arguments)
    model, processor = load_built(args.model)
    sources = evaluation_sources()
    images, sounds = cache_features(model, processor, args.work, sources)
    for row in (row for part in sources.values() for row in part):
        row["speech"] = {language: path for language, path in row.get("speech", {}).items() if path in sounds}
    from ..training.build import assemble  # the baseline reads the backbone as it was before training

    baseline = LinearBaseline(text_encoder(assemble("mini")[0], processor), images, sounds, sources)
    results = evaluate(model, Collator(processor, images, sounds), baseline, sources)
    for result in results:
        print("  ".join(f"{value:>40}" if name == "task" else f"{name} {value}" for name, value in result.items()))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
