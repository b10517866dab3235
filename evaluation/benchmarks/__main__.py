"""``python -m modeling_sail.evaluation.benchmarks NAME``: JSON lines, each figure beside its peer, and their picture.

A benchmark is one entry of `BENCHMARKS`: what it is for, a function from the arguments to lines, and its arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .bulk import bulk_benchmark, ray_benchmark
from .cache import cache_benchmark
from .child import ALLOCATORS
from .compiled import compile_benchmark
from .encode import KINDS, encode_benchmark
from .exact import exact_benchmark
from .gpu import MODES, PRESETS, gpu_benchmark
from .index import DEFAULT, index_benchmark
from .index import KINDS as INDEXES
from .items import MIXES
from .loss import loss_benchmark
from .mine import CASES, mine_benchmark
from .parts import parts_benchmark
from .picture import ENDINGS, check_ending, draw, draw_file, drawable, read_figures
from .train import PAIRS, train_benchmark

Arguments = Mapping[str, Mapping[str, Any]]

MODEL: Mapping[str, Any] = {"type": Path, "required": True, "help": "folder of a model"}
MADE: Mapping[str, Any] = {"type": int, "help": "made up: text, some pictures and sounds"}
REAL: Mapping[str, Any] = {"type": Path, "nargs": "*", "default": [], "help": "JSONL files or folders of real items"}
WORK: Mapping[str, Any] = {"type": Path, "help": "where to write; a temporary folder by default"}


def _size(default: int, said: str) -> Arguments:
    return {"--size": {"type": int, "default": default, "help": said}}


def _choice(flag: str, choices: Iterable[str], default: Iterable[str]) -> Arguments:
    return {flag: {"nargs": "+", "choices": list(choices), "default": list(default)}}


_DEVICE: Arguments = {"--device": {"default": "cpu", "help": "cpu or cuda"}}
_BFLOAT16: Arguments = {"--bfloat16": {"action": "store_true", "help": "bfloat16 beside float32"}}

BENCHMARKS: dict[str, tuple[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]], Arguments]] = {
    "encode": (
        "items a second beside fixed batches and other models; share of the machine's matrix-product peak",
        lambda a: encode_benchmark(a.model, a.items, a.rounds, a.allocators, a.kind, a.bfloat16, a.peers, a.slow_peers),
        {
            "--model": MODEL,
            "--items": {"type": int, "default": 256},
            **_choice("--kind", KINDS, KINDS),
            **_BFLOAT16,
            "--no-peers": {"action": "store_false", "dest": "peers", "help": "leave CLIP + CLAP out"},
            "--slow-peers": {"action": "store_true", "help": "embedding_gemma2 too: 3 GB, half a minute an item"},
        },
    ),
    "profile": (
        "where the time of an item goes, by part of the model and by operator",
        lambda a: parts_benchmark(a.model, a.items, a.rounds, a.kind, a.device),
        {"--model": MODEL, "--items": {"type": int, "default": 64}, **_choice("--kind", KINDS, KINDS), **_DEVICE},
    ),
    "compile": (
        "each tower by the model's own kernels, as it is written, and by torch.compile",
        lambda a: compile_benchmark(a.model, a.items, a.rounds, a.device, a.dtype),
        {
            "--model": MODEL,
            "--items": {"type": int, "default": 8},
            **_choice("--dtype", ("float32", "bfloat16"), ("float32",)),
            **_DEVICE,
        },
    ),
    "train": (
        "steps of training: towers computed or cached, beside sentence-transformers' trainer",
        lambda a: train_benchmark(a.model, a.size, a.rounds, a.allocators, a.kind, a.device, a.bfloat16),
        {"--model": MODEL, **_size(32, "pairs of a batch"), **_choice("--kind", PAIRS, PAIRS), **_DEVICE, **_BFLOAT16},
    ),
    "gpu": (
        "items a second and share of the peak by modality mix, random weights of a preset",
        lambda a: gpu_benchmark(a.preset, a.device, a.dtype, a.size, a.rounds, a.mix, a.mode),
        {
            **_choice("--preset", PRESETS, ("mini",)),
            "--device": {"default": "cuda"},
            "--dtype": {"default": "bfloat16", "choices": ["bfloat16", "float32"]},
            **_size(256, "items of a batch"),
            **_choice("--mix", MIXES, MIXES),
            **_choice("--mode", MODES, MODES),
        },
    ),
    "bulk": (
        "`sail encode` of a corpus in one go, and killed at random: is it the same file, how fast, in what memory",
        lambda a: bulk_benchmark(a.model, a.items, a.kills, a.smaller, a.real, a.work, a.options.split()),
        {
            "--model": MODEL,
            "--items": {**MADE, "default": 100_000},
            "--kills": {"type": int, "default": 5},
            "--smaller": {"type": int, "nargs": "*", "default": [], "help": "numbers of items of further runs"},
            "--real": REAL,
            "--work": WORK,
            "--options": {"default": "", "help": "more of `sail encode`, as in --options '--workers 2'"},
        },
    ),
    "ray": (
        "`sail encode --engine ray` by number of workers, each of one thread",
        lambda a: ray_benchmark(a.model, a.items, a.workers, a.work, a.cores_each),
        {
            "--model": MODEL,
            "--items": {**MADE, "default": 2_000},
            "--workers": {"type": int, "nargs": "+", "default": [1, 2]},
            "--cores-each": {"type": int, "help": "CPUs of the machine for each worker; all for any number by default"},
            "--work": WORK,
        },
    ),
    "exact": (
        "an item alone and in a batch, float32 and bfloat16; real items in bfloat16",
        lambda a: exact_benchmark(a.model, a.real),
        {"--model": MODEL, "--real": REAL},
    ),
    "loss": (
        "the memory-linear NCE beside the dense one",
        lambda a: loss_benchmark(a.size, a.rounds, a.allocators),
        _size(16_384, "B"),
    ),
    "cache": (
        "cached gradients beside direct backward and sentence-transformers",
        lambda a: cache_benchmark(a.size, a.rounds, a.allocators),
        _size(2048, "B, in pairs"),
    ),
    "mine": (
        "lambda* and hard negatives beside the bare product and the peer's miner",
        lambda a: mine_benchmark(a.size, a.rounds, a.allocators, a.case),
        {**_size(20_000, "pairs"), **_choice("--case", CASES, CASES)},
    ),
    "index": (
        "recall, queries a second and bytes an item of each index beside exact search and quantised search of peers",
        lambda a: index_benchmark(a.size, a.dim, a.rounds, a.kind, a.embeddings),
        {
            **_size(100_000, "synthetic items"),
            "--dim": {"type": int, "default": 384},
            **_choice("--kind", INDEXES, DEFAULT),
            "--embeddings": {"type": Path, "metavar": "X.parquet", "help": "real ones in place of synthetic ones"},
        },
    ),
}


def main(given: list[str] | None = None) -> None:
    """Run one benchmark and print its figures as JSON lines; or draw lines that are there already.

    Raises:
        SystemExit: with one line, where an argument or a file cannot be.
    """
    args = _parser().parse_args(given)
    try:
        if args.benchmark == "picture":
            draw_file(args.lines, args.picture)
        else:
            _run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"{args.benchmark}: {error}")


def _run(args: argparse.Namespace) -> None:
    args.allocators = dict(list(ALLOCATORS.items())[:1]) if args.default_allocator else ALLOCATORS
    _check(args)
    figures = []
    for figure in BENCHMARKS[args.benchmark][1](args):
        figures.append(figure)
        line = json.dumps(figure)
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    if args.picture is not None:
        draw(figures, args.picture)
    elif args.out is not None and any(drawable(figure) for figure in figures):
        draw_file(args.out, args.out.with_suffix(".svg"))


def _check(args: argparse.Namespace) -> None:
    """Refuse what would fail at the end, after minutes."""
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: at least one round is needed.")
    for flag, file in (("--out", args.out), ("--picture", args.picture)):
        if file is not None:
            _check_writable(flag, file)
    if args.picture is not None:
        check_ending(args.picture)
    if args.out is not None:
        if args.out.suffix.lower() in ENDINGS:
            raise ValueError(f"--out {args.out}: lines are appended there, and drawn beside; a picture is --picture.")
        if args.out.is_file():
            read_figures(args.out)  # other things than lines stay as they are


def _check_writable(flag: str, file: Path) -> None:
    """Refuse a file that cannot be written."""
    there = file.exists() or file.is_symlink()
    try:
        file.open("a").close()
    except OSError as error:
        raise ValueError(f"{flag} {file} cannot be written: {error.strerror}.") from error
    if not there:  # a run that fails leaves no empty file
        file.unlink()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_sail.evaluation.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the lines to this file too, and draw it beside itself")
    parser.add_argument("--picture", type=Path, help="draw this run's lines: FILE.svg or FILE.png")
    parser.add_argument(
        "--default-allocator", action="store_true", help="leave out the runs in which glibc keeps memory"
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, (said, _, arguments) in BENCHMARKS.items():
        command = commands.add_parser(name, help=said)
        for flag, options in arguments.items():
            command.add_argument(flag, **options)
    picture = commands.add_parser("picture", help="bars of the lines of a file: ours and the peers, by case")
    picture.add_argument("lines", type=Path)
    picture.add_argument("--out", dest="picture", type=Path, required=True, help="FILE.svg or FILE.png")
    return parser


if __name__ == "__main__":
    main()
