"""Recipes: a training as data. A recipe is datasets and a list of stages; a wrong key fails before any weight loads.

Unusual: the defaults are the paper's settings (section 4.1), so a recipe says only what it does differently; and every
value can be set from the command line by its dotted name, as in ``stages.base.steps=100``.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.training_args import OptimizerNames

from ..behaviour_heads_sail import SEQUENCE_ENCODERS
from .objective import Options, check_weights
from .patterns import check_pattern

# Batches from a mining of negatives to the first that has them: more than any worker makes ahead (2 each, and 3).
LAG = 32
MOST_WORKERS = (LAG - 3) // 2

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be: the key, what came, what is needed."""


@dataclass
class DatasetSpec:
    """A dataset of a recipe.

    Attributes:
        path: of a .jsonl or .parquet file or a folder of `datasets`, relative to the recipe; or ``name:part`` of a
            built-in source (training/data).
        streamed: read in its order, without a length; shuffle it beforehand.
        tasks, sides, patterns, temperature, losses: as in `rows.TrainingDataset`.
        items: a table of items (Parquet, recommendation/behaviour.py), relative to the recipe; rows name items by ids.
        tables: files of ID embeddings (Parquet, recommendation/tables.py), for the terms id2item and id_relations.
    """

    path: str
    streamed: bool = False
    tasks: list[str | None] = field(default_factory=lambda: [None])
    sides: list[str] = field(default_factory=lambda: ["query", "target"])
    patterns: list[str] = field(default_factory=list)
    temperature: float = 0.05
    losses: dict[str, float] = field(default_factory=dict)
    items: str | None = None
    tables: list[str] = field(default_factory=list)


@dataclass
class LoraSpec:
    """LoRA in place of full training (peft).

    Attributes:
        r, alpha, dropout: as in ``peft.LoraConfig``.
        target_modules: a regular expression over module names; the backbone's attention by default.
        train_too: parts that train in full beside the adapters.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = r".*text_tower.*\.(q_proj|k_proj|v_proj|o_proj|query|key|value|Wqkv)"
    train_too: list[str] = field(default_factory=lambda: ["perceiver", "audio_adapter", "temperatures"])


@dataclass
class BalanceSpec:
    """Weights of the stage's datasets by how well they cover the validation sets (balancing.py), by its first model.

    Attributes:
        samples: rows of each dataset.
        clusters: centroids of each dataset and modality combination.
        epsilon: of Sinkhorn, in cosine.
        temperature: of the softmax over the datasets' scores.
    """

    samples: int = 10_000
    clusters: int = 64
    epsilon: float = 0.1
    temperature: float = 0.1


@dataclass
class SelectSpec:
    """The stage takes a clean subset of its datasets, near the validation sets (choosing.py), by its first model.

    Attributes:
        share: of each dataset's rows that is kept.
        clean: pairs that score below lambda* come last.
        clusters: centroids of each validation set and side.
    """

    share: float = 0.5
    clean: bool = True
    clusters: int = 64


@dataclass
class MineSpec:
    """Mined hard negatives (mining.py) beside those that the rows bring.

    Attributes:
        negatives: k, for each row.
        datasets: which ones; all of the stage's by default.
        every: steps from one mining to the next, with the model as it is then; none mines once, before the first step.
            What is mined takes effect `LAG` batches later.
    """

    negatives: int = 4
    datasets: list[str] = field(default_factory=list)
    every: int | None = None


@dataclass
class StageSpec:
    """One stage; it starts from the model of the stage before.

    Attributes:
        datasets: how often a batch is drawn from each, of any sum; all of the recipe's alike by default.
        losses: weights of the terms (objective.TERMS). The paper does not publish its own.
        options: settings of the terms (objective.Options).
        steps: optimizer steps.
        batch_size: rows of the contrastive batch over all ranks.
        token_budget: padded tokens of a micro-batch with cached gradients; none encodes the batch at once.
        accumulation: batches of one optimizer step. In-batch negatives do not reach across them; a larger batch with
            a token budget does.
        learning_rate, min_learning_rate: cosine from one to the other.
        learning_rates: of parameters whose name matches a pattern (``text_tower.*``), in place of ``learning_rate``.
        warmup_share: share of the steps in which the learning rate rises.
        weight_decay, max_grad_norm: of AdamW and of clipping.
        optimizer: a name that transformers knows.
        freeze: patterns of parameter names that do not train.
        lora: adapters in place of full training.
        gradient_checkpointing: compute activations again in place of keeping them.
        bf16: mixed precision; embeddings' losses, norms and softmax stay float32.
        field_dropout: share of text fields dropped at random.
        feature_cache: folder for the features of frozen vision and audio towers, which then run once per file.
        max_bad_share: share of rows that may be unreadable before the run stops.
        workers: processes that read batches.
        logging_steps, save_steps: how often; a checkpoint is what a killed run goes on from.
        report_to: "tensorboard" and its kin.
        balance: weights by the validation sets, times those in ``datasets``.
        select: only a clean subset near the validation sets.
        mine: hard negatives.
        sequence_encoder: of queries that are sequences: "mean" or "transformer" (behaviour_heads_sail.py).
    """

    datasets: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=lambda: {"nce": 1.0})
    options: Options = field(default_factory=Options)
    steps: int = 1000
    batch_size: int = 64
    token_budget: int | None = None
    accumulation: int = 1
    learning_rate: float = 1e-5
    min_learning_rate: float = 6e-6
    learning_rates: dict[str, float] = field(default_factory=dict)
    warmup_share: float = 0.03
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch_fused"
    freeze: list[str] = field(default_factory=list)
    lora: LoraSpec | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    field_dropout: float = 0.1
    feature_cache: str | None = None
    max_bad_share: float = 0.05
    workers: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    report_to: list[str] = field(default_factory=list)
    balance: BalanceSpec | None = None
    select: SelectSpec | None = None
    mine: MineSpec | None = None
    sequence_encoder: str = "mean"


@dataclass
class Recipe:
    """A whole training.

    Attributes:
        model: folder of the model to start from.
        output: folder for checkpoints, logs and the model of each stage.
        datasets, stages: by name; stages run in their order.
        validation: small sets like the downstream tests, which ``balance`` and ``select`` look at; never trained on.
        seed: of everything that is drawn.
        folder: where the recipe lies; relative dataset paths are relative to it.
    """

    model: str
    output: str
    datasets: dict[str, DatasetSpec]
    stages: dict[str, StageSpec]
    validation: dict[str, DatasetSpec] = field(default_factory=dict)
    seed: int = 0
    folder: Path = Path()

    def fingerprint(self, stage: str) -> str:
        """A hash of all that decides a stage's result: it and the stages before it, their datasets, model, seed.

        The order of datasets and stages counts, as draws are by place.
        """
        stages = list(self.stages)[: list(self.stages).index(stage) + 1]
        said: list[Any] = [self.model, self.seed]
        for name in stages:
            spec = self.stages[name]
            settings = {key: value for key, value in asdict(spec).items() if key not in _BOOKKEEPING}
            drawn = [
                [key, _said(asdict(part))]
                for key, part in self.datasets.items()
                if key in (spec.datasets or self.datasets)
            ]
            said.append([name, _said(settings), drawn])
            if spec.balance or spec.select:
                said.append([[key, _said(asdict(part))] for key, part in self.validation.items()])
        return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


# Settings that decide how a stage is watched, not what comes of it.
_BOOKKEEPING = ("logging_steps", "save_steps", "report_to", "workers")

# Settings that came later; without them a fingerprint is what it was.
_ADDED = {
    "balance": None,
    "select": None,
    "mine": None,
    "sequence_encoder": "mean",
    "items": None,
    "tables": [],
    "relation_temperature": 0.1,
}


def _said(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _ADDED or value != _ADDED[key]}
    return kept | ({"options": _said(kept["options"])} if isinstance(kept.get("options"), dict) else {})


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name: a YAML file, or the name of one that is shipped in ``training/recipes``.
        overrides: ``dotted.key=value``, each value as YAML.

    Raises:
        RecipeError: no such recipe; no YAML; a key or value that cannot be, by its dotted name.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.stem.startswith("accelerate"))
        raise RecipeError(f"There is no recipe {name!s}; give a .yaml file, or one of {', '.join(shipped)}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} holds {_called(content)}; a recipe is a mapping with model, output, datasets, stages."
        )
    for override in overrides:
        if override.startswith("defaults"):
            _set(content, override)
    _spread_defaults(content)
    for override in overrides:
        if not override.startswith("defaults"):
            _set(content, override)
    recipe: Recipe = _build(Recipe, content, "")
    recipe.folder = path.parent if path.parent != RECIPES else Path()
    _check(recipe)
    return recipe


def _spread_defaults(content: dict[str, Any]) -> None:
    """Give each stage the defaults that it does not set itself; a nested mapping is taken whole.

    Losses are written out, so that one of them can be set from the command line without losing the others.
    """
    defaults, stages = content.pop("defaults", None), content.get("stages")
    if not isinstance(defaults, dict | NoneType):
        raise RecipeError(f"defaults must be a mapping, it is {_called(defaults)}.")
    if not isinstance(stages, dict):
        return
    for name, part in stages.items():
        if isinstance(part, dict | NoneType):
            stages[name] = {**copy.deepcopy(defaults or {}), **(part or {})}
            stages[name].setdefault("losses", {"nce": 1.0})


def _set(content: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"{override!r} is no override; write key=value, as in stages.base.steps=100.")
    *path, last = key.split(".")
    place: Any = content
    for number, name in enumerate(path):
        if not isinstance(place, dict):
            raise RecipeError(f"{key}: {'.'.join(path[:number])} is no mapping.")
        if name not in place and number and path[number - 1] in ("stages", "datasets", "validation"):
            raise RecipeError(f"{key}: there is no {'.'.join(path[: number + 1])}; there are {', '.join(place)}.")
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
    if not isinstance(place, dict):
        raise RecipeError(f"{key}: {'.'.join(path)} is no mapping.")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {value!r} is no YAML value ({error})") from error


# --- from mappings to dataclasses -----------------------------------------------------------------------------------


def _build(kind: Any, value: Any, key: str) -> Any:
    """A value of the wanted type, checked all the way down.

    Raises:
        RecipeError: by the dotted key.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _build(next(part for part in inner if part is not NoneType), value, key)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise RecipeError(f"{key} must be a list, it is {_called(value)}.")
        return [_build(inner[0], part, f"{key}[{place}]") for place, part in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{key} must be a mapping, it is {_called(value)}.")
        return {str(name): _build(inner[1], part, f"{key}.{name}") for name, part in value.items()}
    return _build_scalar(kind, value, key)


def _build_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{key or 'the recipe'} must be a mapping, it is {_called(value)}.")
    hints = get_type_hints(kind)
    known = [one.name for one in fields(kind) if one.name != "folder"]
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}."
            raise RecipeError(f"unknown key {_dotted(key, name)}{hint}")
    for one in fields(kind):
        needed = one.default is one.default_factory  # both are MISSING
        if needed and one.name not in value:
            raise RecipeError(f"{_dotted(key, one.name)} is missing.")
    return kind(**{name: _build(hints[name], part, _dotted(key, name)) for name, part in value.items()})


def _build_scalar(kind: Any, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML reads 1e-5 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        named = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]
        raise RecipeError(f"{key} must be {named}, it is {_called(value)}.")
    if kind is float and not math.isfinite(value):
        raise RecipeError(f"{key} must be finite, it is {_called(value)}.")
    return float(value) if kind is float else value


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _called(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60} ({type(value).__name__})"


# --- what types do not say ------------------------------------------------------------------------------------------


def _check(recipe: Recipe) -> None:
    """Names and ranges.

    Raises:
        RecipeError: by the dotted key.
    """
    if not recipe.datasets or not recipe.stages:
        raise RecipeError("datasets and stages must each have an entry.")
    parts = {"datasets": recipe.datasets, "validation": recipe.validation}
    for key, dataset in ((f"{part}.{name}", spec) for part, specs in parts.items() for name, spec in specs.items()):
        _guard(f"{key}.losses", check_weights, dataset.losses)
        for pattern in dataset.patterns:
            _guard(f"{key}.patterns", check_pattern, pattern)
        _need(dataset.temperature > 0, f"{key}.temperature", dataset.temperature, "above 0")
        _need(
            set(dataset.sides) <= {"query", "target"} and len(dataset.sides) == 2,
            f"{key}.sides",
            dataset.sides,
            "two of query and target",
        )
        _need(bool(dataset.tasks), f"{key}.tasks", dataset.tasks, "a list with an entry; null is no instruction")
    for name, stage in recipe.stages.items():
        _check_stage(stage, f"stages.{name}", list(recipe.datasets))
        _check_choices(recipe, stage, f"stages.{name}")


def _check_stage(stage: StageSpec, key: str, datasets: list[str]) -> None:
    _guard(f"{key}.losses", check_weights, stage.losses)
    for name, weight in stage.datasets.items():
        _need(name in datasets, f"{key}.datasets.{name}", weight, f"of a dataset of the recipe ({', '.join(datasets)})")
        _need(weight >= 0, f"{key}.datasets.{name}", weight, ">= 0")
    _need(
        not stage.datasets or sum(stage.datasets.values()) > 0, f"{key}.datasets", stage.datasets, "above 0 somewhere"
    )
    for name in ("steps", "batch_size", "accumulation", "logging_steps", "save_steps"):
        _need(getattr(stage, name) >= 1, f"{key}.{name}", getattr(stage, name), "an integer >= 1")
    _need(stage.token_budget is None or stage.token_budget > 0, f"{key}.token_budget", stage.token_budget, "above 0")
    _need(stage.weight_decay >= 0, f"{key}.weight_decay", stage.weight_decay, ">= 0")
    _need(
        stage.sequence_encoder in SEQUENCE_ENCODERS,
        f"{key}.sequence_encoder",
        stage.sequence_encoder,
        f"one of {', '.join(SEQUENCE_ENCODERS)}",
    )
    optimizers = [str(one.value) for one in OptimizerNames]
    near = difflib.get_close_matches(stage.optimizer, optimizers, 3) or optimizers[:3]
    _need(
        stage.optimizer in optimizers,
        f"{key}.optimizer",
        stage.optimizer,
        f"known to transformers ({', '.join(near)}, ...)",
    )
    if stage.lora is not None:
        _need(stage.lora.r >= 1, f"{key}.lora.r", stage.lora.r, "an integer >= 1")
        _need(0 <= stage.lora.dropout < 1, f"{key}.lora.dropout", stage.lora.dropout, "from 0 to below 1")
        _guard(f"{key}.lora.target_modules", _check_expression, stage.lora.target_modules)
    _need(stage.workers >= 0, f"{key}.workers", stage.workers, "an integer >= 0")
    for name in (
        "learning_rate",
        "max_grad_norm",
        "options.cosent_temperature",
        "options.teacher_temperature",
        "options.student_temperature",
    ):
        value = stage
        for part in name.split("."):
            value = getattr(value, part)
        _need(value > 0, f"{key}.{name}", value, "above 0")
    low = stage.min_learning_rate
    _need(0 <= low <= stage.learning_rate, f"{key}.min_learning_rate", low, "between 0 and learning_rate")
    for name in ("warmup_share", "field_dropout", "max_bad_share"):
        _need(0 <= getattr(stage, name) <= 1, f"{key}.{name}", getattr(stage, name), "between 0 and 1")
    for name, value in stage.learning_rates.items():
        _need(value >= 0, f"{key}.learning_rates.{name}", value, ">= 0")


def _check_choices(recipe: Recipe, stage: StageSpec, key: str) -> None:
    for name in ("balance", "select"):
        if getattr(stage, name) is not None:
            _need(
                bool(recipe.validation), "validation", recipe.validation, f"a set or more, as {key}.{name} needs them"
            )
    drawn = [name for name in recipe.datasets if not stage.datasets or stage.datasets.get(name, 0) > 0]
    if stage.balance is not None:
        for name in ("samples", "clusters"):
            value = getattr(stage.balance, name)
            _need(value >= 1, f"{key}.balance.{name}", value, "an integer >= 1")
        for name in ("epsilon", "temperature"):
            value = getattr(stage.balance, name)
            _need(value > 0, f"{key}.balance.{name}", value, "above 0")
    if stage.select is not None:
        _need(0 < stage.select.share <= 1, f"{key}.select.share", stage.select.share, "above 0 and at most 1")
        _need(stage.select.clusters >= 1, f"{key}.select.clusters", stage.select.clusters, "an integer >= 1")
        _refuse_streams(recipe, drawn, f"{key}.select")
        for name, spec in recipe.validation.items():
            _need(not spec.streamed, f"validation.{name}.streamed", True, f"false, as {key}.select reads every row")
    if stage.mine is not None:
        every, known = stage.mine.every, stage.mine.datasets
        _need(stage.mine.negatives >= 1, f"{key}.mine.negatives", stage.mine.negatives, "an integer >= 1")
        _need(every is None or every >= 1, f"{key}.mine.every", every, "an integer >= 1, or nothing")
        _need(set(known) <= set(drawn), f"{key}.mine.datasets", known, f"of the stage's datasets ({', '.join(drawn)})")
        if every is not None:
            needed = f"at most {MOST_WORKERS} where negatives are mined again"
            _need(stage.workers <= MOST_WORKERS, f"{key}.workers", stage.workers, needed)
        _refuse_streams(recipe, known or drawn, f"{key}.mine")


def _refuse_streams(recipe: Recipe, names: list[str], key: str) -> None:
    for name in names:
        _need(not recipe.datasets[name].streamed, f"datasets.{name}.streamed", True, f"false, as {key} reads every row")


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error


def _need(holds: bool, key: str, value: Any, needed: str) -> None:
    if not holds:
        raise RecipeError(f"{key} is {value!r}; it must be {needed}.")


def _guard(key: str, check: Any, value: Any) -> None:
    try:
        check(value)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error
