"""Result files as tables whose every cell knows its place: reports, mteb's, and what was measured before reports.

Room: Evaluation -> **Card**. Unusual: a file that is about another model is left out, and said so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import evaluation
from ..evaluation.charts import histogram_chart
from ..evaluation.reports import is_report, read_report
from .checkpoint import Checkpoint
from .earlier import EARLIER
from .tables import Cell, Found, Histogram, Metric, Table, picture_beside
from .trace import At, is_number, read_json, read_object

logger = logging.getLogger(__name__)

RESULTS = Path(evaluation.__path__[0]) / "results"

FIRST = ("retrieval", "mteb", "peers", "ladder", "robustness")  # known keys, in a good order; others follow by name
BESIDE = ("model_meta.json", "summary.json")  # what lies beside mteb's results
HEADINGS = {
    "peers": "Beside its peers",
    "ladder": "The ablation ladder",
    "robustness": "Robustness and cost",
    "progressive": "Choosing the data, stage by stage",
    "recipe_comparison": "The full set of losses beside plain NCE",
}
LAST = ("recipe_comparison", "progressive", "balance", "cre", "benchmarks")


def read_results(folders: Sequence[Path], checkpoint: Checkpoint) -> list[Found]:
    """All that a card of this checkpoint may show, in order.

    Args:
        folders: with ``*.json`` and ``*.jsonl``, and folders of mteb's results below.
        checkpoint: what is about another one is left out.

    Raises:
        FileNotFoundError: no such folder. ValueError: a broken file.
    """
    found, mteb = own_retrieval(checkpoint), []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} of results; measure first, or leave --results out.")
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
            content = read_json(path)
            if is_report(content):
                found += _report(path, checkpoint)
            elif path.stem in EARLIER and path.parent.resolve() == RESULTS.resolve():
                found += _earlier(path, content, checkpoint)
            elif not is_mteb(content) and path.name not in BESIDE:
                logger.warning("%s is left out: it is no report, and does not say what it is about.", path)
        mteb += [path for path in sorted(folder.rglob("*.json")) if is_mteb(read_json(path))]
    found += _mteb(mteb, checkpoint)
    order = {key: place for place, key in enumerate((*FIRST, None, *LAST))}
    return sorted(found, key=lambda one: (order.get(one.key, order[None]), one.key))


def _report(path: Path, checkpoint: Checkpoint) -> list[Found]:
    content = read_report(path)
    model = content["model"]
    if model is None:
        logger.warning("%s is left out: it does not say which model it is about (`model` is null).", path)
        return []
    if not checkpoint.is_meant(model):
        told = f"the shipped {model['preset']}" if "preset" in model else f"{model['name']} with other weights"
        logger.warning("%s is left out: it is about %s; measure again.", path, told)
        return []
    at = At(path)
    tables = []
    for key, one in content["tables"].items():
        place = at / "tables" / key
        rows = {
            row: {column: Cell(values, place / "rows" / row / column) for column, values in cells.items()}
            for row, cells in one["rows"].items()
        }
        parts = {name: one[name] for name in ("title", "unit", "columns", "notes", "higher_is_better")}
        names = {one["unit"]: (place / "unit",)} | {row: (place / "rows" / row,) for row in rows}
        names |= {column: (place / "columns" / n,) for n, column in enumerate(one["columns"])}
        tables.append(Table(key=key, rows=rows, at=place, names=names, **parts))
    where = {name: content[name] for name in ("machine", "versions", "date")}
    heading = HEADINGS.get(path.stem, path.stem.replace("_", " ").capitalize())
    more = {"about_at": at / "about", "command": content["command"], "where": where}
    more |= {"picture": picture_beside(path), "histograms": content.get("histograms", {})}
    return [Found(path.stem, heading, content["about"], tables, [path], **more)]


# --- of this very checkpoint ----------------------------------------------------------------------------------------


def own_retrieval(checkpoint: Checkpoint) -> list[Found]:
    """Retrieval of held-out names: what ships with the model, or what its last stage kept of its evaluation."""
    if checkpoint.trained is not None and checkpoint.untouched:
        path, at = checkpoint.trained / "retrieval.json", At(checkpoint.trained / "retrieval.json")
    elif checkpoint.stages:
        path = checkpoint.stages[-1].folder / "stage.json"
        at = At(path) / "evaluation"
    else:
        return []
    content = read_json(path) if path.is_file() else []
    rows = content.get("evaluation") if isinstance(content, dict) else content
    known = isinstance(rows, list) and all(isinstance(one, dict) and isinstance(one.get("task"), str) for one in rows)
    if not known or not rows:
        return []
    return [_retrieval(rows, at, path)]


def _retrieval(rows: list[dict[str, Any]], at: At, path: Path) -> Found:
    names = {"queries": "queries", "candidates": "candidates"}
    for k in (1, 10):
        names |= {f"R@{k}": f"model R@{k}", f"linear baseline R@{k}": f"linear R@{k}"}
    cells = {
        row["task"]: {
            column: Cell([float(row[name])], at / place / name)
            for column, name in names.items()
            if is_number(row.get(name))
        }
        for place, row in enumerate(rows)
    }
    columns = [column for column in names if any(column in one for one in cells.values())]
    drawn = [column for column in columns if column.endswith("R@10")]
    tasks = {row["task"]: (at / place / "task",) for place, row in enumerate(rows)}
    table = Table("retrieval", "Names that no training saw", "", columns, cells, at, chart=drawn, names=tasks)
    metrics = [
        Metric(
            "retrieval",
            "Tux Paint and GCompris, held-out names",
            row["task"],
            f"recall_at_{k}",
            at / n / f"model R@{k}",
        )
        for n, row in enumerate(rows)
        for k in (1, 10)
        if is_number(row.get(f"model R@{k}"))
    ]
    about = (
        "Pictures and recorded speech look for names, names for items; beside it a linear map from the frozen towers."
    )
    command = "python -m modeling_sail.evaluation.tuxpaint_retrieval --model build/mini"
    return Found("retrieval", "Retrieval of held-out names", about, [table], [path], None, command, metrics=metrics)


# --- mteb -----------------------------------------------------------------------------------------------------------

LEFT_OUT = "left out"
LEFT_OUT_NOTE = (
    "*left out*: how many queries, candidates or sides of pairs the model could not embed; they find nothing and are "
    "not found."
)
NAMES = ("main_score", "recall_at_1", "recall_at_10", "recall_at_50", "recall_at_100", "ndcg_at_10")
SHOWN = {name: name for name in (*NAMES, "auc", "average_precision")} | {"left_out": LEFT_OUT}


def is_mteb(content: Any) -> bool:
    """Whether a JSON file is meant as an mteb ``TaskResult``."""
    return isinstance(content, dict) and "task_name" in content


def _mteb(paths: Sequence[Path], checkpoint: Checkpoint) -> list[Found]:
    """One table for all tasks: a row for each task, split and subset."""
    rows: dict[str, dict[str, Cell]] = {}
    metrics, kept, names, histograms = [], [], {}, {}
    for path in paths:
        if not _is_of(path, checkpoint):
            continue
        kept.append(path)
        for at, task, split, one in _scored(path):
            subset = one.get("hf_subset", "default")
            name = ": ".join([task, *(part for part in (split, subset) if part not in ("test", "default"))])
            places = [at / "hf_subset"] if "hf_subset" in one else []
            names[name] = (At(path) / "task_name", At(path) / "scores" / split, *places)
            rows[name] = {said: Cell([float(one[key])], at / key) for key, said in SHOWN.items() if is_number(one[key])}
            if one["separability_histogram"] is not None:
                histograms[name] = {"": _drawable(path, one["separability_histogram"])}
            if is_number(one["main_score"]):
                kind = "retrieval" if "recall_at_1" in one else "pair-classification"
                metrics.append(Metric(kind, task, subset, "main_score", at / "main_score"))
    rows = {name: cells for name, cells in rows.items() if cells}
    if not rows:
        return []
    told = {said for cells in rows.values() for said, cell in cells.items() if said != LEFT_OUT or any(cell.values)}
    columns = [said for said in SHOWN.values() if said in told]
    rows = {name: {said: cell for said, cell in cells.items() if said in told} for name, cells in rows.items()}
    notes = [LEFT_OUT_NOTE] if LEFT_OUT in told else []
    table = Table("mteb", "Tasks", "", columns, rows, At(kept[0]), names=names, notes=notes)
    more = {"command": "sail evaluate", "metrics": metrics, "histograms": histograms}
    return [Found("mteb", "Tasks of mteb", "", [table], kept, **more)]


def _scored(path: Path) -> Iterator[tuple[At, str, str, dict[str, Any]]]:
    """Place, task, split and scores of each subset of an mteb result; what is not shown is None.

    Raises:
        ValueError: it is not what mteb writes; says where.
    """
    content = read_json(path)
    task, scores = content["task_name"], content.get("scores")
    if not isinstance(task, str) or not isinstance(scores, dict):
        raise ValueError(f"{path} is no result of mteb: task_name must be a text, scores an object; evaluate again.")
    for split, subsets in scores.items():
        if not isinstance(subsets, list) or not all(isinstance(one, dict) for one in subsets):
            raise ValueError(f"{path} is no result of mteb: scores.{split} must be a list of objects; evaluate again.")
        for place, one in enumerate(subsets):
            if "main_score" not in one or not isinstance(one.get("hf_subset", ""), str):
                raise ValueError(
                    f"{path} is no result of mteb: main_score is missing from scores.{split}, or hf_subset is no text; "
                    "evaluate again."
                )
            told = {**dict.fromkeys([*SHOWN, "separability_histogram"]), **one}
            yield At(path) / "scores" / split / place, task, split, told


def _drawable(path: Path, histogram: Any) -> Histogram:
    """A histogram of `evaluation.tasks.task.score`.

    Raises:
        ValueError: it is none; names the file.
    """
    try:
        histogram_chart("", histogram)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: separability_histogram cannot be drawn ({error}); evaluate again.") from error
    return dict(histogram)


def _is_of(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether the ``model_meta.json`` beside a result names this very model; without one the caller knows.

    ``...-plain`` is the same model as mteb itself would ask it: with text alone.
    """
    meta = path.parent / "model_meta.json"
    if not meta.is_file():
        return True
    told = read_object(meta)
    if told.get("revision") == checkpoint.digest and not str(told.get("name")).endswith("-plain"):
        return True
    logger.warning("%s is left out: it is about %s, revision %s.", path, told.get("name"), told.get("revision"))
    return False


# --- of before -------------------------------------------------------------------------------------------------------


def _earlier(path: Path, content: Any, checkpoint: Checkpoint) -> list[Found]:
    """A file of before, for the shipped `mini` alone.

    Raises:
        ValueError: it is broken; names it.
    """
    if not checkpoint.untouched or checkpoint.shipped != "mini":
        logger.warning("%s is left out: it is about the shipped mini.", path)
        return []
    try:
        return [EARLIER[path.stem](path, content)]
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} has not the form of its command's results ({error!r}); measure again.") from error
