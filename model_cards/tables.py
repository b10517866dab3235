"""Tables and values of a card, each of which knows the place that it was read from.

Room: Evaluation -> **Card**. Unusual: a cell keeps the value of every seed beside its place; the trace reads it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.reports import one_unit
from .trace import At

Histogram = Mapping[str, Sequence[float]]  # "edges", and the counts "positive" and "negative" between them


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
        at: of the whole table; its ``title`` and ``notes`` stand below.
        names: where the words of a row's or column's name, and of the unit, stand.
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
    names: Mapping[str, Sequence[At]] = field(default_factory=dict)

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
        metrics: for the card's metadata.
        histograms: of the cosines of positives and of random negatives, by row and column.
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
    histograms: Mapping[str, Mapping[str, Histogram]] = field(default_factory=dict)


def picture_beside(path: Path) -> Path | None:
    """The SVG of a result file, where its command drew one."""
    svg = path.with_suffix(".svg")
    return svg if svg.is_file() else None
