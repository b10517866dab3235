"""What a stage draws from: balanced weights, a clean subset near the validation sets, hard negatives (section 3.1).

    <stage>/balance.json, .html, .svg          weights of the datasets, and what they come from
            selected/<dataset>.npy, report.json  rows that are kept
            negatives/<batch>/<dataset>.npy, report.json  (N, k) rows whose targets are negatives

Unusual: each choice is made by the model that the stage starts from, once, and kept: a resumed stage reads it.
Negatives that are mined again while it trains are files too, and take effect `LAG` batches later, so a batch is still a
function of its number alone, whatever was prefetched by whom.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

from ..modeling_sail import SailEmbeddingModel
from .balancing import Balance, balance, cluster
from .collate import Collator
from .distributed import rank, wait, world_size
from .files import whole, write_json, write_text
from .mining import Mined, NothingToMine, mine, summary
from .pages import balance_page, heat_map
from .recipe import LAG, BalanceSpec, MineSpec, SelectSpec, StageSpec
from .rows import TrainingDataset
from .survey import Survey, content_hash, model_hash, sample_embeddings, survey

logger = logging.getLogger(__name__)

Datasets = Mapping[str, TrainingDataset]


@dataclass
class Chosen:
    """What a stage draws from.

    Attributes:
        datasets, weights: by name; the weights are of any sum.
        negatives: mined ones.
    """

    datasets: dict[str, TrainingDataset]
    weights: dict[str, float]
    negatives: NegativeTables | None = None


def choose(
    stage: StageSpec,
    model: SailEmbeddingModel,
    collate: Collator,
    datasets: Datasets,
    weights: Mapping[str, float],
    validation: Datasets,
    folder: Path,
    seed: int,
) -> Chosen:
    """A stage's ``balance``, ``select`` and ``mine``, by the model that it starts from; every rank must call it.

    Args:
        stage: what is asked for.
        model, collate: as in `survey.survey`.
        datasets, weights: the stage's, by name.
        validation: what balance and select look at.
        folder: the stage's.
        seed: of samples and k-means.

    Raises:
        ValueError: by the functions below.
    """
    if stage.balance or stage.select or stage.mine:
        model.to(PartialState().device)
    chosen = Chosen(dict(datasets), dict(weights))
    if stage.balance is not None:
        covered = balanced(model, collate, datasets, validation, stage.balance, folder, seed)
        chosen.weights = {key: weight * covered[key] for key, weight in weights.items()}
    if stage.select is not None:
        chosen.datasets = selected(model, collate, datasets, validation, stage.select, folder, seed)
    if stage.mine is not None:
        every = None if stage.mine.every is None else stage.mine.every * stage.accumulation
        names = frozenset(stage.mine.datasets or datasets)
        chosen.negatives = NegativeTables(folder / "negatives", names, every)
        mine_tables(model, collate, chosen.datasets, stage.mine, chosen.negatives, 0)
    return chosen


# --- weights --------------------------------------------------------------------------------------------------------


def balanced(
    model: SailEmbeddingModel,
    collate: Collator,
    datasets: Datasets,
    validation: Datasets,
    spec: BalanceSpec,
    folder: Path,
    seed: int = 0,
) -> dict[str, float]:
    """Sampling weights by `balancing.balance`; every rank must call it, and gets the same.

    Args:
        model, collate: as in `survey.survey`.
        datasets: the training sets.
        validation: benchmarks like the downstream tests.
        spec: settings.
        folder: gets ``balance.json``, ``.html`` and ``.svg``; what the same job left there is read.
        seed: of the samples and of k-means.

    Raises:
        ValueError: `balancing.balance`; a dataset none of whose items can be embedded.
    """
    kept = folder / "balance.json"
    job = _balance_job(model, datasets, validation, spec, seed)
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if known.get("job") != job:
        _balance(model, collate, datasets, validation, spec, folder, job, seed)
    wait()
    weights: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))["weights"]
    return weights


def _balance(
    model: SailEmbeddingModel,
    collate: Collator,
    datasets: Datasets,
    validation: Datasets,
    spec: BalanceSpec,
    folder: Path,
    job: str,
    seed: int,
) -> None:
    """Each rank embeds some of the sets; the first one weighs them."""
    parts = folder / f"balance-parts-{job[:12]}"
    parts.mkdir(parents=True, exist_ok=True)
    sides = [("training", name, one) for name, one in datasets.items()]
    sides += [("validation", name, one) for name, one in validation.items()]
    for place, (_, _, dataset) in list(enumerate(sides))[rank() :: world_size()]:
        path = parts / f"{place}.npz"
        if not path.exists():
            found = sample_embeddings(model, collate, dataset, spec.samples, seed)
            with whole(path) as partial, partial.open("wb") as file:
                np.savez(file, **found)
    wait()
    if rank() > 0:
        return
    known: dict[str, dict[str, dict[str, np.ndarray]]] = {"training": {}, "validation": {}}
    for place, (side, name, _) in enumerate(sides):
        with np.load(parts / f"{place}.npz", allow_pickle=False) as part:
            known[side][name] = {kind: part[kind] for kind in part.files}
    found = balance(
        known["training"],
        known["validation"],
        num_clusters=spec.clusters,
        epsilon=spec.epsilon,
        temperature=spec.temperature,
        seed=seed,
    )
    counts = {name: {kind: len(part) for kind, part in kinds.items()} for name, kinds in known["training"].items()}
    write_text(folder / "balance.html", balance_page(found))
    write_text(folder / "balance.svg", heat_map(found))
    write_json(folder / "balance.json", {**_balance_report(found, spec, counts), "job": job})
    for path in folder.glob("balance-parts-*"):
        shutil.rmtree(path)


def _balance_job(
    model: SailEmbeddingModel, datasets: Datasets, validation: Datasets, spec: BalanceSpec, seed: int
) -> str:
    """A hash of all that decides the weights: those of another job are made anew."""
    said: list[Any] = [model_hash(model), vars(spec), seed]
    for side in (datasets, validation):
        said.append([[name, "stream" if one.streamed else content_hash(one)] for name, one in side.items()])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _balance_report(found: Balance, spec: BalanceSpec, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    scores = [[None if np.isnan(value) else float(value) for value in line] for line in found.scores]
    return {
        "weights": found.weights,
        "datasets": found.datasets,
        "benchmarks": found.benchmarks,
        "scores": scores,
        "compared": found.used,
        "embeddings": counts,
        "settings": vars(spec),
    }


# --- rows -----------------------------------------------------------------------------------------------------------


def selected(
    model: SailEmbeddingModel,
    collate: Collator,
    datasets: Datasets,
    validation: Datasets,
    spec: SelectSpec,
    folder: Path,
    seed: int = 0,
) -> dict[str, TrainingDataset]:
    """The datasets cut to a clean subset near the validation sets (section 3.3.1, stage 2); every rank must call it.

    A pair that is there twice is taken once. Of the rest, ``share`` of the rows is kept: first those whose own pair
    scores at or above the dataset's lambda* (`mining.mine`), that is, which the model takes for a true pair; among
    equals those near a validation set: the mean over both sides of the highest cosine with one of its centroids.

    Args:
        model, collate: as in `survey.survey`.
        datasets: not streamed.
        validation: what to be near to; `survey` embeds their pairs with the same instructions as the dataset's.
        spec: settings.
        folder: gets ``selected/``; what is there already is read.
        seed: of k-means.

    Raises:
        ValueError: `survey.survey`.
    """
    place, cut = folder / "selected", {}
    for name, dataset in datasets.items():
        kept = place / f"{name}.npy"
        if not kept.is_file():
            ours = survey(model, collate, dataset, place / f"survey-{name}", disposable=True)
            wanted = _surveyed_alike(model, collate, dataset, validation, place)
            if ours is not None:
                places, said = _select(ours, [one for one in wanted if one is not None], spec, model.device, seed)
                _report(place / "report.json", name, said)
                _save(kept, places)
            wait()
        cut[name] = replace(dataset, source=Subset(dataset.source, np.load(kept, allow_pickle=False)))
    if rank() == 0:
        for path in place.glob("survey-*"):
            shutil.rmtree(path)
    return cut


def _surveyed_alike(
    model: SailEmbeddingModel, collate: Collator, dataset: TrainingDataset, validation: Datasets, place: Path
) -> list[Survey | None]:
    """The validation sets' pairs with the instructions of a dataset; what is on disk already is read."""
    alike = [replace(one, tasks=dataset.tasks[:1], sides=dataset.sides) for one in validation.values()]
    said = f"{dataset.tasks[0]}-{dataset.sides[0]}"
    return [survey(model, collate, one, place / f"survey-of-{one.name}-{said}", disposable=True) for one in alike]


def _select(
    ours: Survey, wanted: Sequence[Survey], spec: SelectSpec, device: torch.device, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of the dataset, rising, and what the report says of them."""
    clean, threshold = np.ones(len(ours.places), dtype=bool), None
    if spec.clean:
        clean, threshold = _clean(ours, device)
    near = np.max([_nearness(ours, other, spec.clusters, seed) for other in wanted], axis=0)
    ids = np.stack([ours.query_ids, ours.target_ids], axis=1)
    once = np.unique(ids, axis=0, return_index=True)[1]
    order = once[np.lexsort((-near[once], ~clean[once]))]
    kept = np.sort(order[: max(1, round(spec.share * len(order)))])
    report = {
        "rows": len(clean),
        "said_twice": len(clean) - len(once),
        "lambda": threshold,
        "clean": int(clean[once].sum()) if spec.clean else None,
        "kept": len(kept),
        "kept_clean": int(clean[kept].sum()) if spec.clean else None,
        "mean_nearness": {"all": float(near.mean()), "kept": float(near[kept].mean())},
    }
    return ours.places[kept], report


def _clean(ours: Survey, device: torch.device) -> tuple[np.ndarray, float | None]:
    """(N,) whether a pair scores at or above lambda*, and lambda*; where there is none, every pair is as good."""
    try:
        found = _mined(ours, 1, device)
    except NothingToMine as error:
        logger.warning("Every pair is called clean: %s", error)
        return np.ones(len(ours.places), dtype=bool), None
    return found.positives.numpy() >= found.threshold.value, found.threshold.value


def _mined(ours: Survey, negatives: int, device: torch.device) -> Mined:
    ids = {"query_ids": ours.query_ids, "target_ids": ours.target_ids}
    return mine(ours.queries, ours.targets, **ids, num_negatives=negatives, device=device)


def _nearness(ours: Survey, other: Survey, clusters: int, seed: int) -> np.ndarray:
    """(N,) mean over both sides of the highest cosine with a centroid of the other set's same side."""
    sides = []
    for mine_, theirs in ((ours.queries, other.queries), (ours.targets, other.targets)):
        centroids = torch.from_numpy(cluster(theirs.numpy(), clusters, seed).centroids)
        sides.append(torch.cat([(part @ centroids.T).amax(dim=1) for part in mine_.split(65_536)]))
    return (torch.stack(sides).mean(dim=0)).numpy()


class Subset(Sequence):
    """Some records of a source, by place.

    Args:
        source: records by place.
        places: (n,) which ones.
    """

    def __init__(self, source: Any, places: np.ndarray) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return self.source[int(self.places[index])]


# --- negatives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NegativeTables:
    """Mined negatives of a stage's datasets, by batch.

    Attributes:
        folder: of the tables.
        names: datasets that have one.
        every: batches from one mining to the next; None mines once, before the first.
    """

    folder: Path
    names: frozenset[str]
    every: int | None = None

    def of(self, name: str, batch: int) -> np.ndarray | None:
        """(N, k) rows whose targets are negatives of each row, -1 where there are fewer; None where none are mined."""
        if name not in self.names:
            return None
        made = 0 if self.every is None else max(0, (batch - LAG) // self.every * self.every)
        path = self.path(name, made)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def path(self, name: str, batch: int) -> Path:
        """Of the table that was mined before a batch."""
        return self.folder / f"{batch:09d}" / f"{name}.npy"


def mine_tables(
    model: SailEmbeddingModel,
    collate: Collator,
    datasets: Datasets,
    spec: MineSpec,
    tables: NegativeTables,
    batch: int,
) -> None:
    """Mine each dataset with the model as it is; every rank must call it. Tables that are there already are kept.

    A dataset that has no negatives, or too few pairs, goes without, and a warning says why.

    Args:
        model, collate: as in `survey.survey`.
        datasets: by name; those without a table in ``tables.names`` are passed over.
        spec: settings.
        tables: where they go.
        batch: number of the batch that comes next.
    """
    for name in sorted(tables.names):
        path = tables.path(name, batch)
        if path.is_file():
            continue
        place = path.with_name(f"survey-{name}")
        found = survey(model, collate, datasets[name], place, disposable=True)
        if found is not None:
            table, said = _table(found, len(datasets[name].source), spec, model.device)
            if "note" in said:
                logger.warning("Dataset %r goes without mined negatives: %s", name, said["note"])
            _report(path.with_name("report.json"), name, said)
            _save(path, table)
            shutil.rmtree(place)
        wait()


def _table(ours: Survey, size: int, spec: MineSpec, device: torch.device) -> tuple[np.ndarray, dict[str, Any]]:
    """(size, k) rows of the dataset, and what the report says."""
    table = np.full((size, spec.negatives), -1, dtype=np.int64)
    try:
        found = _mined(ours, spec.negatives, device)
    except NothingToMine as error:
        return table, {"note": str(error)}
    if found.degenerate:
        return table, summary(found) | {"note": found.degenerate}
    places = found.negatives.numpy()
    table[ours.places] = np.where(places >= 0, ours.places[places], -1)
    return table, summary(found)


class Remining(TrainerCallback):
    """Mines again every few steps, with the model as it is then ("dynamic", section 3.1.2)."""

    def __init__(self, trainer: Any, datasets: Datasets, spec: MineSpec, tables: NegativeTables) -> None:
        self.trainer, self.datasets, self.spec, self.tables = trainer, datasets, spec, tables

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.spec.every is not None
        if state.global_step % self.spec.every == 0 and state.global_step < state.max_steps:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            collate = self.trainer.train_dataset.collate
            batch = state.global_step * args.gradient_accumulation_steps
            mine_tables(model, collate, self.datasets, self.spec, self.tables, batch)


def _report(path: Path, name: str, said: dict[str, Any]) -> None:
    """Add a dataset to a report."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, known | {name: said})


def _save(path: Path, values: np.ndarray) -> None:
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, values)
