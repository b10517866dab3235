"""``python -m modeling_sail.evaluation.benchmarks encode --model DIR``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .encode import encode_benchmark

BENCHMARKS = {"encode": encode_benchmark}


def main() -> None:
    """Run one benchmark and print its figures as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for figure in BENCHMARKS[args.benchmark](args.model, args.items, args.rounds):
        print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
