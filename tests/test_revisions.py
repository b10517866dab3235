"""Kept scores hold as long as data, scoring and model are the same: whatever changes one of them is measured anew."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modeling_sail.evaluation import feature_encoder, revisions
from modeling_sail.evaluation.kept_scores import scores_of
from modeling_sail.evaluation.revisions import digest_of, folder_digest, task_revision
from modeling_sail.evaluation.tasks.task import Pairs, Retrieval, Task


def toy_task(**other: Any) -> Task:
    fields = {"group": "g", "description": "d", "source": "s", "licence": "mit", "date": ("2026-01-01", "2026-01-02")}
    sides = {"query_modalities": ["text"], "target_modalities": ["text"], "languages": {"default": ["eng-Latn"]}}
    named = {"name": "Toy", "family": "i2i", "main_score": "recall_at_1", "load": lambda: {"default": toy_data()}}
    return Task(**fields | sides | named | other)


def toy_data(**other: Any) -> Retrieval:
    corpus = {name: {"text": name} for name in "abc"}
    parts = {"queries": {"q": {"text": "a"}}, "corpus": corpus, "relevant": {"q": frozenset("a")}}
    return Retrieval(**parts | {"excluded": {"q": frozenset("c")}} | other)


@pytest.fixture
def drawing(tmp_path: Path) -> str:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").write_bytes(b"one")
    return str(tmp_path / "here" / "a.png")


# --- revisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"queries": {"q": {"text": "b"}}},
        {"queries": {"other": {"text": "a"}}, "relevant": {"other": frozenset("a")}, "excluded": {}},
        {"corpus": {name: {"text": name} for name in "abcd"}},
        {"corpus": {name: {"title": name} for name in "abc"}},
        {"corpus": {name: {"text": name} for name in "bac"}},  # negatives are drawn by the order
        {"relevant": {"q": frozenset("ab")}},
        {"excluded": {}},
        {"queries": {"q": {"sequence": [{"text": "a"}]}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_revision_changes_with_the_data(change: dict[str, Any]) -> None:
    task = toy_task()
    known = task_revision(task, {"default": toy_data()})
    assert known == task_revision(task, {"default": toy_data()}) and len(known) == 12
    assert known != task_revision(task, {"default": toy_data(**change)})


def test_a_revision_changes_with_pairs_subsets_the_scoring_and_what_decides_the_scores(monkeypatch) -> None:
    data = {"default": toy_data()}
    known = task_revision(toy_task(), data)
    others = [
        task_revision(toy_task(family="q2i"), data),
        task_revision(toy_task(main_score="ndcg_at_10"), data),
        task_revision(toy_task(query_modalities=["text", "image"]), data),
        task_revision(toy_task(), {"en": toy_data()}),
        task_revision(toy_task(), {"default": Pairs([{"text": "a"}], [{"text": "b"}], [1])}),
        task_revision(toy_task(), {"default": Pairs([{"text": "a"}], [{"text": "b"}], [0])}),
    ]
    monkeypatch.setattr(revisions, "SCORING", revisions.SCORING + 1)
    others.append(task_revision(toy_task(), data))
    assert len({known, *others}) == 8
    monkeypatch.undo()
    assert task_revision(toy_task(description="said otherwise", date=("2020-01-01", "2020-01-02")), data) == known


def test_a_picture_counts_by_its_bytes_wherever_it_lies(drawing: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    copy = tmp_path / "there" / "b.png"
    copy.write_bytes(b"one")
    known = digest_of({"image": drawing})
    assert digest_of({"image": str(copy)}) == known
    assert digest_of({"text": drawing}) != digest_of({"text": str(copy)}), "a text is what it says"
    copy.write_bytes(b"two")  # as long as it was
    os.utime(copy, ns=(0, 0))
    assert digest_of({"image": str(copy)}) != known
    assert digest_of({"images": [drawing, str(copy)]}) != digest_of({"images": [str(copy), drawing]})
    long = "data:image/png;base64," + "A" * 5000
    assert digest_of({"image": long}) != digest_of({"image": "gone.png"})
    assert digest_of({"speech": {"fr": drawing}}) == digest_of({"speech": {"fr": str(tmp_path / "here" / "a.png")}})


def test_what_no_file_holds_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="paths and text"):
        digest_of({"image": np.zeros(3)})


def test_a_folder_of_a_model_is_known_by_all_but_its_code_and_card(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    known = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "modeling_sail.py").write_text("pass")
    assert folder_digest(tmp_path) == known
    (tmp_path / "config.json").write_text('{"causal": true}')
    assert folder_digest(tmp_path) != known
    with pytest.raises(FileNotFoundError, match="no model"):
        folder_digest(tmp_path / "nothing")


def test_a_baseline_is_known_by_its_packages_and_by_what_it_is_fitted_on(monkeypatch) -> None:
    monkeypatch.setattr(feature_encoder, "load_sources", lambda: {"tuxpaint": [{"id": "a", "image": "a.png"}]})
    (_, text), (_, linear) = feature_encoder.BASELINES.values()
    known = text(), linear()
    assert known == (text(), linear()) and len(set(known)) == 2
    monkeypatch.setattr(feature_encoder, "load_sources", lambda: {"tuxpaint": []})
    assert text() == known[0] and linear() != known[1]


# --- kept scores ------------------------------------------------------------------------------------------------------


class Asked:
    """Counts how often it is asked for an encoder."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def __call__(self, task: Task) -> Any:
        self.tasks.append(task.name)
        return lambda items, side: np.stack([np.eye(3)["abc".index(item["text"])] for item in items])


def measured(path: Path, asked: Asked, data: Any = None, model: str = "m", names: tuple[str, ...] = ("Toy",)) -> Any:
    tasks = [toy_task(name=name) for name in names]
    return scores_of(tasks, {name: data or {"default": toy_data()} for name in names}, asked, path, model)


def test_scores_are_kept_and_only_what_is_new_is_measured(tmp_path: Path) -> None:
    path, asked = tmp_path / "deep" / "scores.json", Asked()
    first = measured(path, asked)
    assert first["Toy"]["default"]["recall_at_1"] == 1.0
    assert measured(path, asked) == first and asked.tasks == ["Toy"]
    both = measured(path, asked, names=("Toy", "More"))
    assert asked.tasks == ["Toy", "More"] and both["Toy"] == first["Toy"]
    kept = json.loads(path.read_text())
    assert set(kept["Toy"]) == {"revision", "model", "scores"} and kept["Toy"]["model"] == "m"


def test_other_data_another_scoring_and_another_model_are_measured_anew(tmp_path: Path, monkeypatch) -> None:
    path, asked = tmp_path / "scores.json", Asked()
    measured(path, asked)
    changed = {"default": toy_data(relevant={"q": frozenset("b")})}
    assert measured(path, asked, changed)["Toy"]["default"]["recall_at_1"] == 0.0
    measured(path, asked, changed, model="other")
    monkeypatch.setattr(revisions, "SCORING", revisions.SCORING + 1)
    measured(path, asked, changed, model="other")
    assert asked.tasks == ["Toy"] * 4
    measured(path, asked, changed, model="other")
    assert len(asked.tasks) == 4


@pytest.mark.parametrize(
    "content",
    ['{"Toy": {"default": {"recall_at_1": 0.25}}}', '{"Toy": {"defa', "[]x", "[1]", '{"Toy": 3}', ""],
    ids=["earlier", "cut", "no JSON", "list", "number", "empty"],
)
def test_scores_that_do_not_say_what_they_are_of_are_put_aside_never_lost(tmp_path: Path, content, caplog) -> None:
    path, asked = tmp_path / "scores.json", Asked()
    for number in ("", "1"):
        path.write_text(content)
        assert measured(path, asked)["Toy"]["default"]["recall_at_1"] == 1.0
        assert (tmp_path / f"scores.earlier{number}.json").read_text() == content
    assert asked.tasks == ["Toy", "Toy"] and "scores.earlier1.json" in caplog.text


def test_a_task_that_fails_leaves_what_was_measured_before_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"

    def failing(task: Task) -> Any:
        if task.name == "Gone":
            raise RuntimeError("gone")
        return Asked()(task)

    with pytest.raises(RuntimeError, match="gone"):
        measured(path, failing, names=("Toy", "Gone"))
    assert set(json.loads(path.read_text())) == {"Toy"}


def test_a_task_is_not_changed_by_what_it_says_of_itself(tmp_path: Path) -> None:
    path, asked = tmp_path / "scores.json", Asked()
    measured(path, asked)
    said = dataclasses.replace(toy_task(), description="said otherwise")
    scores_of([said], {"Toy": said.load()}, asked, path, "m")
    assert asked.tasks == ["Toy"]
