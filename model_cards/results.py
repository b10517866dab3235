"""Result files as tables whose every cell knows its place: reports, mteb's, and what was measured before reports.

Room: Evaluation -> **Card**. Unusual: a file that is about another model is left out, and said so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.reports import is_report, one_unit, read_report
from .checkpoint import Checkpoint
from .trace import EVERY, At, read_json, values_at

logger = logging.getLogger(__name__)

FIRST = ("retrieval", "mteb", "peers", "ladder", "robustness")  # known keys, in a good order; others follow by name
BESIDE = ("model_meta.json", "summary.json")  # what lies beside mteb's results
HEADINGS = {"peers": "Beside its peers", "ladder": "The ablation ladder", "robustness": "Robustness and cost"}
LAST = ("recipe_comparison", "progressive", "balance", "cre", "benchmarks")


@dataclass(frozen=True)
class Cell:
    """The values of each seed, and where they stand."""

    values: list[float]
    at: At


@dataclass(frozen=True)
class Table:
    """A table of a result file.

    Attributes:
        key: as claims name it.
        title, unit, notes, higher_is_better: as in a report.
        columns: their order.
        rows: cells by row and column.
        at: of the whole table; its names and notes stand below.
        names: where the name of a row stands, if elsewhere.
        chart: columns to draw; all of one unit by default.
    """

    key: str
    title: str
    unit: str
    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, Cell]]
    at: At
    notes: Sequence[str] = ()
    higher_is_better: bool = True
    chart: Sequence[str] | None = None
    names: Mapping[str, At] = field(default_factory=dict)

    def content(self, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """As `reports.markdown_table` and `bar_chart` take it, with these columns or all."""
        kept = list(self.columns if columns is None else columns)
        rows = {
            row: {column: cells[column].values for column in kept if column in cells}
            for row, cells in self.rows.items()
        }
        form = {"title": self.title, "unit": self.unit, "higher_is_better": self.higher_is_better}
        return {**form, "columns": kept, "rows": {row: cells for row, cells in rows.items() if cells}}

    @property
    def drawn(self) -> Sequence[str]:
        """Columns that a picture of the table has."""
        if self.chart is not None:
            return self.chart
        return self.columns if one_unit({"unit": self.unit}) and len(self.columns) > 1 else ()


@dataclass(frozen=True)
class Metric:
    """A value of the card's metadata, of this very checkpoint: see `huggingface_hub.EvalResult`."""

    task_type: str
    dataset: str
    subset: str
    name: str
    at: At


@dataclass(frozen=True)
class Found:
    """A result file, or several of a kind.

    Attributes:
        key: the file's name without its ending.
        heading, about: what stands above the tables; ``about_at`` is where it was read, None where it is our own prose.
        command: that measures it again.
        where: ``machine``, ``versions`` and ``date`` of a report.
        picture: an SVG that lies beside the file, in place of charts.
    """

    key: str
    heading: str
    about: str
    tables: Sequence[Table]
    files: Sequence[Path]
    about_at: At | None = None
    command: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    metrics: Sequence[Metric] = ()


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
            elif path.stem in EARLIER and (checkpoint.untouched and checkpoint.shipped == "mini"):
                found.append(EARLIER[path.stem](path, content))
            elif not is_mteb(content) and path.name not in BESIDE:
                logger.warning("%s is left out: no report, or not about this model.", path)
        mteb += [path for path in sorted(folder.rglob("*.json")) if is_mteb(read_json(path))]
    found += _mteb(mteb, checkpoint)
    order = {key: place for place, key in enumerate((*FIRST, None, *LAST))}
    return sorted(found, key=lambda one: (order.get(one.key, order[None]), one.key))


def _report(path: Path, checkpoint: Checkpoint) -> list[Found]:
    content = read_report(path)
    model = content["model"]
    if model is not None and not checkpoint.is_meant(model):
        logger.warning("%s is left out: it is about %s with other weights; measure again.", path, model["name"])
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
        tables.append(Table(key=key, rows=rows, at=place, **parts))
    where = {name: content[name] for name in ("machine", "versions", "date")}
    heading = HEADINGS.get(path.stem, path.stem.replace("_", " ").capitalize())
    about, command = content["about"], content["command"]
    return [Found(path.stem, heading, about, tables, [path], at / "about", command, where, _beside(path))]


def _beside(path: Path) -> Path | None:
    svg = path.with_suffix(".svg")
    return svg if svg.is_file() else None


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
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "task" in row for row in rows) or not rows:
        return []
    return [_retrieval(rows, at, path)]


def _retrieval(rows: list[dict[str, Any]], at: At, path: Path) -> Found:
    names = {"queries": "queries", "candidates": "candidates"}
    for k in (1, 10):
        names |= {f"R@{k}": f"model R@{k}", f"linear baseline R@{k}": f"linear R@{k}"}
    cells = {
        row["task"]: {
            column: Cell([float(row[name])], at / place / name) for column, name in names.items() if name in row
        }
        for place, row in enumerate(rows)
    }
    columns = [column for column in names if any(column in one for one in cells.values())]
    drawn = [column for column in columns if column.endswith("R@10")]
    table = Table("retrieval", "Names that no training saw", "", columns, cells, at, chart=drawn)
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
    ]
    about = (
        "Pictures and recorded speech look for names, names for items; beside it a linear map from the frozen towers."
    )
    command = "python -m modeling_sail.evaluation.tuxpaint_retrieval --model build/mini"
    return Found("retrieval", "Retrieval of held-out names", about, [table], [path], None, command, metrics=metrics)


# --- mteb -----------------------------------------------------------------------------------------------------------

SHOWN = (
    "main_score",
    "recall_at_1",
    "recall_at_10",
    "recall_at_50",
    "recall_at_100",
    "ndcg_at_10",
    "auc",
    "average_precision",
)


def is_mteb(content: Any) -> bool:
    """Whether a JSON file is an mteb ``TaskResult``."""
    return isinstance(content, dict) and "task_name" in content and isinstance(content.get("scores"), dict)


def _mteb(paths: Sequence[Path], checkpoint: Checkpoint) -> list[Found]:
    """One table for all tasks: a row for each task, split and subset."""
    rows: dict[str, dict[str, Cell]] = {}
    metrics, kept, names = [], [], {}
    for path in paths:
        if not _is_of(path, checkpoint):
            continue
        content = read_json(path)
        kept.append(path)
        for split, scores in content["scores"].items():
            for place, one in enumerate(scores):
                subset = one.get("hf_subset", "default")
                parts = [part for part in (split, subset) if part not in ("test", "default")]
                name = ": ".join([content["task_name"], *parts])
                names[name], at = At(path), At(path) / "scores" / split / place
                rows[name] = {key: Cell([float(one[key])], at / key) for key in SHOWN if key in one}
                kind = "retrieval" if "recall_at_1" in one else "pair-classification"
                metrics.append(Metric(kind, content["task_name"], subset, "main_score", at / "main_score"))
    if not rows:
        return []
    columns = [key for key in SHOWN if any(key in cells for cells in rows.values())]
    table = Table("mteb", "Tasks", "", columns, rows, At(kept[0]), names=names)
    return [Found("mteb", "Tasks of mteb", "", [table], kept, None, "sail evaluate", metrics=metrics)]


def _is_of(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether the ``model_meta.json`` beside a result names this very model; without one the caller knows.

    ``...-plain`` is the same model as mteb itself would ask it: with text alone.
    """
    meta = path.parent / "model_meta.json"
    if not meta.is_file():
        return True
    told = read_json(meta)
    if told.get("revision") == checkpoint.digest and not str(told.get("name")).endswith("-plain"):
        return True
    logger.warning("%s is left out: it is about %s, revision %s.", path, told.get("name"), told.get("revision"))
    return False


# --- what was measured before reports had a form, all of it on `mini` or beside it ----------------------------------


def _recipes(heading: str, about: str, names: str) -> Callable[[Path, Any], Found]:
    """``{recipe: {seed: [{"task", "model R@10", ...}]}}`` of recipe_comparison.py."""

    def read(path: Path, content: Any) -> Found:
        tasks = [row["task"] for row in next(iter(next(iter(content.values())).values()))]
        rows = {
            task: {recipe: _cell(path, content, recipe, EVERY, place, "model R@10") for recipe in content}
            for place, task in enumerate(tasks)
        }
        table = Table("recipes", "Retrieval of held-out names", "Recall@10", list(content), rows, At(path))
        command = f"python -m modeling_sail.evaluation.recipe_comparison {names}"
        return Found(path.stem, heading, about, [table], [path], None, command, picture=_beside(path))

    return read


def _cell(path: Path, content: Any, *steps: str | int) -> Cell:
    return Cell(values_at(content, steps), At(path, steps))


QUESTIONS = {
    "sequences": ("Sequence tests (§4.3): what comes next", ("vanilla", "filtered")),
    "cold start": ("Items that nothing has learned of", ("unseen",)),
    "copairs": ("Items that the same users chose", ("copairs",)),
    "i2i": ("Neighbours by behaviour and by content", ("ID-i2i", "content-i2i")),
}


def _behaviour(path: Path, content: Any) -> Found:
    first = next(iter(content.values()))
    tables = []
    for key, (title, begins) in QUESTIONS.items():
        asked = dict.fromkeys(name for row in first["table"].values() for name in row if name.startswith(begins))
        rows = {
            who: {name: _cell(path, content, EVERY, "table", who, name) for name in asked if name in found}
            for who, found in first["table"].items()
        }
        tables.append(
            Table(key, title, "", list(asked), {who: cells for who, cells in rows.items() if cells}, At(path))
        )
    ranked = {
        f"{question}, {features}": {
            name: _cell(path, content, EVERY, "ranker", question, features, name.lower()) for name in ("AUC", "GAUC")
        }
        for question, sets in first["ranker"].items()
        for features in sets
    }
    tables.append(Table("ranker", "A fixed ranker downstream", "", ["AUC", "GAUC"], ranked, At(path)))
    about = (
        "MovieLens, with films set aside that nothing learns from. `before` is this model; the stages `content`, "
        "`seq2item` and `id2item` (§3.3.5) follow each other; other rows are recommenders beside them."
    )
    command = "python -m modeling_sail.evaluation.cre --model build/mini"
    return Found(path.stem, "What behaviour does to it", about, tables, [path], None, command, picture=_beside(path))


def _balance(path: Path, content: Any) -> Found:
    rows = {
        name: {
            **{one: _cell(path, content, "scores", row, column) for column, one in enumerate(content["benchmarks"])},
            "weight": _cell(path, content, "weights", name),
        }
        for row, name in enumerate(content["datasets"])
    }
    table = Table(
        "balance",
        "Nearness to the validation sets, and weights",
        "",
        [*content["benchmarks"], "weight"],
        rows,
        At(path),
    )
    about = "How often `balance` (§3.1.3) would draw each source."
    return Found(
        path.stem,
        "Weights of the sources",
        about,
        [table],
        [path],
        None,
        "sail balance mini-progressive",
        picture=_beside(path),
    )


def _benchmarks(path: Path, content: Any) -> Found:
    rows: dict[str, dict[str, Cell]] = {}
    names = {}
    for place, line in enumerate(content):
        if line["benchmark"] in ("encode", "exact"):  # the others are about training
            beside = f", beside {line['peer_name']}" if line["peer_name"] else ""
            name = f"{line['case']}: {line['figure']}{beside}"
            columns, names[name] = ("ours", "peer"), At(path) / place
            rows[name] = {key: _cell(path, content, place, key) for key in columns if line[key] is not None}
    table = Table("speed", "Encoding", "", ["ours", "peer"], rows, At(path), names=names)
    command = "; ".join(
        f"python -m modeling_sail.evaluation.benchmarks {one} --model build/mini" for one in ("encode", "exact")
    )
    return Found(path.stem, "How fast, how exact", "", [table], [path], None, command)


EARLIER: dict[str, Callable[[Path, Any], Found]] = {
    "cre": _behaviour,
    "balance": _balance,
    "benchmarks": _benchmarks,
    "recipe_comparison": _recipes(
        "The full set of losses beside plain NCE",
        "One warm model, equal steps: `mini-plain` is NCE alone, `mini-full` has every term and a stage near the test.",
        "mini-plain mini-full",
    ),
    "progressive": _recipes(
        "Choosing the data, stage by stage",
        "Balanced, then near the validation sets, then with mined negatives; beside it this model's recipe.",
        "mini-progressive mini",
    ),
}
