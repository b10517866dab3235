"""`sail mine`: a dataset's hard negatives, as a dataset again, with a report that a person can judge.

    <out>/rows.parquet   the rows with their negatives, which a recipe takes; ``mined`` holds scores and counts
          report.json    lambda*, F1, precision, recall, their curve, counts, rows left out
          report.html    the curve, and ten dropped false negatives with their pictures

Unusual: embeddings and the mining's own progress are kept in ``<out>/work`` until the result is whole, so a killed run
goes on where it was; rows are read by place and written some at a time, never held.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..encode_job import require_folder
from ..modeling_sail import SailEmbeddingModel
from .build import load_built
from .collate import Collator
from .data.sources import open_dataset
from .feature_cache import cache_media
from .files import whole, write_json, write_text
from .mining import MEMORY_BYTES, Mined, mine, summary
from .pages import curve_plot, items_row, page, table, thinned
from .recipe import DatasetSpec
from .rows import Item, TrainingDataset, named_by_path, with_negatives
from .survey import Survey, survey

ROW_GROUP = 512  # rows held while they are written
SHOWN = 10  # dropped false negatives in the report

_MINED = pa.struct(
    [("positive_score", pa.float32()), ("scores", pa.list_(pa.float32())), ("false_negatives", pa.int64())]
)
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "query", "target", "target_id")),
        ("negatives", pa.list_(pa.string())),
        ("score", pa.float64()),
        ("teacher_scores", pa.list_(pa.float64())),
        ("mined", _MINED),
    ]
)


def mine_dataset(
    model: SailEmbeddingModel,
    collate: Collator,
    dataset: TrainingDataset,
    out: Path,
    *,
    num_negatives: int = 8,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Any]:
    """Embed a dataset's pairs, mine them, write the folder.

    Args:
        model, collate: as in `survey.survey`.
        dataset: not streamed; its media are paths, as a file cannot hold anything else by name.
        out: folder of the result; a run that was killed goes on in it.
        num_negatives: k, at most so many a row; negatives that rows bring stay before them.
        memory_bytes: for scores, besides the embeddings, which lie on disk (`mining.mine`).

    Returns:
        The report.

    Raises:
        ValueError: `survey.survey`; nothing can be mined, or what is found says nothing (`Mined.degenerate`); a medium
            that is no path.
    """
    work = out / "work"
    ours = survey(model, collate, dataset, work / "embeddings")
    assert ours is not None, "`sail mine` has one rank"
    found = mine(
        ours.queries,
        ours.targets,
        query_ids=ours.query_ids,
        target_ids=ours.target_ids,
        num_negatives=num_negatives,
        memory_bytes=memory_bytes,
        device=model.device,
        progress=True,
        state=work / "mine.safetensors",
    )
    if found.degenerate:
        raise ValueError(f"Dataset {dataset.name!r}: {found.degenerate}")
    _write_rows(dataset, ours, found, out / "rows.parquet")
    report = _report(dataset, ours, found, num_negatives)
    write_json(out / "report.json", report)
    write_text(out / "report.html", _page(dataset, ours, found, report))
    shutil.rmtree(work)
    return report


def run_mine(
    rows: str,
    model: Path,
    out: Path,
    num_negatives: int,
    task: str | None,
    memory_bytes: int,
    feature_cache: Path | None = None,
) -> dict[str, Any]:
    """`mine_dataset` of a path or built-in source by the model in a folder, on the GPU where there is one.

    Raises:
        FileNotFoundError: no such rows. ValueError: no such model; `mine_dataset`; no such task.
    """
    require_folder(model)
    dataset = open_dataset(rows, DatasetSpec(path=rows, tasks=[task]))
    loaded, processor = load_built(model)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    images, sounds = cache_media(loaded, processor, [dataset], feature_cache) if feature_cache else (None, None)
    collate = Collator(processor, images, sounds)
    return mine_dataset(loaded, collate, dataset, out, num_negatives=num_negatives, memory_bytes=memory_bytes)


# --- rows -----------------------------------------------------------------------------------------------------------


def _write_rows(dataset: TrainingDataset, ours: Survey, found: Mined, path: Path) -> None:
    with whole(path) as partial, pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        for record in tqdm(_records(dataset, ours, found), "write", total=len(ours.places), unit="row"):
            group.append(record)
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                group = []
        writer.write_table(pa.Table.from_pylist(group, SCHEMA))


def _records(dataset: TrainingDataset, ours: Survey, found: Mined) -> Iterator[dict[str, Any]]:
    for number, place in enumerate(ours.places.tolist()):
        negatives = found.negatives[number]
        places = ours.places[negatives[negatives >= 0].numpy()]
        row = with_negatives(dataset.read_as_surveyed(place), dataset, places.tolist())
        teacher = row.teacher_scores or ()
        yield {
            "id": row.id,
            "query": _as_text(row.query, row.id),
            "target": _as_text(row.target, row.id),
            "target_id": row.target_id,
            "negatives": [
                _as_text(item, row.id, name) for item, name in zip(row.negatives, row.negative_ids, strict=True)
            ],
            "score": row.score,
            "teacher_scores": [None if math.isnan(score) else score for score in teacher] or None,
            "mined": {
                "positive_score": float(found.positives[number]),
                "scores": found.scores[number][: len(places)].tolist(),
                "false_negatives": int(found.false_negatives[number]),
            },
        }


def _as_text(item: Item, row: str, name: str | None = None) -> str:
    """An item as JSON, media by their absolute paths; a negative keeps the name of its target.

    Raises:
        ValueError: a medium, or anything else, that JSON cannot hold.
    """
    fields = named_by_path(item, f"row {row!r}")
    if name is not None:
        fields["id"] = name
    return json.dumps(fields, ensure_ascii=False)


# --- the report -----------------------------------------------------------------------------------------------------


def _report(dataset: TrainingDataset, ours: Survey, found: Mined, num_negatives: int) -> dict[str, Any]:
    curve = thinned(found.threshold.curve)
    return {
        "dataset": dataset.name,
        "task": dataset.tasks[0],
        "num_negatives": num_negatives,
        **summary(found),
        "rows_skipped": [{"id": name, "reason": reason} for name, reason in ours.skipped],
        "curve": {
            name: curve[:, column].tolist() for column, name in enumerate(("threshold", "f1", "precision", "recall"))
        },
    }


def _page(dataset: TrainingDataset, ours: Survey, found: Mined, report: dict[str, Any]) -> str:
    facts = {name: value for name, value in report.items() if isinstance(value, (int, float, str))}
    facts["rows_skipped"] = len(ours.skipped)
    shown = "".join(_dropped(dataset, ours, found, place) for place in _spread(found))
    said = (
        "<p>At or above lambda*, so the model takes the third item for a right answer to the first, as the second is. "
        "Is it? Then it was well dropped. Shown: rows spread over their own scores, with the highest one of each."
        "</p><div class='pair'><div><b>query</b></div><div><b>its target</b></div><div><b>dropped</b></div></div>"
    )
    return page(
        f"Hard negatives of {dataset.name}",
        table(facts),
        curve_plot(found.threshold),
        "<h2>Dropped as false negatives</h2>",
        said + shown if shown else "<p>None.</p>",
    )


def _spread(found: Mined) -> list[int]:
    """Rows with dropped targets, spread evenly over how high the positive scores."""
    rows = (found.highest_false >= 0).nonzero()[:, 0]
    ordered = rows[found.positives[rows].argsort()].numpy()
    return ordered[np.unique(np.linspace(0, len(ordered) - 1, SHOWN).astype(int))].tolist() if len(ordered) else []


def _dropped(dataset: TrainingDataset, ours: Survey, found: Mined, number: int) -> str:
    other = int(found.highest_false[number])
    row, wrong = (dataset.read_as_surveyed(int(ours.places[place])) for place in (number, other))
    score = float(ours.queries[number] @ ours.targets[other])
    said = (
        f"target {float(found.positives[number]):.3f}, dropped {score:.3f}; {int(found.false_negatives[number])} in all"
    )
    return items_row((row.query, row.target, wrong.target), said)
