"""The paper's peers (Tables 2 and 3), its ladder (Figures 9 and 10), and recipes, on open data: one command each.

    python -m modeling_sail.evaluation.comparison peers --out evaluation/results/peers.json
    python -m modeling_sail.evaluation.comparison ladder --out evaluation/results/ladder.json
    python -m modeling_sail.evaluation.comparison recipes mini-progressive mini --out results/progressive.json

Room: Embeddings -> **Evaluation**. Unusual: what is compared is data: a start, a recipe, and what is set differently. A
run that was stopped goes on where it was: stages that are done are not run again, and tasks are scored again only if
their data, the scoring or the model changed.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..modeling_sail import SailEmbeddingModel
from ..training.build import assemble, load_built
from ..training.collate import Collator
from ..training.mini import cache_features
from ..training.peers import decoder_start, dual_tower, encoder_start, other_attention, without_audio
from ..training.recipe import load_recipe
from ..training.stages import run_recipe
from .feature_encoder import BASELINES, Data, cached_collator, model_encoder
from .kept_scores import scores_of
from .reports import markdown_table, pooled, table, write_histograms, write_report
from .revisions import folder_digest
from .tasks import find_tasks
from .tasks.task import Encode, Task

logger = logging.getLogger(__name__)

LAYERS = 6  # of small's 30 in the ladder
Scores = dict[str, list[dict[str, Any]]]  # of each column, one a seed: {task: {subset: scores}}


@dataclass(frozen=True)
class Run:
    """A column of a comparison that is trained.

    Attributes:
        start: a name that `make_start` knows.
        recipe: name of a recipe.
        overrides: ``key=value`` of the recipe.
        instructed: whether the tasks' instructions go before items in the evaluation, as they do in the training.
    """

    start: str
    recipe: str
    overrides: tuple[str, ...] = ()
    instructed: bool = True


# --- what is compared -------------------------------------------------------------------------------------------------

PEERS = {
    "dual tower": Run("dual", "mini"),
    "VLM-style (no audio)": Run("no-audio", "mini-no-audio"),
    "SAIL (mini)": Run("warm", "mini"),
}

_PAIRS = ("tuxpaint", "tuxpaint-speech", "tuxpaint-both", "openclipart", "emoji", "emoji-speech")
_INSTRUCTED = tuple(f"datasets.{name}.tasks=[cls, q2i]" for name in _PAIRS)
_FULL = (*_INSTRUCTED, "stages.all.lora=null", "stages.all.learning_rates={text_tower.*: 5.0e-5}")
_MORE = "tuxpaint: 2, tuxpaint-speech: 2, tuxpaint-both: 2, openclipart: 3, emoji: 1, emoji-speech: 1"
_GRADED = f"stages.all.datasets={{{_MORE}, graded: 2}}"
LADDER = {
    "text encoder": Run("encoder", "ladder", (), False),
    "LLM fuser": Run("decoder-causal", "ladder", (), False),
    "+ bidirectional": Run("decoder", "ladder", (), False),
    "+ instructions": Run("decoder", "ladder", _INSTRUCTED),
    "+ full fine-tuning": Run("decoder", "ladder", _FULL),
    "+ more data": Run("decoder", "ladder", (*_FULL, f"stages.all.datasets={{{_MORE}}}")),
    "+ CoSENT": Run("decoder", "ladder", (*_FULL, _GRADED)),
    "+ progressive": Run("decoder", "ladder-progressive"),
}

# What a column reads, where it is not all; a cell of a task with a side that it cannot read is left out.
READS: dict[str, frozenset[str]] = {
    "VLM-style (no audio)": frozenset({"text", "image"}),
    "MiniLM text only": frozenset({"text"}),
}

# Columns, what they are, and their tasks: of the ladder those of i2i and q2i, as in the figures, without films.
COMPARISONS: dict[str, tuple[Mapping[str, Run], str, Sequence[str]]] = {
    "peers": (
        PEERS,
        "The paper's peers as configurations of our own model, on the same data and steps, and baselines.",
        ["*"],
    ),
    "ladder": (
        LADDER,
        f"The paper's ablation ladder; the decoder is the first {LAYERS} layers of small's.",
        [
            "TuxPaintSame*",
            "TuxPaintPictureToSpeech",
            "IllustrationSameTags",
            "search",
            "retrieval",
            "pair classification",
        ],
    ),
}
ABOUT_RECIPES = "Recipes from one warm model, stage by stage, on held-out names."
NAMES_BOTH_WAYS = ["*ToName", "TuxPaintNameToItem", "TuxPaintPictureToSpeech"]


def make_start(name: str, work: Path) -> Path:
    """The model that a run starts from; made where it is not there yet.

    Args:
        name: "warm" (mini's, which `training.mini` makes), "dual", "no-audio", "encoder", "decoder", "decoder-causal".
        work: its folder, with the feature cache.

    Raises:
        FileNotFoundError: mini's warm model is not there.
    """
    warm, out = work / "warm", work / "peers" / name
    if name == "warm":
        if not (warm / "config.json").is_file():
            raise FileNotFoundError(
                f"There is no warm model in {warm}; `python -m modeling_sail.training.mini` makes it."
            )
        return warm
    if not (out / "config.json").is_file():
        partial = out.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _make(name, work, partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    return out


def _make(name: str, work: Path, out: Path) -> None:
    of_warm: dict[str, Callable[[Path, Path], None]] = {"dual": dual_tower, "no-audio": without_audio}
    if name in of_warm:
        of_warm[name](make_start("warm", work), out)
    elif name == "decoder":
        other_attention(make_start("decoder-causal", work), out, causal=False)
    else:
        images, sounds = cache_features(*assemble("mini"), work)
        torch.manual_seed(0)
        if name == "encoder":
            encoder_start(out, images, sounds)
        else:
            decoder_start(out, images, sounds, LAYERS, causal=True)


# --- trainings and scores ---------------------------------------------------------------------------------------------


def trained(run: Run, work: Path, output: Path, seed: int) -> dict[str, Path]:
    """The folders of a run's models by stage, trained where they are not yet."""
    start = make_start(run.start, work)
    places = [f"model={start}", f"output={output}", f"defaults.feature_cache={work}", f"seed={seed}"]
    recipe = load_recipe(run.recipe, [*places, *run.overrides])
    run_recipe(recipe)
    return {stage: output / stage / "model" for stage in recipe.stages}


def model_scores(folder: Path, run: Run, tasks: Sequence[Task], data: Data, work: Path, path: Path) -> dict[str, Any]:
    """`scores_of` a trained model."""

    @lru_cache(maxsize=1)
    def loaded() -> tuple[SailEmbeddingModel, Collator, dict[str, Any]]:  # only if there is something to score
        model, processor = load_built(folder)
        return model, cached_collator(model, processor, work, data), {}

    def encoder_for(task: Task) -> Encode:
        model, collate, known = loaded()
        return model_encoder(model, collate, family=task.family if run.instructed else None, known=known)

    model = f"{folder_digest(folder)}{'' if run.instructed else ', not instructed'}"
    return scores_of(tasks, data, encoder_for, path, model)


def compare(
    columns: Mapping[str, Run],
    seeds: Sequence[int],
    tasks: Sequence[Task],
    data: Data,
    work: Path,
    out: Path,
    *,
    by_stage: bool = False,
) -> Scores:
    """Scores of each column, one a seed.

    Args:
        columns: what is compared.
        seeds: each is run with each.
        tasks: what is asked.
        data: of each, by its name.
        work: starts and the feature cache.
        out: folder of what is trained, ``<column>/<seed>``, with the scores.
        by_stage: a column for each stage of a recipe, "<column>: <stage>"; by default the last one's alone.
    """
    found: Scores = {}
    for seed in seeds:
        for column, run in columns.items():
            output = out / slug(column) / str(seed)
            logger.warning("%s, seed %d", column, seed)
            folders = trained(run, work, output, seed)
            several = by_stage and len(folders) > 1
            for stage in folders if several else [*folders][-1:]:
                name, path = (f"{column}: {stage}", output / stage) if several else (column, output)
                scores = model_scores(folders[stage], run, tasks, data, work, path / "scores.json")
                found.setdefault(name, []).append(scores)
    return found


def baseline_scores(tasks: Sequence[Task], data: Data, work: Path, out: Path) -> Scores:
    """Those of `BASELINES`, which draw nothing: one for all seeds."""
    found = {}
    for column, (make, identity) in BASELINES.items():
        made = lru_cache(maxsize=1)(lambda make=make: make(work, data))
        path = out / slug(column) / "scores.json"
        found[column] = [scores_of(tasks, data, lambda _, made=made: made(), path, identity())]
    return found


def slug(column: str) -> str:
    """A column's folder name."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in column.lower()).split())


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(
    found: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[Task], seeds: Sequence[int]
) -> dict[str, Any]:
    """Tables of a report by family: at each task's main score, and recall at 10 and 50."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        kind = "pairs" if task.main_score in ("auc", "average_precision") else task.family
        groups.setdefault("sequences" if task.group.startswith("sequence") else kind, []).append(task)
    made = {}
    for kind, members in groups.items():
        for key in ("auc",) if kind == "pairs" else ("recall_at_10", "recall_at_50", "separability_auc"):
            rows = _rows(found, members, key)
            unit = {"recall_at_10": "Recall@10", "recall_at_50": "Recall@50", "auc": "AUC"}.get(key, "separability AUC")
            suffix = {"recall_at_10": "", "auc": ""}.get(key, "_" + key.removeprefix("recall_at_"))
            made[f"{kind}{suffix}"] = table(f"{kind}, {unit}", unit, rows, seeds=seeds, columns=list(found))
    return made


def recipe_tables(found: Scores, tasks: Sequence[Task], seeds: Sequence[int]) -> dict[str, Any]:
    """The one table of recipes: a column for each stage."""
    rows = _rows(found, tasks, "recall_at_10")
    return {"recipes": table("Retrieval of held-out names", "Recall@10", rows, seeds=seeds, columns=list(found))}


def histograms(found: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[Task]) -> dict[str, Any]:
    """Cosines of positives and of random negatives by task and column, the counts of the seeds added."""
    rows = _cells(found, tasks, "separability_histogram")
    return {row: {column: pooled(parts) for column, parts in cells.items()} for row, cells in rows.items()}


def _rows(found: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[Task], key: str) -> dict[str, Any]:
    rows = _cells(found, tasks, key)
    return {row: {column: list(map(float, values)) for column, values in cells.items()} for row, cells in rows.items()}


def _cells(found: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[Task], key: str) -> dict[str, Any]:
    """A score of each task and subset by column, one a seed; what a column cannot read is left out."""
    rows: dict[str, dict[str, list[Any]]] = {}
    for task in tasks:
        for subset in next(iter(found.values()))[0][task.name]:
            name = task.name if subset == "default" else f"{task.name} ({subset})"
            cells = {
                column: [one[task.name][subset][key] for one in scores if key in one[task.name][subset]]
                for column, scores in found.items()
                if readable(task, column)
            }
            rows[name] = {column: values for column, values in cells.items() if values}
    return rows


def readable(task: Task, column: str) -> bool:
    """Whether a column reads something of both sides: what it cannot ask or find is no measurement of it."""
    reads = READS.get(column)
    return reads is None or all(reads & set(side) for side in (task.query_modalities, task.target_modalities))


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Command line of the comparisons."""
    args, columns, about, usual = _asked(arguments)
    # Recipes have no folder above theirs, so that one that was trained by itself is not trained again.
    out = args.work / "comparison" / ("" if args.which == "recipes" else args.which)
    if args.train_only:
        for seed in args.seeds:
            for column, run in columns.items():
                trained(run, args.work, out / slug(column) / str(seed), seed)
        return
    tasks = find_tasks(args.tasks or usual)
    data = {task.name: task.load() for task in tasks}
    found: Scores = {}
    if args.which == "recipes":
        warm, path = make_start("warm", args.work), out / "before" / "scores.json"
        found["before"] = [model_scores(warm, Run("warm", ""), tasks, data, args.work, path)]
    found |= compare(columns, args.seeds, tasks, data, args.work, out, by_stage=args.which == "recipes")
    if args.which == "peers":
        found |= baseline_scores(tasks, data, args.work, out)
    made = (recipe_tables if args.which == "recipes" else tables)(found, tasks, args.seeds)
    for one in made.values():
        print(f"\n{one['title']}\n\n{markdown_table(one)}")
    if args.out is not None:
        counts = histograms(found, tasks)
        write_report(args.out, about, _command(args), made, {"preset": "mini"}, histograms=counts)
        print(write_histograms(args.out.with_suffix(".histograms.html"), about, counts))


def _asked(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Run], str, Sequence[str]]:
    """The arguments, and what they name: columns, what they are, and the usual tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=[*sorted(COMPARISONS), "recipes"])
    parser.add_argument("recipes", nargs="*", help="of `recipes`: names or files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--columns", nargs="+", default=[], help="some of them; all by default")
    parser.add_argument("--tasks", nargs="+", default=[], help="names, families or groups, in place of the usual ones")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mini"), help="starts, the feature cache, what is trained"
    )
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="of every recipe")
    parser.add_argument("--train-only", action="store_true", help="train, score later")
    parser.add_argument("--out", type=Path, help="JSON of the report; a page of histograms goes beside it")
    args = parser.parse_args(arguments)
    if (args.which == "recipes") != bool(args.recipes) or (args.overrides and not args.recipes):
        parser.error("`recipes`, and no other, takes names of recipes, and --set: recipes mini-plain mini-full")
    known = {Path(name).stem: Run("warm", name, tuple(args.overrides)) for name in args.recipes}
    columns, about, usual = COMPARISONS.get(args.which, (known, ABOUT_RECIPES, NAMES_BOTH_WAYS))
    if unknown := sorted(set(args.columns) - set(columns)):
        parser.error(f"there is no column {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, columns))}")
    chosen = {name: run for name, run in columns.items() if not args.columns or name in args.columns}
    return args, chosen, about, usual


def _command(args: argparse.Namespace) -> str:
    """That measures it again."""
    given = {"--seeds": args.seeds, "--columns": args.columns, "--tasks": args.tasks, "--set": args.overrides}
    words = [args.which, *args.recipes]
    words += [word for option, values in given.items() if values for word in (option, *map(str, values))]
    return f"python -m modeling_sail.evaluation.comparison {shlex.join(words)}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main()
