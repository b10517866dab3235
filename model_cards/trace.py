"""Where each number of a card comes from: a file, the place in it, what was done to it; and what counts as a number.

Room: Evaluation -> **Card**. Unusual: the builder never writes a number, it asks for one by its place and gets a mark;
when the card is whole, marks become numbers and entries of the trace, and a number without a mark is refused.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.reports import written

Step = str | int
Entry = dict[str, Any]

CHECKPOINT = Path("checkpoint")  # what was read from the checkpoint lies in the trace itself
EVERY = "*"  # in a path: all that is there, one a seed

# A number that stands alone: not part of a name (R@50, float32, lite0, GPL-2.0), a reference (§3.3.5) or a date.
NUMBER = re.compile(r"(?<![\w@§.])(?<!\w[-/])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?![\w@]|[.,]\d|-\w)")
# Code, comments, the metadata block, addresses: no sentences.
_SKIPPED = re.compile(
    r"\A---\n.*?\n---\n|^```.*?^```|`[^`\n]*`|<!--.*?-->|\]\([^)\n]*\)|https?://\S+|arXiv:\S+", re.DOTALL | re.MULTILINE
)
_MARK = re.compile("\ue000(\\d+)\ue001")


def numbers_in(markdown: str) -> list[re.Match[str]]:
    """The numbers of a text's sentences and tables, in their order."""
    blank = _SKIPPED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), markdown)
    return list(NUMBER.finditer(blank))


@dataclass(frozen=True)
class At:
    """A place in a JSON file; ``at / key`` is a place below it."""

    file: Path
    path: tuple[Step, ...] = ()

    def __truediv__(self, step: Step) -> At:
        return At(self.file, (*self.path, step))


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        ValueError: it is not UTF-8; names the file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it again, or restore it.") from error


def read_json(path: Path) -> Any:
    """A JSON file's content; of a ``.jsonl`` file the list of its lines."""
    text = read_text(path)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); measure again, or restore it.") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's content, which must be an object.

    Raises:
        ValueError: it is something else; names the file.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__}; an object is needed: restore it, or move it away."
        )
    return found


def words_at(file: Path, content: Any, paths: Sequence[Sequence[Step]]) -> list[str]:
    """Numbers that stand at places of a file: in a text, in a value, in a place's own name or, of none, the file's.

    Raises:
        ValueError: there is no such place.
    """
    said: list[Any] = []
    for path in paths:
        value = content
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(f"there is no {step!r} at {list(path)}") from error
        said += [path[-1] if path else file.stem.replace("_", " ")]
        said += [value] if isinstance(value, (str, int, float)) else []
    return [found[0] for one in said if not isinstance(one, bool) for found in numbers_in(str(one))]


def values_at(content: Any, path: Sequence[Step]) -> list[float]:
    """The values at a place, one a seed: a number, a list of them, or what `EVERY` finds.

    Raises:
        ValueError: there is nothing, or no number.
    """
    for place, step in enumerate(path):
        if step == EVERY:
            below = content.values() if isinstance(content, dict) else content
            return [value for one in below for value in values_at(one, path[place + 1 :])]
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"there is no {step!r} at {list(path)}") from error
    found = content if isinstance(content, list) else [content]
    if not found or not all(is_number(value) for value in found):
        raise ValueError(f"there is no number at {list(path)}, but {str(content)[:80]!r}")
    return [float(value) for value in found]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; mteb writes NaN where a task has nothing to score."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def by_seed(content: Any, paths: Sequence[Sequence[Step]]) -> list[float]:
    """Mean over several places for each seed; a place with one value has it for every seed."""
    found = [values_at(content, path) for path in paths]
    seeds = max(map(len, found))
    if any(len(values) not in (1, seeds) for values in found):
        raise ValueError(f"places have {sorted(set(map(len, found)))} seeds; one, or as many everywhere, are needed")
    return [statistics.mean(values[min(seed, len(values) - 1)] for values in found) for seed in range(seeds)]


def gains(content: Any, paths: Sequence[Sequence[Step]], minus: Sequence[Sequence[Step]]) -> list[float]:
    """For each seed how far the mean of some places lies above that of others; ``minus`` may be empty."""
    found, other = by_seed(content, paths), by_seed(content, minus) if minus else [0.0]
    seeds = max(len(found), len(other))
    return [found[min(n, len(found) - 1)] - other[min(n, len(other) - 1)] for n in range(seeds)]


def amount(content: Any, entry: Entry) -> float:
    """The number that an entry stands for, not rounded."""
    paths, minus = entry["paths"], entry.get("minus", [])
    if entry["how"] == "places":
        return float(len(paths))
    if entry["how"] == "places above":
        pairs = zip(paths, minus, strict=True)
        return float(sum(statistics.mean(gains(content, [one], [other])) > 0 for one, other in pairs))
    values = gains(content, paths, minus)
    if entry["how"] == "half range":
        return (max(values) - min(values)) / 2
    assert entry["how"] == "mean", entry["how"]
    return statistics.mean(values)


def shown(content: Any, entry: Entry) -> str:
    """An entry's number as the card writes it."""
    if entry["how"] == "text":
        return str(entry["shown"])
    value = written(amount(content, entry) * entry.get("scale", 1), entry["digits"])
    return f"+{value}" if entry.get("signed") and not value.startswith("-") else value


@dataclass
class Trace:
    """Hands out marks for numbers, and turns them into numbers and a trace.

    Attributes:
        checkpoint: what was read from the checkpoint: the content of `CHECKPOINT`.
    """

    checkpoint: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    _read: dict[Path, Any] = field(default_factory=dict)

    def content(self, file: Path) -> Any:
        """A file's content, read once."""
        if file == CHECKPOINT:
            return self.checkpoint
        if file not in self._read:
            self._read[file] = read_json(file)
        return self._read[file]

    def values(self, *at: At, minus: Sequence[At] = ()) -> list[float]:
        """The values of each seed behind a number, not rounded."""
        return gains(self.content(at[0].file), [one.path for one in at], [one.path for one in minus])

    def number(self, *at: At, how: str = "mean", digits: int = 0, minus: Sequence[At] = (), **more: Any) -> str:
        """A mark for a number.

        Args:
            at: the places, all in one file; for each seed their mean is taken.
            how: "mean" or "half range" over the seeds, "places" (how many), "places above" (their ``minus``).
            digits: decimals.
            minus: places that are subtracted.
            more: ``scale``, a factor; ``signed`` for a leading plus.

        Raises:
            ValueError: there is no such number; names the file.
        """
        entry: Entry = {"file": at[0].file, "paths": [list(one.path) for one in at], "how": how, "digits": digits}
        entry |= {"minus": [list(one.path) for one in minus]} if minus else {}
        entry |= more
        try:
            entry["shown"] = shown(self.content(at[0].file), entry)
        except ValueError as error:
            raise ValueError(f"{at[0].file}: {error}.") from error
        return self._mark(entry)

    def spread(self, *at: At, digits: int = 3, minus: Sequence[At] = (), **more: Any) -> str:
        """Marks for the mean and, of several seeds, half the distance of the extremes."""
        mean = self.number(*at, digits=digits, minus=minus, **more)
        if len(self.values(*at, minus=minus)) < 2:
            return mean
        more.pop("signed", None)
        return f"{mean} ±{self.number(*at, how='half range', digits=digits, minus=minus, **more)}"

    def text(self, said: Any, *at: At) -> str:
        """A file's own words, or the name of a row, with marks for the numbers in it.

        Args:
            said: the words.
            at: where they stand, all in one file; the name of a row is that of its place.

        Raises:
            ValueError: a number that is not there; names the file.
        """
        said = " ".join(str(said).split())
        if said.count("`") % 2:
            said = said.replace("`", "'")  # half a pair would make code of what follows
        parts, end = [], 0
        for found in numbers_in(said):
            entry = {"file": at[0].file, "paths": [list(one.path) for one in at], "how": "text", "shown": found[0]}
            self._check_text(entry)
            parts += [said[end : found.start()], self._mark(entry)]
            end = found.end()
        return "".join([*parts, said[end:]]).replace("|", "\\|")

    def _check_text(self, entry: Entry) -> None:
        file = entry["file"]
        try:
            told = words_at(file, self.content(file), entry["paths"])
        except ValueError as error:
            raise ValueError(f"{file}: {error}.") from error
        if entry["shown"] not in told:
            raise ValueError(f"{file}: there is no {entry['shown']} at {entry['paths']}, but {told}.")

    def _mark(self, entry: Entry) -> str:
        self.entries.append(entry)
        return f"\ue000{len(self.entries) - 1}\ue001"

    def finish(self, marked: str) -> tuple[str, list[Entry]]:
        """The text with its numbers, and the entry of each number in the order of the text.

        Raises:
            ValueError: a number that nobody asked for by its place: it was typed.
        """
        used = [self.entries[int(found[1])] for found in _MARK.finditer(marked)]
        text = _MARK.sub(lambda found: self.entries[int(found[1])]["shown"], marked)
        found = numbers_in(text)
        for place, number in enumerate(found):
            if place >= len(used) or number[0] != used[place]["shown"]:
                line = text[: number.end()].rpartition("\n")[2][-80:]
                raise ValueError(
                    f"The number {number[0]} of the card, at the end of {line!r}, comes from no file: take it out of "
                    "the template, or let the builder ask for it."
                )
        if len(found) != len(used):
            raise ValueError(
                f"{len(used) - len(found)} numbers of the card stand in code or comments, where none are looked for: a "
                "name or a note in the result files opens some with ` or <!--."
            )
        return text, used
