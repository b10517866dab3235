"""What a kept score depends on: a task's data with the way of scoring, and a model; digits that change with them.

Room: Embeddings -> **Evaluation**. Unusual: a picture or a sound counts by its bytes and not by its path, so the digits
are those of the same data on any machine, and others once a file is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .tasks.task import KS, SCORING, Pairs, Retrieval, Task

MEDIA = {"image", "images", "audio", "video", "speech"}  # fields whose texts are paths, if there is such a file
DECLARED = ("name", "family", "query_modalities", "target_modalities", "main_score")  # what decides a score, of a task
NOT_OF_THE_MODEL = {".py", ".md"}  # code that ships beside the weights, and cards, which are written after


def task_revision(task: Task, data: Mapping[str, Retrieval | Pairs]) -> str:
    """12 digits that change with what a task asks: its data, its declaration, and the way of scoring (`SCORING`).

    Args:
        task: the task; what it says of itself in words does not count.
        data: what its `load` gave, items of paths and text.

    Raises:
        ValueError: an item holds something else.
    """
    declared = {name: getattr(task, name) for name in DECLARED}
    subsets = {name: _plain(one) for name, one in data.items()}
    return digest_of({"scoring": [SCORING, KS], "declared": declared, "data": subsets})[:12]


def _plain(data: Retrieval | Pairs) -> list[Any]:
    """The order is kept: random negatives are drawn by it."""
    if isinstance(data, Pairs):
        return [list(data.queries), list(data.targets), [int(label) for label in data.labels]]
    relations = [[name, sorted(data.relevant[name]), sorted(data.excluded.get(name, ()))] for name in data.queries]
    return [list(data.queries.items()), list(data.corpus.items()), relations]


def digest_of(content: Any) -> str:
    """64 hexadecimal digits of what JSON can hold, with the bytes of the files that fields of media name.

    Raises:
        ValueError: something that JSON cannot hold.
    """
    try:
        text = json.dumps(_with_bytes(content), sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"Items are made of paths and text, so that it can be told when they change: {error}."
        ) from error
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _with_bytes(value: Any, media: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_bytes(one, media or name in MEDIA) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_bytes(one, media) for one in value]
    if media and isinstance(value, str) and os.path.isfile(value):  # of any text, however long
        return {"sha256": _file_digest(value)}
    return value


def _file_digest(path: str) -> str:
    """sha256 of a file, read once as long as its size and time stay."""
    status = os.stat(path)
    return _read_digest(path, status.st_size, status.st_mtime_ns)


@cache
def _read_digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """64 hexadecimal digits of a saved model: of its weights, configuration, tokenizer and all else but code and cards.

    Raises:
        FileNotFoundError: nothing of that is there.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in NOT_OF_THE_MODEL)
    if not files:
        raise FileNotFoundError(f"There is no model in {folder}.")
    return digest_of([[path.relative_to(folder).as_posix(), _file_digest(str(path))] for path in files])
