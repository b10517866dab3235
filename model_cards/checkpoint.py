"""What a checkpoint says of itself: parameters, towers, hashes; and what its training left beside it.

Room: Model -> **Card**. Unusual: whether a folder holds a shipped model, and which of its parts nobody trained, is told
by its tensors, not by its name, so a card never lends one model's measurements to another.
"""

from __future__ import annotations

import inspect
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from .. import modeling_sail
from ..configuration_sail import PRESETS, SailEmbeddingConfig
from ..evaluation.item_embedder import model_digest
from ..evaluation.reports import file_sha256
from ..modeling_sail import SailEmbeddingModel
from ..training.build import TOWERS, WEIGHTS
from ..training.towers import PINNED
from .trace import read_object

PACKAGE = Path(modeling_sail.__file__).parent
MODALITIES = ("text", "vision", "audio")
BESIDE_THE_EMBEDDING = ("temperatures", "late_fusion_gate")
STAGE_PARTS = {"started_from": str, "datasets": dict, "device": str, "versions": dict}  # that a card names


@dataclass(frozen=True)
class Stage:
    """A training stage's folder (training/stages.py): ``stage.json``, ``log.json``."""

    folder: Path

    @property
    def entry(self) -> dict[str, Any]:
        """What was trained on what, for how long.

        Raises:
            ValueError: a broken file, or one of something else.
        """
        path = self.folder / "stage.json"
        found = read_object(path)
        broken = [name for name, kind in STAGE_PARTS.items() if not isinstance(found.get(name), kind)]
        if not broken and not all(isinstance(told, dict) for told in found["datasets"].values()):
            broken = ["datasets"]
        if broken:
            raise ValueError(
                f"{path} is not what `sail train` writes: {', '.join(broken)} missing or of another kind; restore it, "
                "or move it away, and the card says nothing of the stage."
            )
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
        return read_object(self.folder / "config.json")

    @cached_property
    def processor(self) -> dict[str, Any]:
        """``processor_config.json``, empty where there is none."""
        path = self.folder / "processor_config.json"
        return read_object(path) if path.is_file() else {}

    @cached_property
    def weights(self) -> dict[str, dict[str, Any]]:
        """Bytes and sha256 of every weight file, by its name."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, and of all; from the configuration, without loading a weight.

        Raises:
            ValueError: the configuration is broken.
        """
        try:
            config: Any = AutoConfig.from_pretrained(self.folder)
            with torch.device("meta"):
                model = SailEmbeddingModel(config)
        except Exception as error:  # whatever transformers makes of a broken configuration
            raise ValueError(
                f"{self.folder / 'config.json'} describes no model that can be made: {first_line(error)}"
            ) from error
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
        """Whether a report's ``model`` is this one: by the sha256 of a weight file, or as the shipped preset."""
        if "preset" in model:
            return self.untouched and model["preset"] == self.shipped
        return model.get("hash") in {one["sha256"] for one in self.weights.values()}

    @cached_property
    def digest(self) -> str:
        """The revision that mteb's results of this model have (`item_embedder.model_digest`); loads the model.

        Raises:
            ValueError: it cannot be loaded.
        """
        try:
            return model_digest(SentenceTransformer(str(self.folder), device="cpu", trust_remote_code=True))
        except Exception as error:  # whatever its code, its weights and sentence-transformers raise
            why = first_line(error)
            if isinstance(error, ModuleNotFoundError) and str(error.name).endswith("_sail"):
                why = f"{error.name}.py is missing there; copy it from {PACKAGE}."
            raise ValueError(
                f"{self.folder} cannot be loaded, so it cannot be told which of mteb's results are its own: {why}"
            ) from error

    @cached_property
    def new_parts(self) -> tuple[str, ...]:
        """Parts with the weights that they were drawn with, of a model that no stage and no preset trained.

        Biases and norms are made constant, and any training moves them; a part without any is not told of, nor one that
        no embedding passes through.
        """
        if self.stages or self.shipped is not None:
            return ()
        moved: dict[str, bool] = {}
        for name, path in tensor_files(self.folder).items():
            part = name.split(".")[0]
            with safe_open(path, framework="pt") as file:
                if part not in BESIDE_THE_EMBEDDING and len(file.get_slice(name).get_shape()) == 1:
                    values = file.get_tensor(name)
                    moved[part] = moved.get(part, False) or bool((values != values[:1]).any())
        return tuple(part for part, has in moved.items() if not has)

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
        FileNotFoundError: no ``config.json`` or no weights; says what to do. ValueError: a model of another kind.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"There is no model in {folder}: config.json and model.safetensors are needed; {below(folder)}"
        )
    kind = read_object(folder / "config.json").get("model_type")
    if kind != SailEmbeddingConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of the type {kind!r}; cards are written for {SailEmbeddingConfig.model_type!r}, "
            "which `sail build` and `sail train` make."
        )
    stages, root = stages_before(folder)
    shipped = shipped_preset(root) if root.is_dir() else None
    return Checkpoint(folder, stages, root, shipped)


def below(folder: Path) -> str:
    """Where to look instead of a folder without a model: a run and its stages keep theirs below."""
    found = sorted(path.parent for path in [*folder.glob("model/config.json"), *folder.glob("*/model/config.json")])
    if not found:
        return "`sail build --preset mini --out DIR` or `sail train` makes one."
    return f"its training's models lie below, so name {' or '.join(shlex.quote(str(one)) for one in found)}."


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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
    """The preset whose trained tensors a folder holds: all of them, each value, in the preset's own form."""
    there = tensor_files(folder)
    for weights in sorted(WEIGHTS.iterdir()):
        path = weights / "trained.safetensors"
        if path.is_file() and _holds(there, path) and _has_form(folder, weights.name):
            return weights.name
    return None


def _has_form(folder: Path, preset: str) -> bool:
    """Whether a configuration is a preset's: with three towers, and every switch as the preset has it."""
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    usual = {name: one.default for name, one in inspect.signature(SailEmbeddingConfig).parameters.items()}
    switches = {name: value for name, value in usual.items() if isinstance(value, (bool, int, float, str))}
    wanted = {name: PRESETS[preset].get(name, value) for name, value in switches.items()}
    whole = all(config.get(f"{modality}_config") is not None for modality in MODALITIES)
    return whole and all(config.get(name, value) == value for name, value in wanted.items())


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
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise ValueError(f"{index} names no files of tensors (weight_map); save the model again.")
        return {name: folder / file for name, file in shards.items()}
    path = folder / "model.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)
