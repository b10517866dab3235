"""The command line, `sail ...`: it imports everything; nothing imports it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .configuration_sail import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a caller's mistake is one line on stderr and exit status 2, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    args = _parser().parse_args(arguments)
    status = _run(args)
    if args.command == "train" and "torch" in sys.modules:  # a bad recipe is told without
        from .training.distributed import leave

        leave(failed=status != 0)
    return status


def _run(args: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
    except SafetensorError as error:
        print(f"sail {args.command}: a file of weights is broken ({error}); copy or build it again", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"sail {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sail {args.command}: stopped", file=sys.stderr)
        return 130  # as shells have it for ^C
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sail", description="Omni-modal item embeddings: SAIL-Embedding.")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="build|encode|index|search|train|mine|balance|behaviour|sid|evaluate|export|card|push|demo",
    )

    build = commands.add_parser("build", help="put a preset together as a folder in Hub format")
    build.add_argument("--preset", choices=sorted(PRESETS), required=True)
    build.add_argument("--out", type=Path, required=True)
    for tower in ("text", "vision", "audio"):
        build.add_argument(f"--{tower}", help=f"another {tower} tower: Hub id, folder or pinned name")
    build.add_argument("--seed", type=int, default=0, help="of new weights")
    build.set_defaults(run=_build)

    encode = commands.add_parser("encode", help="embed items of any number into Parquet; a killed run goes on")
    encode.add_argument("source", type=Path, metavar="ITEMS.jsonl|ITEMS.parquet|FOLDER")
    encode.add_argument("--model", type=Path, required=True)
    encode.add_argument("--out", required=True, metavar="X.parquet|FOLDER", help="one file, or a folder of shards")
    encode.add_argument("--task", default="q2i", help="task family of the instruction; 'none' for no instruction")
    encode.add_argument("--side", default="target", choices=("query", "target"))
    encode.add_argument("--dim", type=int, help="keep this many leading dimensions")
    encode.add_argument("--device", help="as torch names it; cuda where there is one, else cpu")
    encode.add_argument("--dtype", default="float32", help="of the model: float32 | bfloat16")
    encode.add_argument("--packed", action="store_true", help="rows without padding on CUDA too, with bfloat16")
    encode.add_argument(
        "--token-budget", type=int, metavar="TOKENS", help="of one pass; by default what suits the device"
    )
    encode.add_argument("--shard-size", type=int, default=16_384, metavar="ITEMS", help="of one file")
    encode.add_argument("--workers", type=int, help="processes that decode (0: none but this); with Ray, actors")
    encode.add_argument("--item-seconds", type=float, default=300.0, help="what takes longer to decode is an error")
    encode.add_argument("--threads", type=int, help="of torch in each process that holds the model; with Ray 1")
    encode.add_argument("--engine", choices=("local", "ray"), default="local")
    encode.add_argument("--address", help="of a Ray cluster; by default one is started here")
    encode.set_defaults(run=_encode)

    index = commands.add_parser("index", help="encoded items as a folder to search fast; its recall is measured")
    index.add_argument("embeddings", type=Path, metavar="X.parquet|FOLDER", help="what `sail encode` wrote")
    index.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    index.add_argument("--kind", default="auto", help="auto (by size) | flat | ivf | ivf-pq | opq | hnsw")
    index.add_argument("--recall", type=float, default=0.95, help="recall@10 that the search effort is raised for")
    index.add_argument("--precision", default="float32", help="of the first pass: float32 | int8 | binary")
    index.add_argument("--first-pass", type=int, metavar="DIMS", help="leading dimensions; measured by default")
    index.add_argument("--seed", type=int, default=0)
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="nearest items of what `sail encode` or `sail index` wrote")
    search.add_argument("--index", type=Path, required=True, metavar="X.parquet|FOLDER")
    search.add_argument("--model", type=Path, required=True)
    for field in ("text", "image", "audio", "video"):
        search.add_argument(f"--{field}", help="the query, or a part of it")
    search.add_argument("--task", default="q2i", help="task family of the instruction; 'none' for no instruction")
    search.add_argument("--top", type=int, default=10)
    search.add_argument("--verify", action="store_true", help="hash all of an index first; else large files in part")
    search.set_defaults(run=_search)

    train = commands.add_parser("train", help="run a recipe's stages; a killed run goes on where it stopped")
    train.add_argument("recipe", help="a .yaml file, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="as in stages.base.steps=100")
    train.set_defaults(run=_train)

    mine = commands.add_parser("mine", help="hard negatives of a dataset, with a report; a killed run goes on")
    mine.add_argument("rows", metavar="ROWS.jsonl|ROWS.parquet|FOLDER", help="pairs: a dataset as recipes take it")
    mine.add_argument("--model", type=Path, required=True)
    mine.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    mine.add_argument("--negatives", type=int, default=8, help="of each row")
    mine.add_argument("--task", default="q2i", help="task family of the instructions; 'none' for no instruction")
    mine.add_argument("--memory", type=float, default=1.0, metavar="GIB", help="for scores, besides the model")
    mine.add_argument("--feature-cache", type=Path, metavar="FOLDER", help="keep the towers' features there")
    mine.set_defaults(run=_mine)

    balance = commands.add_parser("balance", help="how often a recipe's datasets are to be drawn, with a heat map")
    balance.add_argument("recipe", help="a .yaml file with validation sets, or the name of a shipped recipe")
    balance.add_argument("overrides", nargs="*", metavar="key=value", help="as in model=build/mini")
    balance.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    balance.add_argument("--stage", help="whose datasets and settings; the first one by default")
    balance.set_defaults(run=_balance)

    behaviour = commands.add_parser(
        "behaviour", help="sequences, ID embeddings and a report from tables of interactions and items, for a recipe"
    )
    behaviour.add_argument("interactions", help="Parquet: user, item, time, behaviours; or movielens")
    behaviour.add_argument("items", nargs="?", help="Parquet: id, any field of an item, labels, released")
    behaviour.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="embeds the items")
    behaviour.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    behaviour.add_argument("--share", type=float, default=0.8, help="of the events that come before the split")
    behaviour.add_argument("--split-time", type=float, metavar="SECONDS", help="unix time of the split, for a share")
    behaviour.add_argument("--unseen", type=float, default=0.0, help="share of the items that nothing learns from")
    behaviour.add_argument("--targets", type=int, default=1, help="newest items of a user that become targets")
    behaviour.add_argument("--jaccard", type=float, default=0.5, help="that two items' consumers must reach")
    behaviour.add_argument("--interests", nargs="+", metavar="NAME", help="some of the four; all by default")
    behaviour.add_argument(
        "--single-peak", type=int, default=3, help="positive behaviours of an item in those interests"
    )
    behaviour.add_argument("--teachers", nargs="*", metavar="NAME", help="of bpr als item2vec graph; all by default")
    behaviour.add_argument("--tables", nargs="*", default=[], metavar="X.parquet", help="ID embeddings of your own")
    behaviour.add_argument("--seed", type=int, default=0)
    behaviour.set_defaults(run=_behaviour)

    sid = commands.add_parser("sid", help="semantic IDs: embeddings as a few discrete codes")
    steps = sid.add_subparsers(dest="step", required=True, metavar="fit|encode")
    fit = steps.add_parser("fit", help="fit codebooks on encoded items; they go into the model's folder, with a report")
    fit.add_argument("embeddings", type=Path, metavar="X.parquet", help="what `sail encode` wrote")
    fit.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the model's folder")
    fit.add_argument("--scheme", default="rq-opq", help="kmeans | rq | rq-opq")
    fit.add_argument("--sizes", type=int, nargs="+", default=[256, 256], help="entries of each residual level")
    fit.add_argument("--parts", type=int, default=4, help="product codes of rq-opq")
    fit.add_argument("--bits", type=int, default=8, help="of each product code")
    fit.add_argument("--held-out", type=float, default=0.1, help="share of the items that the report is on")
    fit.add_argument("--seed", type=int, default=0)
    codes = steps.add_parser("encode", help="codes of encoded items, as Parquet")
    codes.add_argument("embeddings", type=Path, metavar="X.parquet", help="what `sail encode` wrote")
    codes.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="with semantic_ids.safetensors")
    codes.add_argument("--out", type=Path, required=True, metavar="CODES.parquet")
    sid.set_defaults(run=_sid)

    evaluate = commands.add_parser("evaluate", help="tasks in MTEB style with any SentenceTransformer; see --list")
    evaluate.add_argument("--model", metavar="DIR|ID", help="a folder, or an id of the Hub")
    evaluate.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks, families, groups or patterns")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="results; what it has already is not run again")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--subset", nargs="+", metavar="LANG", help="subsets or languages; all by default")
    evaluate.add_argument("--list", action="store_true", help="print the tasks")
    evaluate.add_argument("--backend", choices=("ours", "plain"), default="ours", help="plain: as mteb itself wraps it")
    evaluate.add_argument("--name", help="of the model in the results; its id or its folder's by default")
    evaluate.add_argument("--device", help="as torch names it")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="the model's parts as ONNX, compared with it, for onnxruntime on a CPU")
    export.add_argument("model", type=Path, metavar="MODEL", help="the model's folder")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    export.add_argument("--parts", nargs="+", metavar="PART", help="of text vision audio fusion; all by default")
    export.add_argument("--opset", type=int, default=18, help="of the ONNX operators, 18 to 22")
    export.set_defaults(run=_export)

    card = commands.add_parser("card", help="write a model's card from its checkpoint, logs and result files")
    card.add_argument("model", type=Path, metavar="DIR", help="the model's folder; the card becomes its README.md")
    card.add_argument(
        "--results",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="of reports and mteb's results; of a shipped model its own",
    )
    card.add_argument("--out", type=Path, metavar="FILE.md", help="another place for the card")
    card.add_argument("--name", help="of the model; the folder's, or RUN/STAGE, by default")
    card.add_argument("--repo", metavar="USER/NAME", help="what the card's examples load; the folder by default")
    card.set_defaults(run=_card)

    push = commands.add_parser("push", help="put a model with its card on the Hub")
    push.add_argument("model", type=Path, metavar="DIR", help="the model's folder")
    push.add_argument("--repo", required=True, metavar="USER/NAME")
    push.add_argument("--dry-run", action="store_true", help="list what would go up, and send nothing")
    push.add_argument("--private", action="store_true", help="a new repository that nobody else sees")
    push.set_defaults(run=_push)

    demo = commands.add_parser("demo", help="search Tux Paint by word, picture and speech; one HTML page")
    demo.add_argument("--model", type=Path, required=True)
    demo.add_argument("--out", type=Path, required=True, metavar="PAGE.html|FOLDER")
    demo.add_argument("--subset", type=int, help="only so many items")
    demo.set_defaults(run=_demo)
    return parser


# Each command imports what it needs when it runs: building must not need FAISS, nor searching the training packages.


def _build(args: argparse.Namespace) -> None:
    from .training.build import build

    towers = {name: getattr(args, name) for name in ("text", "vision", "audio") if getattr(args, name)}
    model, _ = build(args.preset, args.out, towers=towers or None, seed=args.seed)
    print(f"{args.out}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters")


def _encode(args: argparse.Namespace) -> None:
    from .encode_job import Options, encode, encode_here
    from .encode_output import Output

    if args.address is not None and args.engine != "ray":
        raise ValueError(f"--address {args.address} is of a Ray cluster; add --engine ray, or leave it out.")
    names = ["side", "dim", "dtype", "packed", "token_budget", "shard_size", "device", "workers", "item_seconds"]
    options = Options(task=_task(args.task), threads=args.threads, **{name: getattr(args, name) for name in names})
    if args.engine == "ray":
        from .encode_ray import encode_on_ray

        done = encode_on_ray(args.model, args.source, args.out, options, args.address)
    else:
        done = encode(args.model, args.source, Output(args.out), options, encode_here)
    counts = f"{args.out}: {done['ok']} ok, {done['error']} error"
    speed = done["new"] / done["seconds"] if done["seconds"] else 0.0
    print(f"{counts}; {done['new']} items now, {speed:.1f}/s" if done["new"] else f"{counts}; it was finished already")
    if not done["ok"]:
        raise RuntimeError(f"no item of {args.source} could be encoded; the column 'reason' of {args.out} says why")


def _index(args: argparse.Namespace) -> None:
    from .index_build import build_index, summary

    settings = {name: getattr(args, name) for name in ("kind", "recall", "precision", "first_pass", "seed")}
    print(f"{args.out}: {summary(build_index(args.embeddings, args.out, **settings))}")


def _search(args: argparse.Namespace) -> None:
    from .encode_job import load_module
    from .fingerprints import model_hash
    from .index import load_index, require_model, search

    query = {field: value for field in ("text", "image", "audio", "video") if (value := getattr(args, field))}
    if not query:
        raise ValueError("give a query: --text, --image, --audio or --video")
    index = load_index(args.index, args.verify)
    if index.manifest.get("model") and args.model.is_dir():
        require_model(index, model_hash(args.model))
    module = load_module(args.model)
    instruction = module.processor.instruction_for(_task(args.task), "query")
    for place, (name, score) in enumerate(search(module, index, [query], instruction, args.top)[0], start=1):
        print(f"{place:3d}  {score:.4f}  {name}")


def _train(args: argparse.Namespace) -> None:
    from .training.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from .training.stages import run_recipe  # imports the Trainer: a bad recipe needs no such wait

    print(run_recipe(recipe))


def _mine(args: argparse.Namespace) -> None:
    from .training.mine_job import run_mine

    task = _task(args.task)
    memory = round(args.memory * (1 << 30))
    report = run_mine(args.rows, args.model, args.out, args.negatives, task, memory, args.feature_cache)
    print(
        f"{args.out / 'rows.parquet'}: {report['negatives']} negatives of {report['pairs']} rows; lambda* "
        f"{report['lambda']:.4f} (F1 {report['f1']:.3f}), {report['false_negatives_dropped']} false negatives dropped, "
        f"{len(report['rows_skipped'])} rows left out. Look at {args.out / 'report.html'}"
    )


def _balance(args: argparse.Namespace) -> None:
    from .training.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from .training.stages import balance_recipe

    weights = balance_recipe(recipe, args.stage, args.out)
    print("datasets: {" + ", ".join(f"{name}: {weight:.4f}" for name, weight in weights.items()) + "}")
    print(f"Look at {args.out / 'balance.html'}")


def _behaviour(args: argparse.Namespace) -> None:
    from .training.behaviour_job import run_behaviour
    from .training.recommendation.interests import Limits
    from .training.recommendation.prepare import Settings

    chosen = {"teachers": args.teachers, "interests": args.interests}
    given: dict[str, Any] = {name: tuple(values) for name, values in chosen.items() if values is not None}
    settings = Settings(
        share=args.share,
        split_time=args.split_time,
        unseen_share=args.unseen,
        limits=Limits(behaviour=args.jaccard, targets=args.targets, single_peak=args.single_peak),
        tables=tuple(args.tables),
        seed=args.seed,
        **given,
    )
    report = run_behaviour(args.interactions, args.items, args.model, args.out, settings)
    kept = ", ".join(f"{name} {numbers['kept']}" for name, numbers in report["interests"].items())
    print(f"{args.out}: {report['learned']} events learned from; sequences: {kept}. Look at {args.out / 'report.html'}")


def _sid(args: argparse.Namespace) -> None:
    from .training.semantic_ids import encode_file, fit_file

    if args.step == "encode":
        print(f"{args.out}: {encode_file(args.embeddings, args.model, args.out)} items")
        return
    settings = {"scheme": args.scheme, "sizes": args.sizes, "parts": args.parts, "part_bits": args.bits}
    report = fit_file(args.embeddings, args.model, settings, args.held_out, args.seed)
    errors = ", ".join(f"{level['reconstruction_error']:.3f}" for level in report["levels"])
    print(
        f"{args.model / 'semantic_ids.safetensors'}: {report['items']} held-out items, {report['collision_rate']:.1%} "
        f"collide, {report['neighbours_kept']:.1%} of the neighbours kept, error after each level {errors}"
    )


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation.evaluate_job import PAGE, evaluate, list_tasks, table

    if args.list:
        print(list_tasks())
        return
    if missing := [name for name in ("model", "tasks", "out") if not getattr(args, name)]:
        raise ValueError(f"--{' and --'.join(missing)} needed; the tasks are listed by: sail evaluate --list")
    settings = {name: getattr(args, name) for name in ("batch_size", "backend", "name", "device")}
    rows = evaluate(args.model, args.tasks, args.out, subsets=args.subset, **settings)
    print(table(rows))
    print(*(args.out / name for name in ("summary.json", PAGE) if (args.out / name).exists()), sep="\n")
    if failed := sorted({row["task"] for row in rows if row["status"] == "failed"}):
        raise RuntimeError(f"{len(failed)} of the tasks failed: {', '.join(failed)}")


def _export(args: argparse.Namespace) -> None:
    from .export_onnx import export_onnx

    manifest = export_onnx(args.model, args.out, args.parts, args.opset)
    size = sum(about["bytes"] for about in manifest["files"].values())
    print(f"{args.out}: {len(manifest['graphs'])} graphs, {size / 1e6:.0f} MB")
    if failed := manifest["not_exported"]:
        raise RuntimeError(f"not exported: {', '.join(failed)}; the reasons are in {args.out / 'onnx_manifest.json'}")


def _card(args: argparse.Namespace) -> None:
    from .model_cards.card import make_card

    for path in make_card(args.model, args.results, args.out, name=args.name, repo=args.repo):
        print(path)


def _push(args: argparse.Namespace) -> None:
    from .model_cards.push import push

    plan = push(args.model, args.repo, dry_run=args.dry_run, private=args.private)
    print(plan if args.dry_run else f"{len(plan.files)} files are at {plan.repo}")


def _demo(args: argparse.Namespace) -> None:
    from .demo import make_demo

    page = make_demo(args.model, args.out, args.subset)
    print(f"{page}: open it in a browser")


def _task(name: str) -> str | None:
    return None if name.lower() == "none" else name


if __name__ == "__main__":
    sys.exit(main())
