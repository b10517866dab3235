"""Files that are there whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``path`` if all goes well; a kill leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file; a kill leaves the old one."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """The same for what JSON can hold; anything else is written as its string."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")
