"""One line of a benchmark's report."""

from __future__ import annotations

from typing import Any


def figure(
    benchmark: str, case: str, name: str, unit: str, ours: float, peer: float | None, peer_name: str
) -> dict[str, Any]:
    """A dict with the keys that every benchmark prints; ``ratio`` is ours over the peer's."""
    return {
        "benchmark": benchmark,
        "case": case,
        "figure": name,
        "unit": unit,
        "ours": float(f"{ours:.4g}"),
        "peer": None if peer is None else float(f"{peer:.4g}"),
        "peer_name": peer_name,
        "ratio": None if peer is None else float(f"{ours / peer:.3g}"),
    }
