"""Lines of a benchmark as a picture: ours and its peers as bars, a group for each figure of each case; SVG or PNG.

Unusual: every group has its own scale, since seconds, items and bytes stand beside each other; the value is written at
each bar. Only what has a peer and a unit is drawn. No plotting library.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .figures import KEYS

WIDTH, LONGEST, LEFT = 980, 520, 16  # pixels: of the picture, of the longest bar, of the margin
BAR, STEP, LETTER = 14, 18, 6.4
OURS, PEER = "#3366aa", "#bbbbbb"
ENDINGS = (".svg", ".png")


class Box(NamedTuple):
    """A bar."""

    x: float
    y: float
    width: float
    color: str


class Words(NamedTuple):
    """A line of text; ``y`` is its top."""

    x: float
    y: float
    said: str


def draw_file(lines: Path, out: Path) -> None:
    """Draw the lines of a JSON-lines file.

    Raises:
        ValueError: `read_figures`, `draw`.
    """
    draw(read_figures(lines), out)


def read_figures(lines: Path) -> list[dict[str, Any]]:
    """The figures of a JSON-lines file.

    Raises:
        ValueError: a line is no figure.
    """
    figures = []
    try:
        text = lines.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{lines} holds no lines of figures; it is not text.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{lines}, line {number} is not JSON ({error}); remove it, or name another file."
            ) from error
        if not isinstance(found, dict) or set(KEYS) - set(found):
            raise ValueError(f"{lines}, line {number} is no figure: it must have {', '.join(KEYS)}.")
        figures.append(found)
    return figures


def draw(figures: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Draw figures; of one that is there several times, the last counts.

    Raises:
        ValueError: nothing to draw; the ending is neither .svg nor .png.
    """
    check_ending(out)
    shapes, height = laid_out(grouped(figures))
    out.parent.mkdir(parents=True, exist_ok=True)
    (write_svg if out.suffix.lower() == ".svg" else write_png)(shapes, height, out)


def check_ending(out: Path) -> None:
    """Refuse a name that is no picture's.

    Raises:
        ValueError: the ending is neither .svg nor .png.
    """
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"{out}: pictures are .svg or .png.")


def drawable(figure: Mapping[str, Any]) -> bool:
    """Whether a figure has a peer, and a unit to compare in."""
    return figure["peer"] is not None and bool(figure["unit"])


def grouped(figures: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Case to figure and unit to bars: "ours", and each peer by its name.

    Raises:
        ValueError: there is nothing with a peer and a unit.
    """
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for one in figures:
        if not drawable(one):
            continue
        case = cases.setdefault(f"{one['benchmark']}: {one['case']}", {})
        bars = case.setdefault(f"{one['figure']} ({one['unit']})", {})
        bars |= {"ours": float(one["ours"]), str(one["peer_name"]): float(one["peer"])}
    if not cases:
        raise ValueError("There is no figure with a peer and a unit to draw.")
    return cases


def laid_out(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[list[Box | Words], float]:
    """Bars and words in pixels, and the height of all."""
    shapes: list[Box | Words] = [
        Words(LEFT, 10, "Blue: ours. Grey: peers in the same run. Each group has its own scale.")
    ]
    y = 34.0
    for case, groups in cases.items():
        shapes.append(Words(LEFT, y, case))
        y += 22
        for name, bars in groups.items():
            shapes.append(Words(LEFT + 12, y, name))
            y += 18
            shapes += _bars(bars, y)
            y += STEP * len(bars) + 8
    return shapes, y + 10


def _bars(bars: Mapping[str, float], y: float) -> Iterator[Box | Words]:
    longest = max(*bars.values(), 1e-12)
    for place, (name, value) in enumerate(bars.items()):
        width = LONGEST * max(value, 0) / longest
        top = y + STEP * place
        yield Box(LEFT + 24, top, max(width, 1), OURS if name == "ours" else PEER)
        yield Words(LEFT + 30 + width, top, f"{value:.4g}  {name}")


def _width(shapes: Iterable[Box | Words]) -> int:
    ends = [shape.x + LETTER * len(shape.said) for shape in shapes if isinstance(shape, Words)]
    return int(max(WIDTH, *ends) + LEFT)


def write_svg(shapes: list[Box | Words], height: float, out: Path) -> None:
    """As SVG."""
    inside = []
    for shape in shapes:
        if isinstance(shape, Box):
            box = f"x='{shape.x:.1f}' y='{shape.y:.1f}' width='{shape.width:.1f}' height='{BAR}'"
            inside.append(f"<rect {box} fill='{shape.color}'/>")
        else:
            said = html.escape("".join(letter if letter.isprintable() else " " for letter in shape.said))
            inside.append(f"<text x='{shape.x:.1f}' y='{shape.y + 11:.1f}'>{said}</text>")
    size = f"width='{_width(shapes)}' height='{height:.0f}' font-family='sans-serif' font-size='12'"
    background = "<rect width='100%' height='100%' fill='#fff'/>"
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' {size}>{background}{''.join(inside)}</svg>\n"
    out.write_text(svg, encoding="utf-8")


def write_png(shapes: list[Box | Words], height: float, out: Path) -> None:
    """As PNG, with Pillow's own letters, twice as fine."""
    scale = 2
    canvas = Image.new("RGB", (scale * _width(shapes), int(scale * height)), "#ffffff")
    pen, letters = ImageDraw.Draw(canvas), ImageFont.load_default(12 * scale)
    for shape in shapes:
        x, y = scale * shape.x, scale * shape.y
        if isinstance(shape, Box):
            pen.rectangle((x, y, x + scale * shape.width, y + scale * BAR), fill=shape.color)
        else:
            pen.text((x, y), shape.said, fill="#000000", font=letters)
    canvas.save(out)
