"""One line of a benchmark's report."""

from __future__ import annotations

from typing import Any

KEYS = ("benchmark", "case", "figure", "unit", "ours", "peer", "peer_name", "ratio")


def figure(
    benchmark: str, case: str, name: str, unit: str, ours: float, peer: float | None, peer_name: str
) -> dict[str, Any]:
    """A dict with the `KEYS` that every benchmark prints; ``ratio`` is ours over the peer's, if that is not 0."""
    values = (
        benchmark,
        case,
        name,
        unit,
        float(f"{ours:.4g}"),
        None if peer is None else float(f"{peer:.4g}"),
        peer_name,
        None if not peer else float(f"{ours / peer:.3g}"),
    )
    return dict(zip(KEYS, values, strict=True))
