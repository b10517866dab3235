"""Tables and histograms as pictures: bars with whiskers, mirrored bars; SVG, no plotting library, nothing of ours."""

from __future__ import annotations

import html
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Cells = Mapping[str, Mapping[str, Sequence[float]]]  # rows, of columns, of one value a seed

BAR, STEP, HEIGHT = 22, 26, 200  # pixels: width of a bar, from bar to bar, height of the plot
LEFT, TOP, LETTER = 48, 44, 6.6
BACKGROUND = "<rect width='100%' height='100%' fill='#fff'/>"
BIN, SIDE = 6, 70  # pixels: width of a bin, height of either side of a histogram
MIRRORED = {"positives": "#69c", "random negatives": "#bbb"}
PALETTE = ("#bbb", "#777", "#69c", "#c33", "#393", "#c93", "#86b", "#366", "#a63", "#333")


def bar_chart(content: Mapping[str, Any], *, colors: Mapping[str, str] | None = None) -> str:
    """A table as SVG: a group of bars for each row, one for each column, whiskers to the extremes of the seeds.

    Args:
        content: a table of a report.
        colors: of the columns; a fixed palette by default.

    Raises:
        ValueError: nothing to draw.
    """
    rows, columns = content["rows"], content["columns"]
    values = [value for cells in rows.values() for found in cells.values() for value in found]
    if not values:
        raise ValueError(f"There is no value in the table {content['title']!r} to draw.")
    colors = colors or {column: PALETTE[place % len(PALETTE)] for place, column in enumerate(columns)}
    low, high, tick = axis(min(values), max(values))
    group = _group_width(rows, len(columns))
    end = LEFT + group * len(rows)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    grid = [
        _line(LEFT - 8, end, y(at), y(at), "#ddd") + _text(4, y(at) + 4, f"{at:.6g}") for at in ticks(low, high, tick)
    ]
    bars, labels = [], []
    for place, (row, cells) in enumerate(rows.items()):
        left = LEFT + place * group
        bars += [_bar(left + STEP * columns.index(column), y, cells[column], colors[column]) for column in cells]
        labels.append(textwrap.wrap(row, max(8, int((group - 6) / LETTER))))
        bars += [_text(left, TOP + HEIGHT + 18 + 14 * number, line) for number, line in enumerate(labels[-1])]
    bottom = TOP + HEIGHT + 24 + 14 * max(map(len, labels))
    legend, below = _legend(columns, colors, end)
    heading = " – ".join(part for part in (content["title"], content["unit"]) if part)
    titled = [f"<title>{_escaped(heading)}</title>", BACKGROUND, _text(4, 16, heading)]
    size = f"width='{max(end, LETTER * len(heading)) + 20:.0f}' height='{bottom + below:.0f}'"
    inside = "".join([*titled, *grid, *bars, f"<g transform='translate(0,{bottom})'>{legend}</g>"])
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='12'>{inside}</svg>"


def histogram_chart(title: str, histogram: Mapping[str, Sequence[float]]) -> str:
    """Two histograms over the same bins as SVG: positives upward, negatives downward, as shares of their side.

    Args:
        title: the heading.
        histogram: "edges" of B + 1 values, rising; counts "positive" and "negative", B each.

    Raises:
        ValueError: lengths do not fit, or a side has nothing.
    """
    edges, sides = histogram["edges"], [histogram["positive"], histogram["negative"]]
    if any(len(side) != len(edges) - 1 or not sum(side) for side in sides):
        lengths = [len(side) for side in sides]
        raise ValueError(f"{title}: {len(edges)} edges, bins {lengths}: one less than edges, with a count, are needed.")
    shares = [[count / sum(side) for count in side] for side in sides]
    scale = SIDE / max(map(max, shares))
    zero, bottom = TOP + SIDE, TOP + 2 * SIDE
    bars = []
    for side, color, sign in zip(shares, MIRRORED.values(), (1, 0), strict=True):
        bars += [
            f"<rect x='{LEFT + BIN * place}' y='{zero - sign * scale * share:.1f}' width='{BIN}' "
            f"height='{scale * share:.1f}' fill='{color}'/>"
            for place, share in enumerate(side)
            if share
        ]
    end = LEFT + BIN * len(shares[0])
    below = [_text(x - 8, bottom + 16, f"{at:g}") for x, at in ((LEFT, edges[0]), (end, edges[-1]))]
    middle = (edges[0] + edges[-1]) / 2
    below.append(_text((LEFT + end) / 2 - 4, bottom + 16, f"{middle:g}"))
    legend, height = _legend(list(MIRRORED), MIRRORED, end)
    size = f"width='{max(end + 20, LETTER * len(title) + 8):.0f}' height='{bottom + 26 + height:.0f}'"
    frame = _line(LEFT, end, zero, zero, "#000")
    inside = f"{BACKGROUND}{_text(4, 16, title)}{''.join(bars)}{frame}{''.join(below)}"
    legend = f"<g transform='translate(0,{bottom + 26})'>{legend}</g>"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='12'>{inside}{legend}</svg>"
    )


def axis(low: float, high: float) -> tuple[float, float, float]:
    """Ends and step of an axis that holds zero and the values: the step is 1, 2 or 5 times a power of ten."""
    low, high = min(low, 0.0), max(high, 0.0)
    rough = ((high - low) or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9) or step, step


def ticks(low: float, high: float, step: float) -> list[float]:
    """Values of an axis that get a line."""
    return [low + step * number for number in range(round((high - low) / step) + 1)]


def _group_width(rows: Cells, bars: int) -> float:
    longest = max(len(row) for row in rows)
    return max(STEP * bars + 30, min(LETTER * longest + 12, 170))


def _bar(left: float, y: Callable[[float], float], values: Sequence[float], color: str) -> str:
    top, zero = y(statistics.mean(values)), y(0.0)
    box = f"y='{min(top, zero):.1f}' height='{abs(zero - top):.1f}'"
    whisker = _line(left + BAR / 2, left + BAR / 2, y(min(values)), y(max(values)), "#000") if len(values) > 1 else ""
    return f"<rect x='{left:.0f}' {box} width='{BAR}' fill='{color}'/>{whisker}"


def _legend(columns: Sequence[str], colors: Mapping[str, str], end: float) -> tuple[str, float]:
    """The columns' names beside their colours, and how many pixels they take."""
    x, y, parts = float(LEFT), 0.0, []
    for column in columns:
        width = 26 + LETTER * len(column)
        if x > LEFT and x + width > max(end, 400):
            x, y = float(LEFT), y + 18
        parts.append(f"<rect x='{x:.0f}' y='{y:.0f}' width='12' height='12' fill='{colors[column]}'/>")
        parts.append(_text(x + 16, y + 11, column))
        x += width
    return "".join(parts), y + 24


def _line(x1: float, x2: float, y1: float, y2: float, color: str) -> str:
    return f"<line x1='{x1:.1f}' x2='{x2:.1f}' y1='{y1:.1f}' y2='{y2:.1f}' stroke='{color}'/>"


def _text(x: float, y: float, said: str) -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}'>{_escaped(said)}</text>"


def _escaped(said: str) -> str:
    """For XML, which knows no control characters."""
    return html.escape("".join(letter if letter.isprintable() else " " for letter in said))
