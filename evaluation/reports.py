"""The one form of result files: what was measured, by which command, where, when, on which weights; tables of it.

Room: Evaluation -> **Card**. Unusual: a cell holds the value of every seed, never a mean, so that whoever reads a table
works out the spread himself; what is broken is refused when it is written, not when a card is made.
"""

from __future__ import annotations

import datetime
import hashlib
import html
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..training.files import write_json, write_text
from ..training.pages import page
from .charts import bar_chart as bar_chart  # the picture of a table
from .charts import histogram_chart

Cells = Mapping[str, Mapping[str, Sequence[float]]]  # rows, of columns, of one value a seed
# Rows, of columns, of "edges" and of the counts "positive" and "negative" between them.
Histograms = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "mteb",
    "numpy",
    "scikit-learn",
    "tokenizers",
    "faiss-cpu",
)
PARTS = ("about", "command", "machine", "versions", "date", "model", "tables")
MISSING = "–"
SIDES = ("positive", "negative")
EXPLAINED = (
    "<p>Cosines of queries with what answers them, upward, and with as many random candidates that do not, downward; "
    "shares of each, from -1 to 1. The less the two overlap, the better a threshold tells them apart.</p>"
)

# --- what is written down with every measurement --------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, threads of torch, memory in GiB; no name of the host."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide results, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_entry(folder: str | Path, name: str | None = None) -> dict[str, str]:
    """What a report says of the model that it is about: a card takes it for its own if the hash is its weights'.

    Args:
        folder: of a saved model.
        name: of the model; the folder's by default.

    Raises:
        FileNotFoundError: no ``model.safetensors`` there.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {folder}; `sail build --preset mini --out DIR` makes one.")
    return {"name": name or Path(folder).resolve().name, "hash": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the form -------------------------------------------------------------------------------------------------------


def table(
    title: str,
    unit: str,
    rows: Cells,
    *,
    seeds: Sequence[int],
    columns: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """A table of a report.

    Args:
        title: the heading.
        unit: of every cell, such as "Recall@50".
        rows: values by row and column, one a seed; one alone where the seed changes nothing. What was not measured is
            left out.
        seeds: in the order of the values.
        columns: their order; by default that in which the rows name them.
        notes: a sentence each, printed below.
        higher_is_better: what the best cell of a row is.

    Raises:
        ValueError: a column that is not named, no value, too many of them, or one that is no finite number.
    """
    named = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    made = {
        "title": title,
        "unit": unit,
        "columns": list(named if columns is None else columns),
        "rows": {row: {column: list(values) for column, values in cells.items()} for row, cells in rows.items()},
        "seeds": list(seeds),
        "notes": list(notes),
        "higher_is_better": higher_is_better,
    }
    check_table("the table", made)
    return made


def report(
    about: str,
    command: str,
    tables: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, str] | None = None,
    histograms: Histograms | None = None,
) -> dict[str, Any]:
    """A report as it is written: what was measured, with this machine, these versions and this day.

    Args:
        about: one sentence.
        command: that measures it again: ``python -m ...``.
        tables: by their keys; see `table`.
        model: whose results these are (`model_entry`); ``{"preset": "mini"}`` where several stand beside a shipped
            model; or None, and no card shows them.
        histograms: ``separability_histogram`` of scores by row and column, or None where there are none.

    Raises:
        ValueError: what `check_report` refuses.
    """
    made: dict[str, Any] = {
        "about": about,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "model": None if model is None else dict(model),
        "tables": {key: dict(one) for key, one in tables.items()},
    }
    if histograms is not None:
        made["histograms"] = {row: dict(cells) for row, cells in histograms.items()}
    check_report("the report", made)
    return made


def write_report(
    path: str | Path,
    about: str,
    command: str,
    tables: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, str] | None = None,
    histograms: Histograms | None = None,
) -> dict[str, Any]:
    """Write a report (see `report`), whole or not at all, and return it."""
    made = report(about, command, tables, model, histograms)
    write_json(Path(path), made)
    return made


def read_report(path: str | Path) -> dict[str, Any]:
    """A report that `write_report` wrote.

    Raises:
        FileNotFoundError: no such file. ValueError: no JSON, or another form; says where.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); measure again, or restore it.") from error
    check_report(str(path), content)
    return dict(content)


def is_report(content: Any) -> bool:
    """Whether a JSON file's content is meant as a report; other result files have no ``tables``."""
    return isinstance(content, dict) and "tables" in content


def check_report(name: str, content: Any) -> None:
    """Refuse what is no report.

    Args:
        name: of the file, for the message.
        content: what was read from it.

    Raises:
        ValueError: a part is missing or of another kind; says which.
    """
    if not isinstance(content, dict) or any(part not in content for part in PARTS):
        known = set(content) if isinstance(content, dict) else set()
        raise ValueError(f"{name} is no report: {', '.join(sorted(set(PARTS) - known))} missing; see reports.report.")
    for part in ("about", "command", "date"):
        if not isinstance(content[part], str) or not content[part].strip():
            raise ValueError(f"{name}: {part} is {content[part]!r}; a text is needed.")
    for part in ("machine", "versions", "tables"):
        if not isinstance(content[part], dict):
            raise ValueError(f"{name}: {part} is {type(content[part]).__name__}; an object is needed.")
    model = content["model"]
    if model is not None and not (
        isinstance(model, dict) and (set(model) == {"preset"} or {"name", "hash"} <= set(model))
    ):
        raise ValueError(
            f"{name}: model is {model!r}; null, preset, or name and hash are needed (reports.model_entry)."
        )
    for key, one in content["tables"].items():
        check_table(f"{name}: tables.{key}", one)
    _check_histograms(name, content.get("histograms", {}))


def _check_histograms(name: str, content: Any) -> None:
    try:
        for row, cells in content.items():
            for column, one in cells.items():
                histogram_chart(f"{name}: histograms, {row}, {column}", one)  # refuses what cannot be drawn
    except (AttributeError, KeyError, TypeError) as error:
        needed = "rows, of columns, of edges and of counts, positive and negative"
        raise ValueError(f"{name}: histograms are no {needed} ({type(error).__name__}: {error}).") from error


def check_table(name: str, content: Any) -> None:
    """Refuse what is no table; as `check_report`."""
    needed = {"title": str, "unit": str, "columns": list, "rows": dict, "seeds": list, "notes": list}
    for part, kind in {**needed, "higher_is_better": bool}.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), kind):
            raise ValueError(f"{name}: {part} must be of the type {kind.__name__}; see reports.table.")
    for row, cells in content["rows"].items():
        for column, values in cells.items():
            if column not in content["columns"]:
                raise ValueError(f"{name}: row {row!r} has a column {column!r}; there are {content['columns']}.")
            _check_values(f"{name}: {row!r}, {column!r}", values, len(content["seeds"]))


def _check_values(name: str, values: Any, seeds: int) -> None:
    numbers = isinstance(values, list) and values and all(_is_number(value) for value in values)
    if not numbers or len(values) not in (1, seeds):
        raise ValueError(
            f"{name} holds {values!r}; {seeds} finite numbers are needed, one a seed, or a single one; "
            "leave a cell out that was not measured."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- histograms -----------------------------------------------------------------------------------------------------


def pooled(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """One histogram of several over the same edges: their counts added."""
    counts = {side: [sum(bins) for bins in zip(*(one[side] for one in parts), strict=True)] for side in SIDES}
    return {"edges": list(parts[0]["edges"]), **counts}


def write_histograms(path: str | Path, title: str, histograms: Histograms) -> Path:
    """A page with a picture for each histogram, by row and column; in it, positives go up and negatives down."""
    parts = [
        f"<h2>{html.escape(row)}</h2>" + " ".join(histogram_chart(column, one) for column, one in cells.items())
        for row, cells in histograms.items()
    ]
    write_text(Path(path), page(title, EXPLAINED, *parts))
    return Path(path)


# --- tables as Markdown ---------------------------------------------------------------------------------------------


def half_range(values: Sequence[float]) -> float | None:
    """Half the distance of the extremes; None of one value, which has no spread."""
    return (max(values) - min(values)) / 2 if len(values) > 1 else None


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and half the distance of the extremes."""
    shown, half = written(statistics.mean(values), digits), half_range(values)
    return shown if half is None else f"{shown} ±{written(half, digits)}"


def written(value: float, digits: int) -> str:
    """A number with so many decimals and commas at the thousands; in scientific notation where ``digits`` is -1."""
    return f"{value:.1e}" if digits < 0 else f"{value:,.{digits}f}"


def digits_for(values: Sequence[float]) -> int:
    """Decimals that tell values apart: three below 2, none from 1,000 on or where all are whole, -1 of tiny ones."""
    most = max((abs(value) for value in values), default=0.0)
    if most >= 2 and all(float(value).is_integer() for value in values):
        return 0
    if 0 < most < 0.001:
        return -1
    return next((digits for limit, digits in ((2, 3), (20, 2), (1000, 1)) if most < limit), 0)


def cell_digits(content: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Decimals of each cell of a table: those of its column, or of its row where a column mixes seconds and shares, or
    several units of which some would be 0.
    """
    found = {}
    for column in content["columns"]:
        cells = {row: one[column] for row, one in content["rows"].items() if column in one}
        every = [abs(value) for values in cells.values() for value in values if value]
        common = digits_for([value for values in cells.values() for value in values])
        alike = not every or max(every) < 1e5 * min(every)
        if alike and every and not one_unit(content):
            alike = min(every) >= 0.5 * 10.0 ** -max(common, 0)
        for row in cells:
            beside = [value for values in content["rows"][row].values() for value in values]
            found[row, column] = common if alike else digits_for(beside)
    return found


def markdown_table(
    content: Mapping[str, Any],
    *,
    cell: Callable[[str, str, Sequence[float], int], str] | None = None,
    name: Callable[[str], str] = str,
) -> str:
    """A table as Markdown: mean and half the distance of the extremes; the best mean of a row in bold.

    Args:
        content: a table of a report.
        cell: writes a cell, from row, column, values and decimals; `spread` by default.
        name: writes a row's or a column's name.
    """
    write = cell or (lambda row, column, values, digits: spread(values, digits))
    digits, columns = cell_digits(content), content["columns"]
    head = f"| {name(content['unit'])} | " + " | ".join(map(name, columns)) + " |"
    lines = [head, "|---" * (len(columns) + 1) + "|"]
    for row, cells in content["rows"].items():
        best = _best(cells, content["higher_is_better"]) if one_unit(content) else ()
        parts = [
            f"**{text}**" if column in best else text
            for column in columns
            for text in [write(row, column, cells[column], digits[row, column]) if column in cells else MISSING]
        ]
        lines.append(f"| {name(row)} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def one_unit(content: Mapping[str, Any]) -> bool:
    """Whether all cells share a unit, so that columns may be compared; a table with ``unit=""`` mixes several."""
    return bool(content["unit"])


def _best(cells: Mapping[str, Sequence[float]], higher: bool) -> set[str]:
    means = {column: statistics.mean(values) for column, values in cells.items()}
    best = (max if higher else min)(means.values())
    found = {column for column, mean in means.items() if mean == best}
    return found if len(found) < len(means) else set()
