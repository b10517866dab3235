"""The card of mini: each of its numbers stands in a file, read anew from its trace."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from modeling_sail.evaluation.reports import file_sha256
from modeling_sail.model_cards import card as card_module
from modeling_sail.model_cards import checkpoint as checkpoint_module
from modeling_sail.model_cards import results

from .test_cards import CARDS, words


def leaves(content: Any, path: list) -> list[float]:
    """Values at a place, written anew for this test."""
    if not path:
        return content if isinstance(content, list) else [content]
    if path[0] == "*":
        return [
            value
            for one in (content.values() if isinstance(content, dict) else content)
            for value in leaves(one, path[1:])
        ]
    return leaves(content[path[0]], path[1:])


def recomputed(content: Any, entry: dict) -> float:
    """An entry's value from the file alone, written anew for this test."""

    def seeds(paths: list) -> list[float]:
        found = [leaves(content, path) for path in paths]
        count = max(len(values) for values in found)
        return [
            statistics.fmean((values * count if len(values) == 1 else values)[n] for values in found)
            for n in range(count)
        ]

    mine, other = seeds(entry["paths"]), seeds(entry["minus"]) if entry.get("minus") else [0.0]
    count = max(len(mine), len(other))
    mine, other = (values * count if len(values) == 1 else values for values in (mine, other))
    gaps = [one - two for one, two in zip(mine, other, strict=True)]
    if entry["how"] == "places":
        return len(entry["paths"])
    if entry["how"] == "places above":
        pairs = zip(entry["paths"], entry["minus"], strict=True)
        return sum(
            statistics.fmean(leaves(content, one)) > statistics.fmean(leaves(content, two)) for one, two in pairs
        )
    value = (max(gaps) - min(gaps)) / 2 if entry["how"] == "half range" else statistics.fmean(gaps)
    return value * entry.get("scale", 1)


def content_of(trace: dict, folder: Path, file: str) -> Any:
    if file == "checkpoint":
        return trace["checkpoint"]
    text = (folder / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)


def said_at(file: str, content: Any, path: list) -> list[str]:
    """Numbers of the text at a place, and of the place's own name; of the whole file's, of its name alone."""
    for step in path:
        content = content[step]
    name = path[-1] if path else Path(file).stem.replace("_", " ")
    return words(str(name)) + (words(str(content)) if isinstance(content, (str, int, float)) else [])


def faults(path: Path) -> list[str]:
    """What a card says that its files do not."""
    trace = json.loads(path.with_suffix(".trace.json").read_text(encoding="utf-8"))
    text, folder, found = path.read_text(encoding="utf-8"), path.parent, []
    if words(text) != [entry["shown"] for entry in trace["numbers"]]:
        found.append("the card's numbers are not those of its trace")
    values = [f"{value.metric_value:.4f}" for value in ModelCard(text).data.eval_results or []]
    if values != [entry["shown"] for entry in trace["metadata"]]:
        found.append("the model-index is not that of the trace")
    for file, sha in trace["sources"].items():
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != sha:
            found.append(f"{file} is no longer the file that the card was made from")
    files = {entry["file"] for entry in [*trace["numbers"], *trace["metadata"]]}
    contents = {file: content_of(trace, folder, file) for file in files}
    for entry in [*trace["numbers"], *trace["metadata"]]:
        content = contents[entry["file"]]
        if entry["how"] == "text":
            same = any(entry["shown"] in said_at(entry["file"], content, path) for path in entry["paths"])
        else:
            shown = float(entry["shown"].replace(",", ""))
            unit = 10 ** -entry["digits"] if entry["digits"] >= 0 else abs(shown) / 10
            same = abs(recomputed(content, entry) - shown) <= 0.5000001 * unit
        if not same:
            found.append(f"{entry}")
    return found


MADE_BY = "make the card again: sail card build/mini --out model_cards/mini.md"


def test_every_number_of_the_card_of_mini_is_in_a_result_file() -> None:
    assert faults(CARDS / "mini.md") == [], MADE_BY
    assert len(words((CARDS / "mini.md").read_text(encoding="utf-8"))) > 100


def test_the_card_of_mini_is_about_the_weights_that_ship() -> None:
    text = (CARDS / "mini.md").read_text(encoding="utf-8")
    assert file_sha256(checkpoint_module.WEIGHTS / "mini" / "trained.safetensors") in text, MADE_BY
    trace = json.loads((CARDS / "mini.trace.json").read_text(encoding="utf-8"))
    assert all(one["sha256"] in text for one in trace["checkpoint"]["weights"].values())
    assert '"/' not in (CARDS / "mini.trace.json").read_text(encoding="utf-8"), "a path of this machine"


def test_every_report_about_mini_is_in_its_card_and_every_picture_lies_there() -> None:
    text = (CARDS / "mini.md").read_text(encoding="utf-8")
    listed = json.loads((CARDS / "mini.trace.json").read_text(encoding="utf-8"))["sources"]
    weights = json.loads((CARDS / "mini.trace.json").read_text(encoding="utf-8"))["checkpoint"]["weights"]
    for path in card_module.RESULTS.glob("*.json*"):
        content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
        if "tables" in content:
            assert content["model"], f"{path.name} does not say what it is about"
            mine = content["model"].get("preset") == "mini" or content["model"].get("hash") in {
                one["sha256"] for one in weights.values()
            }
        else:
            mine = path.stem in results.EARLIER
            assert mine, f"no card knows what {path.name} is about"
        assert (f"../evaluation/results/{path.name}" in listed) == mine, MADE_BY
    for command in re.findall(r"^`(python -m [^`]*|sail [^`]*)`", text, re.MULTILINE):
        assert re.fullmatch(r"[\w .;/-]+", command), f"nobody can run {command}"
    pictures = re.findall(r"!\[[^\]]*\]\((.+?)\)", text)
    assert pictures and all((CARDS / place).is_file() for place in pictures)
    assert {path.relative_to(CARDS).as_posix() for path in (CARDS / "figures" / "mini").iterdir()} == set(pictures)


@pytest.mark.parametrize("change", ["a value", "a value of the model-index", "the card"])
def test_a_changed_result_fails_until_the_card_is_made_again(tmp_path, change) -> None:
    for name in ("mini.md", "mini.trace.json"):
        (tmp_path / "model_cards").mkdir(exist_ok=True)
        shutil.copy(CARDS / name, tmp_path / "model_cards" / name)
    trace = json.loads((CARDS / "mini.trace.json").read_text(encoding="utf-8"))
    for file in trace["sources"]:
        target = tmp_path / "model_cards" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CARDS / file, target)
    path = tmp_path / "model_cards" / "mini.md"
    assert faults(path) == [], MADE_BY
    if change == "the card":
        told = path.read_text(encoding="utf-8")
        changed = re.sub(r"\| 0\.[1-8](\d\d) \|", r"| 0.9\1 |", told, count=1)
        assert changed != told
        path.write_text(changed, encoding="utf-8")
        assert faults(path) == ["the card's numbers are not those of its trace"]
        return
    name = "evaluation/results/progressive.json" if change == "a value" else "training/weights/mini/retrieval.json"
    content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    row = content["mini"]["0"][0] if change == "a value" else content[0]
    row["model R@10"] += 0.1
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    found = faults(path)
    assert "no longer the file" in found[0] and len(found) > 1, "by the value, not by the hash alone"
