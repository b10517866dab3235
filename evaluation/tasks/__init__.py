"""Evaluation tasks: one file a kind, each with ``TASKS``; here they are found by name.

To add one: a `Task` in the file that fits, or a file of its own and its name below.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from . import classification, collaborative, content, pairs, queries, search, sequences
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for file in (content, search, collaborative, queries, pairs, classification, sequences)
    for task in file.TASKS
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by their names.

    Args:
        names: of tasks ("TuxPaintSameName"), families ("i2i"), groups ("content understanding"), or patterns of these
            ("TuxPaint*"); case does not matter.

    Returns:
        The tasks in the order asked, each once; of a family, a group or a pattern in the order of `TASKS`.

    Raises:
        ValueError: a name fits no task; says what comes near.
    """
    found: dict[str, Task] = {}
    for name in names:
        fitting = {task.name: task for task in TASKS.values() if _fits(task, name.casefold())}
        if not fitting:
            raise ValueError(_unknown(name))
        found |= {key: task for key, task in fitting.items() if key not in found}
    return list(found.values())


def _fits(task: Task, pattern: str) -> bool:
    return any(fnmatchcase(name.casefold(), pattern) for name in (task.name, task.family, task.group))


def _unknown(name: str) -> str:
    families, groups = (dict.fromkeys(getattr(task, kind) for task in TASKS.values()) for kind in ("family", "group"))
    known = {one.casefold(): one for one in [*TASKS, *families, *groups]}
    near = [known[one] for one in difflib.get_close_matches(name.casefold(), known, n=3)]
    hint = f"Did you mean {', '.join(near)}?" if near else f"There are {', '.join(TASKS)}."
    return (
        f"No task, family or group fits {name!r}. {hint} Families: {', '.join(families)}; groups: {', '.join(groups)}."
    )
