"""The paper's peers (Tables 2 and 3) and its ladder (Figures 9 and 10) on open data: one command each.

    python -m modeling_sail.evaluation.comparison peers --out evaluation/results/peers.json
    python -m modeling_sail.evaluation.comparison ladder --out evaluation/results/ladder.json

Room: Embeddings -> **Evaluation**. Unusual: what is compared is data: a start, a recipe, and what is set differently. A
run that was stopped goes on where it was: stages that are done are not run again, nor are tasks scored again.
"""

from __future__ import annotations

import argparse
import json
import logging
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
from ..training.files import write_json
from ..training.mini import cache_features
from ..training.peers import decoder_start, dual_tower, encoder_start, other_attention, without_audio
from ..training.recipe import load_recipe
from ..training.stages import run_recipe
from .feature_encoder import Data, cached_collator, linear_encoder, model_encoder, text_only_encoder
from .reports import markdown_table, table, write_report
from .tasks import find_tasks
from .tasks.task import Encode, Task, score

logger = logging.getLogger(__name__)

LAYERS = 6  # of small's 30 in the ladder


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


def trained(run: Run, work: Path, output: Path, seed: int) -> Path:
    """The folder of a run's model, trained where it is not yet."""
    start = make_start(run.start, work)
    places = [f"model={start}", f"output={output}", f"defaults.feature_cache={work}", f"seed={seed}"]
    return run_recipe(load_recipe(run.recipe, [*places, *run.overrides]))


def scores_of(tasks: Sequence[Task], data: Data, encoder_for: Callable[[Task], Encode], path: Path) -> dict[str, Any]:
    """``{task: {subset: scores}}``; tasks that are in the file already are not scored again."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for task in tasks:
        if task.name not in found:
            encode = encoder_for(task)
            found[task.name] = {subset: score(one, encode) for subset, one in data[task.name].items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
    return {task.name: found[task.name] for task in tasks}


def model_scores(folder: Path, run: Run, tasks: Sequence[Task], data: Data, work: Path, path: Path) -> dict[str, Any]:
    """`scores_of` a trained model."""

    @lru_cache(maxsize=1)
    def loaded() -> tuple[SailEmbeddingModel, Collator, dict[str, Any]]:  # only if there is something to score
        model, processor = load_built(folder)
        return model, cached_collator(model, processor, work, data), {}

    def encoder_for(task: Task) -> Encode:
        model, collate, known = loaded()
        return model_encoder(model, collate, family=task.family if run.instructed else None, known=known)

    return scores_of(tasks, data, encoder_for, path)


def compare(
    columns: Mapping[str, Run], seeds: Sequence[int], tasks: Sequence[Task], work: Path, out: Path, name: str
) -> dict[str, list[dict[str, Any]]]:
    """Scores of each column, one a seed; of baselines, which draw nothing, one."""
    data = {task.name: task.load() for task in tasks}
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for column, run in columns.items():
            output = out / slug(column) / str(seed)
            logger.warning("%s: %s, seed %d", name, column, seed)
            folder = trained(run, work, output, seed)
            found.setdefault(column, []).append(model_scores(folder, run, tasks, data, work, output / "scores.json"))
    if name == "peers":
        baselines = {
            "MiniLM text only": lru_cache(maxsize=1)(text_only_encoder),
            "linear baseline": lru_cache(maxsize=1)(lambda: linear_encoder(work, data)),
        }
        for column, make in baselines.items():
            found[column] = [scores_of(tasks, data, lambda _, make=make: make(), out / slug(column) / "scores.json")]
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


def _rows(found: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[Task], key: str) -> dict[str, Any]:
    rows: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        for subset in next(iter(found.values()))[0][task.name]:
            name = task.name if subset == "default" else f"{task.name} ({subset})"
            cells = {
                column: [float(one[task.name][subset][key]) for one in scores if key in one[task.name][subset]]
                for column, scores in found.items()
                if readable(task, column)
            }
            rows[name] = {column: values for column, values in cells.items() if values}
    return rows


def readable(task: Task, column: str) -> bool:
    """Whether a column reads something of both sides: what it cannot ask or find is no measurement of it."""
    reads = READS.get(column)
    return reads is None or all(reads & set(side) for side in (task.query_modalities, task.target_modalities))


def main(arguments: list[str] | None = None) -> None:
    """Command line of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=sorted(COMPARISONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--columns", nargs="+", help="some of them; all by default")
    parser.add_argument("--tasks", nargs="+", help="names, families or groups, in place of the usual ones")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mini"), help="starts, the feature cache, what is trained"
    )
    parser.add_argument("--train-only", action="store_true", help="train, score later")
    parser.add_argument("--out", type=Path, help="JSON of the report")
    args = parser.parse_args(arguments)
    known, about, usual = COMPARISONS[args.which]
    unknown = sorted(set(args.columns or ()) - set(known))
    if unknown:
        parser.error(f"there is no column {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known))}")
    columns = {name: run for name, run in known.items() if not args.columns or name in args.columns}
    out = args.work / "comparison" / args.which
    if args.train_only:
        for seed in args.seeds:
            for column, run in columns.items():
                trained(run, args.work, out / slug(column) / str(seed), seed)
        return
    tasks = find_tasks(args.tasks or usual)
    found = compare(columns, args.seeds, tasks, args.work, out, args.which)
    made = tables(found, tasks, args.seeds)
    for one in made.values():
        print(f"\n{one['title']}\n\n{markdown_table(one)}")
    if args.out is not None:
        chosen = {
            "--seeds": map(str, args.seeds),
            "--columns": map(repr, args.columns or ()),
            "--tasks": args.tasks or (),
        }
        words = [word for option, values in chosen.items() if (listed := [*values]) for word in (option, *listed)]
        command = " ".join(["python -m modeling_sail.evaluation.comparison", args.which, *words])
        write_report(args.out, about, command, made)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main()
