"""What a checkpoint says of itself: parameters, towers, hashes; and what its training left beside it.

Room: Model -> **Card**. Unusual: whether a folder holds a shipped model is told by its tensors, not by its name, so a
card never lends one model's measurements to another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from ..evaluation.item_embedder import model_digest
from ..evaluation.reports import file_sha256
from ..modeling_sail import SailEmbeddingModel
from ..training.build import TOWERS, WEIGHTS
from ..training.towers import PINNED
from .trace import read_json

MODALITIES = ("text", "vision", "audio")


@dataclass(frozen=True)
class Stage:
    """A training stage's folder (training/stages.py): ``stage.json``, ``log.json``."""

    folder: Path

    @property
    def entry(self) -> dict[str, Any]:
        """What was trained on what, for how long."""
        found: dict[str, Any] = read_json(self.folder / "stage.json")
        return found


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder.

    Attributes:
        folder: in Hub format.
        stages: that led to it, the first one first; none where nothing lies beside it.
        root: the folder that the first stage started from, as it was named then; the folder itself without stages.
        shipped: the preset whose trained tensors the root holds, or None.
    """

    folder: Path
    stages: tuple[Stage, ...] = ()
    root: Path = field(default_factory=Path)
    shipped: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        found: dict[str, Any] = read_json(self.folder / "config.json")
        return found

    @cached_property
    def processor(self) -> dict[str, Any]:
        """``processor_config.json``, empty where there is none."""
        path = self.folder / "processor_config.json"
        return dict(read_json(path)) if path.is_file() else {}

    @cached_property
    def weights(self) -> dict[str, dict[str, Any]]:
        """Bytes and sha256 of every weight file, by its name."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, and of all; from the configuration, without loading a weight."""
        config: Any = AutoConfig.from_pretrained(self.folder)
        with torch.device("meta"):
            model = SailEmbeddingModel(config)
        counts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        return counts | {"all": sum(counts.values())}

    @property
    def trained(self) -> Path | None:
        """Where manifest, log and retrieval of the shipped preset lie."""
        return None if self.shipped is None else WEIGHTS / self.shipped

    @property
    def untouched(self) -> bool:
        """Whether it is the shipped model itself, not one that was trained on from it."""
        return self.shipped is not None and not self.stages

    def is_meant(self, model: dict[str, Any]) -> bool:
        """Whether a report's ``model`` (`reports.model_entry`) is this one: by the sha256 of a weight file."""
        return model.get("hash") in {one["sha256"] for one in self.weights.values()}

    @cached_property
    def digest(self) -> str:
        """The revision that mteb's results of this model have (`item_embedder.model_digest`); loads the model."""
        return model_digest(SentenceTransformer(str(self.folder), device="cpu", trust_remote_code=True))

    def tower_names(self) -> dict[str, str]:
        """By modality the pinned name or Hub id of each tower, where the checkpoint tells it.

        A configuration names what its tower was loaded from: a Hub id, or a pinned package in the cache.
        """
        found = {}
        for modality in MODALITIES:
            source = str((self.config.get(f"{modality}_config") or {}).get("_name_or_path", ""))
            pinned = [name for name in PINNED if any(part.startswith(name) for part in Path(source).parts)]
            name = pinned[0] if pinned else source if source.count("/") == 1 and not source.startswith("/") else ""
            name = name or TOWERS.get(self.shipped or "", {}).get(modality, "")
            if name:
                found[modality] = name
        return found

    def facts(self) -> dict[str, Any]:
        """What the trace keeps of it."""
        return {
            "weights": self.weights,
            "parameters": self.parameters,
            "config": {key: value for key, value in self.config.items() if isinstance(value, (int, float, list))},
            "processor": {key: value for key, value in self.processor.items() if isinstance(value, (int, float))},
        }


def read_checkpoint(folder: Path) -> Checkpoint:
    """A model's folder, and the stages that led to it.

    Raises:
        FileNotFoundError: no ``config.json`` or no weights; says what to do.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"There is no model in {folder}: config.json and *.safetensors are needed; "
            "`sail build --preset mini --out DIR` or `sail train` makes one."
        )
    stages, root = stages_before(folder)
    shipped = shipped_preset(root) if root.is_dir() else None
    return Checkpoint(folder, stages, root, shipped)


def stages_before(folder: Path) -> tuple[tuple[Stage, ...], Path]:
    """The stages whose last one wrote ``folder`` (``<stage>/model``), and what the first one started from.

    Stages lie beside each other; where the one before is no longer found, its folder is the root.
    """
    found: list[Stage] = []
    while (folder.parent / "stage.json").is_file() and len(found) < 100:
        found.insert(0, Stage(folder.parent))
        started = Path(found[0].entry["started_from"])
        beside = folder.parent.parent / started.parent.name / started.name
        folder = beside if (beside.parent / "stage.json").is_file() and beside != folder else started
    return tuple(found), folder


def shipped_preset(folder: Path) -> str | None:
    """The preset whose trained tensors a folder holds: all of them, each value."""
    there = tensor_files(folder)
    for weights in sorted(WEIGHTS.iterdir()):
        path = weights / "trained.safetensors"
        if path.is_file() and _holds(there, path):
            return weights.name
    return None


def _holds(there: dict[str, Path], trained: Path) -> bool:
    with safe_open(trained, framework="pt") as shipped:
        for name in shipped.keys():  # noqa: SIM118  not a dict
            if name not in there:
                return False
            with safe_open(there[name], framework="pt") as file:
                found, expected = file.get_tensor(name), shipped.get_tensor(name)
            if found.shape != expected.shape or not torch.equal(found.float(), expected.float()):
                return False
    return True


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of the model; heads and codes beside it are no part of it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in shards.items()}
    path = folder / "model.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)
