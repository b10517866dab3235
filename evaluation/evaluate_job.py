"""`sail evaluate`: tasks of evaluation/tasks with any SentenceTransformer; mteb's result files, a summary and pictures.

Room: Embeddings -> **Evaluation** -> Card. Unusual: what a folder already has of the same model, data and scoring is
not run again, so a killed job goes on; a task that fails is told at the end and does not stop the others.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .reports import write_histograms
from .tasks import TASKS, find_tasks
from .tasks.names import LANGUAGES
from .tasks.task import Task

logger = logging.getLogger(__name__)

BACKENDS = ("ours", "plain")
PAGE = "separability.html"
SHORT = {code.partition("-")[0]: (code.casefold(), name) for name, (_, code) in LANGUAGES.items()}  # "eng": ISO 639-3
# What a task or a model says of itself in one line; anything else is a mistake of ours, and its traceback is printed.
TOLD = (ValueError, OSError, ImportError, RuntimeError)
COLUMNS = ("recall_at_1", "recall_at_10", "recall_at_50")  # of the table; the summary has all


def list_tasks() -> str:
    """The tasks as a table: name, family, group, subsets, what finds what."""
    rows = [("task", "family", "group", "subsets", "query -> target")]
    for task in TASKS.values():
        sides = [", ".join(side) for side in (task.query_modalities, task.target_modalities)]
        rows.append((task.name, task.family, task.group, " ".join(task.languages), " -> ".join(sides)))
    return _aligned(rows)


def evaluate(
    model: str,
    names: Sequence[str],
    out: Path,
    *,
    batch_size: int = 32,
    subsets: Sequence[str] | None = None,
    backend: str = "ours",
    name: str | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a model on tasks.

    ``out`` gets ``results/<model>/<revision>/<task>.json``, as mteb writes them, ``summary.json``: a row for each
    model, task and subset that this folder has seen, and `PAGE`: the cosines of all of them as histograms.

    Args:
        model: a folder, or an id of the Hub.
        names: tasks, families, groups or patterns (`find_tasks`).
        out: the folder of results.
        batch_size: of the model.
        subsets: names of subsets, or languages ("fr", "fra", "fra-Latn"): of a task that has a subset of the language's
            name that one, of any other those in the language. All by default.
        backend: "ours", or "plain" for the way in which mteb itself wraps a SentenceTransformer.
        name: how results name the model; its id, or its folder's last two names, by default.
        device: as torch names it; the best there is by default.

    Returns:
        The summary's rows of these tasks, in order. ``status`` is "ok"; "skipped" where the model has nothing of what
        a side has; or "failed"; ``reason`` says why there are no scores.

    Raises:
        ValueError: an unknown task, subset or backend, or a model that cannot be loaded.
        OSError: ``out`` cannot be written.
        ImportError: the extra ``[eval]`` is missing.
    """
    if not names:
        raise ValueError("no tasks; name some after --tasks, or see them with --list.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}.")
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: a batch has 1 item at least; 32 is the default.")
    tasks = find_tasks(names)
    chosen = _chosen_subsets(tasks, subsets)
    _check_writable(out)
    read_summary(out)  # before the work, if it is damaged
    encoder_module, run_task = _adapter()
    loaded = load_model(model, device)
    label = name or name_of(model)
    encoder = (encoder_module.SailEncoder if backend == "ours" else encoder_module.plain_encoder)(loaded, label)
    rows: list[dict[str, Any]] = []
    for place, (task, wanted) in enumerate(chosen, start=1):
        print(f"[{place}/{len(chosen)}] {task.name}", flush=True)
        rows += _task_rows(encoder, task, wanted, run_task, out, batch_size)
        write_summary(out, rows)
    write_page(out)
    return rows


def load_model(model: str, device: str | None = None) -> Any:
    """A SentenceTransformer of a folder or an id of the Hub.

    Raises:
        ValueError: there is none.
    """
    from sentence_transformers import SentenceTransformer

    folder = Path(model)
    if folder.exists() and not (folder / "modules.json").is_file():
        hint = f"build one: sail build --preset mini --out {model}"
        raise ValueError(f"{model} holds no SentenceTransformer (no modules.json); {hint}")
    beside = sorted(path.parent.name for path in folder.parent.glob("*/modules.json")) if folder.parent.name else []
    if not folder.exists() and beside:  # a slip, and no id to ask the Hub for
        raise ValueError(f"{model} is no folder; in {folder.parent} there are {', '.join(beside)}.")
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"{model} is no folder, and no id of the Hub (user/name).")
    try:
        return SentenceTransformer(model, trust_remote_code=folder.exists(), device=device)
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:  # torch asserts that there is CUDA
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{model} cannot be loaded as a SentenceTransformer, as a folder or from the Hub: {first}"
        ) from error


def name_of(model: str) -> str:
    """How results name a model: an id as it is, a folder by its last two names (runs/pairs/model: pairs/model)."""
    if not Path(model).exists():
        return model
    parts = Path(model).resolve().parts[-2:]
    return "/".join(part for part in parts if part != os.sep)


def read_summary(out: Path) -> list[dict[str, Any]]:
    """The rows of ``out/summary.json``; none where it is missing.

    Raises:
        ValueError: it is no list of rows.
    """
    path = out / "summary.json"
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        list(map(_row_key, rows))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no summary of `sail evaluate` ({error}); move it away, or name another --out."
        ) from error
    return rows


def write_summary(out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Put rows into ``out/summary.json``.

    A row of the same model, revision, task and subset is replaced, and one of the same task on other data goes.
    """
    path = out / "summary.json"
    current = {_row_key(row)[:3]: row["data"] for row in rows if row["status"] == "ok"}
    merged = {
        _row_key(row): row
        for row in [*read_summary(out), *rows]
        if row["status"] != "ok" or row.get("data") == current.get(_row_key(row)[:3], row.get("data"))
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def write_page(out: Path) -> Path | None:
    """``out/separability.html``: a picture for each model, task and subset of ``out``; None where there is none."""
    groups: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "results").glob("*/*/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # cut off; it is measured again when it is asked for
            continue
        for one in content.get("scores", {}).get("test", ()):
            if "separability_histogram" in one:
                model = f"{path.parent.parent.name.replace('__', '/')} ({path.parent.name[:8]})"
                title = f"{path.stem} {one['hf_subset']}: AUC {one['separability_auc']:.3f}"
                groups.setdefault(model, {})[title] = one["separability_histogram"]
    return write_histograms(out / PAGE, "Separability", groups) if groups else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Task, subset, main score and recalls of each row, or why there are none."""
    lines = [("task", "subset", "main score", "", *COLUMNS)]
    for row in rows:
        if row["status"] != "ok":
            lines.append((row["task"], row["subset"], f"{row['status']}: {row['reason']}"))
            continue
        recalls = [f"{row['scores'][name]:.3f}" if name in row["scores"] else "" for name in COLUMNS]
        lines.append((row["task"], row["subset"], row["main_score"], f"{row['score']:.3f}", *recalls))
    return _aligned(lines)


def _row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "revision", "task", "subset"))


def _task_rows(
    encoder: Any, task: Task, wanted: Sequence[str], run_task: Any, out: Path, batch_size: int
) -> list[dict[str, Any]]:
    """A row for each subset; where the task cannot be run, one that says why."""
    meta = encoder.mteb_model_meta
    row = {"model": meta.name, "revision": meta.revision, "task": task.name, "family": task.family, "group": task.group}
    row |= {"main_score": task.main_score, "score": None, "scores": {}, "status": "ok", "reason": ""}
    for side in (task.query_modalities, task.target_modalities):
        if not set(side) & set(meta.modalities):
            why = f"a side has {', '.join(side)}, the model {', '.join(meta.modalities)}"
            return [row | {"subset": subset, "status": "skipped", "reason": why} for subset in wanted]
    try:
        _check_sounds(encoder, task)
        found = run_task(encoder, task, out, batch_size=batch_size, subsets=wanted)
    except Exception as error:  # whatever a model or a task does, the other tasks go on
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("%s has no scores: %s", task.name, why, exc_info=not isinstance(error, TOLD))
        return [row | {"subset": subset, "status": "failed", "reason": why} for subset in wanted]
    rows = []
    for subset in wanted:
        scores = {name: value for name, value in found[subset].items() if isinstance(value, float)}
        scores.pop("main_score", None)
        data = found[subset]["revision"]
        rows.append(row | {"subset": subset, "score": scores[task.main_score], "scores": scores, "data": data})
    return rows


def _check_sounds(encoder: Any, task: Task) -> None:
    """Refuse, before the work, what mteb's own wrapper would fail at in the midst of it."""
    sounds = "audio" in {*task.query_modalities, *task.target_modalities} & {*encoder.mteb_model_meta.modalities}
    if not sounds or getattr(encoder, "reads_items", False):
        return
    try:
        import_module("torchaudio")
    except (ImportError, OSError) as error:  # not there, or built for another torch
        raise ImportError(
            f"--backend plain reads sounds by torchaudio, which cannot be imported ({error}); "
            "install one that fits this torch, or leave --backend out"
        ) from error


def _chosen_subsets(tasks: Sequence[Task], asked: Sequence[str] | None) -> list[tuple[Task, list[str]]]:
    """Each task with its subsets that were asked for; a task with none of them is left out."""
    if not asked:
        return [(task, list(task.languages)) for task in tasks]
    chosen, known = [], set()
    for task in tasks:
        fitting = {one: _fitting(one, task.languages) for one in asked}
        known |= {one for one, names in fitting.items() if names}
        if names := [name for name in task.languages if any(name in some for some in fitting.values())]:
            chosen.append((task, names))
    if missing := [one for one in asked if one not in known]:
        codes: dict[str, set[str]] = {}
        for task in tasks:
            for name, some in task.languages.items():
                codes.setdefault(name, set()).update(some)
        there = ", ".join(f"{name} ({', '.join(sorted(some))})" for name, some in sorted(codes.items()))
        raise ValueError(f"no task here has the subset or language {', '.join(missing)}; there are {there}.")
    if left := [task.name for task in tasks if task.name not in {one.name for one, _ in chosen}]:
        logger.warning("Left out, as they have no subset %s: %s.", ", ".join(asked), ", ".join(left))
    return chosen


def _fitting(asked: str, languages: Mapping[str, Sequence[str]]) -> list[str]:
    """Subsets of a task that are called so, else those in that language: "en", "eng" and "eng-Latn" are one."""
    alike = next(({name, *both} for name, both in SHORT.items() if asked.casefold() in {name, *both}), set())
    alike = alike or {asked.casefold()}
    named = [name for name in languages if name.casefold() in alike]
    return named or [
        name
        for name, codes in languages.items()
        if any({code.casefold(), code.partition("-")[0].casefold()} & alike for code in codes)
    ]


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _adapter() -> tuple[Any, Any]:
    try:
        from . import mteb_encoder
        from .mteb_tasks import run_task
    except ImportError as error:
        raise ImportError(
            f"evaluation needs the extra [eval] ({error}): pip install -c constraints.txt '.[eval]'"
        ) from error
    return mteb_encoder, run_task


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the last cell of a row widens none."""
    widths = [
        max((len(row[place]) for row in rows if len(row) > place + 1), default=0)
        for place in range(max(map(len, rows)))
    ]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
    return "\n".join(lines)
