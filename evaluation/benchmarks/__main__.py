"""``python -m modeling_sail.evaluation.benchmarks NAME``: JSON lines, each figure beside its peer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .cache import cache_benchmark
from .child import ALLOCATORS
from .encode import encode_benchmark
from .exact import exact_benchmark
from .loss import loss_benchmark
from .mine import CASES, mine_benchmark


def main() -> None:
    """Run one benchmark and print its figures as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    parser.add_argument(
        "--default-allocator", action="store_true", help="leave out the runs in which glibc keeps memory"
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    encode = benchmarks.add_parser("encode", help="ragged items: token-budget batches beside fixed ones")
    encode.add_argument("--model", type=Path, required=True)
    encode.add_argument("--items", type=int, default=256)
    exact = benchmarks.add_parser("exact", help="an item alone and in a batch, float32 and bfloat16")
    exact.add_argument("--model", type=Path, required=True)
    loss = benchmarks.add_parser("loss", help="the memory-linear NCE beside the dense one")
    loss.add_argument("--size", type=int, default=16_384, help="B")
    cache = benchmarks.add_parser("cache", help="cached gradients beside direct backward and sentence-transformers")
    cache.add_argument("--size", type=int, default=2048, help="B, in pairs")
    mine = benchmarks.add_parser("mine", help="lambda* and hard negatives beside the bare product and the peer's miner")
    mine.add_argument("--size", type=int, default=20_000, help="pairs")
    mine.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    allocators = dict(list(ALLOCATORS.items())[:1]) if args.default_allocator else ALLOCATORS
    if args.benchmark == "encode":
        figures = encode_benchmark(args.model, args.items, args.rounds)
    elif args.benchmark == "exact":
        figures = exact_benchmark(args.model)
    elif args.benchmark == "mine":
        figures = mine_benchmark(args.size, args.rounds, allocators, args.case)
    else:
        figures = {"loss": loss_benchmark, "cache": cache_benchmark}[args.benchmark](args.size, args.rounds, allocators)
    for line in map(json.dumps, figures):
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
