"""What was measured before reports had a form (evaluation/reports.py), all of it on `mini` or beside it.

Room: Evaluation -> **Card**. Unusual: such a file does not say what it is about, so that only those in this package are
taken (results.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tables import Cell, Found, Table, picture_beside
from .trace import EVERY, At, values_at


def _recipes(heading: str, about: str, recipes: str) -> Callable[[Path, Any], Found]:
    """``{recipe: {seed: [{"task", "model R@10", ...}]}}`` of `comparison recipes`, once."""

    def read(path: Path, content: Any) -> Found:
        tasks = [row["task"] for row in next(iter(next(iter(content.values())).values()))]
        rows = {
            task: {recipe: _cell(path, content, recipe, EVERY, place, "model R@10") for recipe in content}
            for place, task in enumerate(tasks)
        }
        first = At(path) / next(iter(content)) / next(iter(next(iter(content.values()))))
        names = {task: (first / place / "task",) for place, task in enumerate(tasks)}
        names |= {recipe: (At(path) / recipe,) for recipe in content}
        columns = list(content)
        table = Table("recipes", "Retrieval of held-out names", "Recall@10", columns, rows, At(path), names=names)
        command = f"python -m modeling_sail.evaluation.comparison recipes {recipes}"
        return Found(path.stem, heading, about, [table], [path], None, command, picture=picture_beside(path))

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
    return Found(
        path.stem, "What behaviour does to it", about, tables, [path], None, command, picture=picture_beside(path)
    )


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
        picture=picture_beside(path),
    )


def _benchmarks(path: Path, content: Any) -> Found:
    rows: dict[str, dict[str, Cell]] = {}
    names = {}
    for place, line in enumerate(content):
        if line["benchmark"] in ("encode", "exact"):  # the others are about training
            beside = f", beside {line['peer_name']}" if line["peer_name"] else ""
            name = f"{line['case']}: {line['figure']}{beside}"
            names[name] = [At(path) / place / key for key in ("case", "figure", "peer_name")]
            rows[name] = {key: _cell(path, content, place, key) for key in ("ours", "peer") if line[key] is not None}
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
