"""Several pictures as one: a card has one file for all histograms of a report. It knows nothing of what they show.

Room: Evaluation -> **Card**.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def side_by_side(rows: Sequence[Sequence[str]]) -> str:
    """SVG pictures in rows, below each other, as one SVG.

    Args:
        rows: SVG texts that begin with their ``width`` and ``height`` in pixels.
    """
    inside, widest, top = [], 0, 0
    for row in rows:
        left, height = 0, 0
        for svg in row:
            size = [int(re.search(rf"\b{name}='(\d+)'", svg)[1]) for name in ("width", "height")]
            inside.append(svg.replace("<svg ", f"<svg x='{left}' y='{top}' ", 1))
            left, height = left + size[0], max(height, size[1])
        widest, top = max(widest, left), top + height
    return f"<svg xmlns='http://www.w3.org/2000/svg' width='{widest}' height='{top}'>{''.join(inside)}</svg>"
