"""Scores of models on tasks, kept in a file: what has been measured is not measured again as long as it still holds.

Room: Embeddings -> **Evaluation**. Unusual: beside each score stand the revision of the task's data and of the scoring,
and the digits of the model; a score of which either has changed is measured anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ..training.files import write_json
from .feature_encoder import Data
from .revisions import task_revision
from .tasks.task import Encode, Task, score

logger = logging.getLogger(__name__)


def scores_of(
    tasks: Sequence[Task], data: Data, encoder_for: Callable[[Task], Encode], path: Path, model: str
) -> dict[str, Any]:
    """``{task: {subset: scores}}``; what the file has of the same data, scoring and model is not measured again.

    Args:
        tasks: the tasks.
        data: of each, by its name.
        encoder_for: the model, for a task; asked only where there is something to measure.
        path: JSON of ``{task: {"revision", "model", "scores"}}``; written after each task.
        model: digits that change with the model's vectors.
    """
    kept = _read(path)
    for task in tasks:
        current = {"revision": task_revision(task, data[task.name]), "model": model}
        if not current.items() <= kept.get(task.name, {}).items():
            encode = encoder_for(task)
            scores = {subset: score(one, encode) for subset, one in data[task.name].items()}
            kept[task.name] = {**current, "scores": scores}
            write_json(path, kept)
    return {task.name: kept[task.name]["scores"] for task in tasks}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What is kept; a file that is broken, or that does not say what its scores are of, is put aside."""
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if all({"revision", "model", "scores"} <= set(entry) for entry in kept.values()):
            return dict(kept)
        why = "does not say of which data and model its scores are"
    except (ValueError, TypeError, AttributeError) as error:
        why = f"is broken ({error})"
    names = (path.with_name(f"{path.stem}.earlier{number or ''}{path.suffix}") for number in count())
    aside = next(name for name in names if not name.exists())
    logger.warning("%s %s; it is kept as %s, and its tasks are measured again.", path, why, aside.name)
    path.rename(aside)
    return {}
