"""What `mini` trains on: Tux Paint, openclipart, emoji and their names, spoken and written, as built-in sources.

``mini:openclipart`` and its kin in a recipe. Unusual: EfficientNet's own classifier is a teacher: its class names,
drawn by its probabilities, caption pictures. Rows of any source whose name or title is a held-out Tux Paint name are
left out, and so are tags that say one; only a class name of the frozen tower may still be one.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..feature_cache import FeatureCache
from ..packages import cache_root
from ..towers import imagenet_class_names, load_lite0_classifier
from .emoji import load_emoji
from .openclipart import load_openclipart
from .tuxpaint import load_tuxpaint, name_key, split_by_name

SPOKEN = ("fr", "es", "en")  # languages that espeak-ng speaks emoji names in
READABLE = ("en", "fr", "es", "ca", "ro", "pt", "it", "de", "nl", "da")  # names that an English tokenizer can spell

Make = Callable[[random.Random], dict[str, Any]]


class Source(list):
    """Records, and the files that they are made from."""

    def __init__(self, records: Iterable[Make], rows: Iterable[dict[str, Any]]) -> None:
        super().__init__(records)
        rows = list(rows)
        self.images = [row["image"] for row in rows]
        self.sounds = [path for row in rows for path in row.get("speech", {}).values()]


# --- sources --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_sources() -> dict[str, list[dict[str, Any]]]:
    """Every training row of the three sources, without the held-out names; "test" and "validation" are Tux Paint's."""
    parts = split_by_name(load_tuxpaint())
    held_out = {name_key(row["names"]["en"]) for part in ("test", "validation") for row in parts[part]}
    openclipart = [row for row in load_openclipart() if name_key(row["title"]) not in held_out]
    emoji = [row for row in load_emoji() if name_key(row["names"]["en"]) not in held_out]
    for row in (*openclipart, *emoji):
        row["tags"] = [tag for tag in row.get("tags", []) if name_key(tag) not in held_out]
    for row in emoji:
        row["speech"] = speak(row, cache_root() / "speech")
    rows = {"tuxpaint": parts["train"], "openclipart": few_per_title(openclipart), "emoji": emoji}
    return rows | {"test": parts["test"], "validation": parts["validation"]}


def few_per_title(rows: list[dict[str, Any]], most: int = 3) -> list[dict[str, Any]]:
    """At most ``most`` rows of each title: openclipart has titles with a hundred near-copies."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        key = name_key(row["title"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= most:
            kept.append(row)
    return kept


def speak(row: dict[str, Any], folder: Path) -> dict[str, str]:
    """``{language: path}`` of one of the row's names, spoken by espeak-ng; made once, then found.

    The language is drawn by the row's id: one clip a row costs a third of the tower's time, and every name is heard.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError(
            "espeak-ng is not installed; `apt-get install espeak-ng`, it speaks part of the training data."
        )
    folder.mkdir(parents=True, exist_ok=True)
    language = random.Random(row["id"]).choice([language for language in SPOKEN if row["names"].get(language)])
    text = row["names"][language]
    path = folder / f"{language}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.wav"
    if not path.exists():
        partial = path.with_suffix(".partial")
        voice = random.Random(text).choice(["", "+f2", "+m3", "+f4", "+m7"])
        subprocess.run([program, "-v", language + voice, "-w", str(partial), text], check=True, capture_output=True)
        partial.replace(path)
    return {language: str(path)}


# --- records ---------------------------------------------------------------------------------------------------------


def mini_source(name: str) -> Source:
    """One of the parts that `mini` is trained on: ``SOURCES``.

    Raises:
        KeyError: no such part.
    """
    return SOURCES[name]()


def _pictures(*names: str) -> list[dict[str, Any]]:
    return [row for name in names for row in load_sources()[name]]


def _spoken_rows(*names: str) -> list[dict[str, Any]]:
    return [row for row in _pictures(*names) if row.get("speech")]


def _titled(row: dict[str, Any]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        text = row["title"]
        if row["tags"] and generator.random() < 0.4:
            tags = generator.sample(row["tags"], min(len(row["tags"]), generator.randint(1, 4)))
            text = ", ".join(tags if generator.random() < 0.4 else [row["title"], *tags])
        return record(row, {"image": row["image"]}, {"text": text}, name_key(text))

    return make


def _named(row: dict[str, Any]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        readable = [language for language in READABLE if row["names"].get(language)]
        language = "en" if generator.random() < 0.7 else generator.choice(readable)
        return record(row, {"image": row["image"]}, {"text": row["names"][language]}, name_key(row["names"]["en"]))

    return make


def _captioned(row: dict[str, Any], teacher: dict[str, Tensor], words: list[str]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        word = words[generator.choices(range(len(words)), teacher[row["image"]].tolist())[0]]
        return record(row, {"image": row["image"]}, {"text": word}, word)

    return make


def said_name(row: dict[str, Any], language: str) -> str:
    """The name as it is spoken, where the tokenizer can spell the language; else the English name."""
    return row["names"].get(language, row["names"]["en"]) if language in READABLE else row["names"]["en"]


def _spoken(row: dict[str, Any], language: str) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        text = said_name(row, language) if generator.random() < 0.7 else row["names"]["en"]
        return record(row, {"audio": row["speech"][language]}, {"text": text}, name_key(row["names"]["en"]))

    return make


def _both(row: dict[str, Any]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        language, english = generator.choice(sorted(row["speech"])), row["names"]["en"]
        said = said_name(row, language)
        text = generator.choice([english, said, f"{english} {said}"])
        item = {"image": row["image"], "audio": row["speech"][language]}
        return record(row, item, {"text": text}, name_key(english))

    return make


def _both_unheard(row: dict[str, Any]) -> Make:
    """`_both` for a model without ears: the same names, the picture alone."""
    both = _both(row)

    def make(generator: random.Random) -> dict[str, Any]:
        found = both(generator)
        return found | {"query": {"image": found["query"]["image"]}}

    return make


def _cross(row: dict[str, Any]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        path = row["speech"][generator.choice(sorted(row["speech"]))]
        return record(row, {"image": row["image"]}, {"audio": path}, name_key(row["names"]["en"]))

    return make


def record(row: dict[str, Any], query: dict[str, Any], target: dict[str, Any], target_id: str) -> dict[str, Any]:
    """A record of `rows.as_row`."""
    return {"id": row["id"], "query": query, "target": target, "target_id": target_id}


def _speech_source(name: str) -> Source:
    rows = _spoken_rows(name)
    return Source([_spoken(row, language) for row in rows for language in row["speech"]], rows)


def _teacher_source() -> Source:
    teacher, words = load_teacher(), imagenet_class_names()
    rows = [row for row in _pictures("tuxpaint", "openclipart", "emoji") if row["image"] in teacher]
    return Source([_captioned(row, teacher, words) for row in rows], rows)


def _source(make: Callable[[dict[str, Any]], Make], rows: list[dict[str, Any]]) -> Source:
    return Source([make(row) for row in rows], rows)


def _same_title_source() -> Source:
    """Two drawings of one title: picture and title beside picture and tags, so both sides have both modalities."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _pictures("openclipart"):
        groups.setdefault(name_key(row["title"]), []).append(row)
    several = [group for group in groups.values() if len(group) > 1]
    return Source([_twins(group) for group in several], [row for group in several for row in group])


def _twins(group: list[dict[str, Any]]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        one, other = generator.sample(group, 2)
        tags = ", ".join(generator.sample(other["tags"], min(4, len(other["tags"])))) or other["title"]
        query = {"image": one["image"], "title": one["title"]}
        return record(one, query, {"image": other["image"], "tags": tags}, name_key(one["title"]))

    return make


def _graded_source(count: int = 4000) -> Source:
    """Two titles and how far their tags agree (Jaccard), for CoSENT; half the pairs share a tag, half are drawn."""
    rows = [row for row in _pictures("openclipart") if len(row["tags"]) > 1]
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for tag in row["tags"]:
            by_tag.setdefault(tag, []).append(row)
    shared = sorted(tag for tag, part in by_tag.items() if 1 < len(part) < 50)
    generator = random.Random(0)
    pairs = [generator.sample(by_tag[generator.choice(shared)], 2) for _ in range(count // 2)]
    pairs += [generator.sample(rows, 2) for _ in range(count // 2)]
    return Source([_graded(one, other) for one, other in pairs], [])


def _graded(one: dict[str, Any], other: dict[str, Any]) -> Make:
    def make(generator: random.Random) -> dict[str, Any]:
        both = set(one["tags"]) & set(other["tags"])
        score = len(both) / len(set(one["tags"]) | set(other["tags"]))
        query, target = {"text": one["title"]}, {"text": other["title"]}
        return record(one, query, target, name_key(other["title"])) | {"score": score}

    return make


SOURCES: dict[str, Callable[[], Source]] = {
    "openclipart": lambda: _source(_titled, _pictures("openclipart")),
    "emoji": lambda: _source(_named, _pictures("emoji")),
    "tuxpaint": lambda: _source(_named, _pictures("tuxpaint")),
    "teacher": _teacher_source,
    "tuxpaint-speech": lambda: _speech_source("tuxpaint"),
    "emoji-speech": lambda: _speech_source("emoji"),
    "both": lambda: _source(_both, _spoken_rows("tuxpaint", "emoji")),
    "tuxpaint-both": lambda: _source(_both, _spoken_rows("tuxpaint")),
    "both-unheard": lambda: _source(_both_unheard, _spoken_rows("tuxpaint", "emoji")),
    "cross": lambda: _source(_cross, _spoken_rows("tuxpaint", "emoji")),
    "same-title": _same_title_source,
    "graded": _graded_source,
    # What `balance` and `select` look at; no stage trains on them.
    "validation-picture": lambda: _source(_named, _pictures("validation")),
    "validation-speech": lambda: _speech_source("validation"),
    "validation-both": lambda: _source(_both, _spoken_rows("validation")),
}


# --- the teacher -----------------------------------------------------------------------------------------------------


def _teacher_path() -> Path:
    return cache_root() / "mini" / "teacher.safetensors"


@torch.inference_mode()
def teacher_probabilities(images: FeatureCache, paths: Iterable[str], temperature: float = 0.7) -> dict[str, Tensor]:
    """(1000,) class probabilities of each picture by EfficientNet-lite0's own classifier, from the cached features."""
    weight, bias = load_lite0_classifier()
    features = {path: images[path][0].float().mean(dim=0) for path in paths if path in images}
    return {path: ((weight @ mean + bias) / temperature).softmax(dim=0) for path, mean in features.items()}


def save_teacher(images: FeatureCache) -> dict[str, Tensor]:
    """Keep the teacher's probabilities of all training pictures, for ``mini:teacher``; returns them."""
    paths = [row["image"] for row in _pictures("tuxpaint", "openclipart", "emoji")]
    teacher = teacher_probabilities(images, paths)
    _teacher_path().parent.mkdir(parents=True, exist_ok=True)
    partial = _teacher_path().with_suffix(".partial")
    save_file({path: values.half() for path, values in teacher.items()}, partial)
    partial.replace(_teacher_path())
    return teacher


def load_teacher() -> dict[str, Tensor]:
    """What `save_teacher` kept.

    Raises:
        FileNotFoundError: nothing yet.
    """
    if not _teacher_path().is_file():
        raise FileNotFoundError(
            "There are no teacher's captions yet; `python -m modeling_sail.training.mini --cache-only` makes them."
        )
    return {path: values.float() for path, values in load_file(_teacher_path()).items()}
