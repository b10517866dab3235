"""Robustness: modalities removed, what an answer came from, short and coarse vectors, on toys with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from modeling_sail.evaluation.robustness import (
    answered_by,
    both_ways,
    by_subset,
    bytes_per_item,
    coarse,
    query_seconds,
    reduced,
    robustness_tables,
)
from modeling_sail.evaluation.tasks.task import Retrieval, unit
from modeling_sail.training.build import build_tiny, save

# Three items whose parts are written as the axis that they lie on: an item is the sum of what it has.
ITEMS = {
    "one": {"image": "0", "audio": "1", "title": "7"},
    "two": {"image": "6", "audio": "2", "title": "3"},
    "three": {"image": "4", "audio": "5", "title": "4"},
}
NAMES = {"one": "0", "two": "2", "three": "4"}


def rows(names: dict[str, str]) -> list[dict]:
    """The items as rows of Tux Paint that bear these names."""
    return [
        {
            "id": one,
            "image": item["image"],
            "speech": {"fr": item["audio"]},
            "names": {"es": item["title"], "en": names[one]},
        }
        for one, item in ITEMS.items()
    ]


TOWARDS, BACK = both_ways(rows(NAMES))


def encode(items, side):
    """Each field's axis, doubled for speech: what an item is near to is known."""
    vectors = np.zeros((len(items), 8), dtype=np.float32)
    for row, item in enumerate(items):
        for field, value in item.items():
            vectors[row, int(value)] += 2.0 if field == "audio" else 1.0
    return vectors


def test_recall_with_a_subset_is_that_of_the_parts_that_are_left() -> None:
    rows = by_subset(TOWARDS, "target", encode)
    assert len(rows) == 7
    assert rows["vision"]["Recall@1"] == [pytest.approx(2 / 3)]  # names 0 and 4 are in pictures
    assert rows["audio"]["Recall@1"] == [pytest.approx(1 / 3)]  # name 2 is said
    assert rows["vision + audio"]["Recall@1"] == [1.0]
    assert rows["text"]["Recall@1"] == [pytest.approx(1 / 3)]


def test_the_other_side_stays_whole() -> None:
    assert TOWARDS.corpus == BACK.queries == ITEMS
    less = reduced(BACK, "query", ("text",))
    assert less.queries["one"] == {"title": "7"} and less.corpus == BACK.corpus
    less = reduced(TOWARDS, "target", ("vision", "audio"))
    assert less.corpus["one"] == {"image": "0", "audio": "1"} and less.queries == TOWARDS.queries == BACK.corpus


def test_items_of_one_name_answer_the_same_query() -> None:
    data, back = both_ways(rows({"one": "Cat", "two": "cat", "three": "dog"}))
    assert set(map(frozenset, data.relevant.values())) == {frozenset({"one", "two"}), frozenset({"three"})}
    assert back.relevant["one"] == back.relevant["two"] and len(back.corpus) == 2


def test_an_answer_came_from_the_modality_that_holds_it() -> None:
    rows = answered_by(TOWARDS, encode, k=1)
    assert rows["vision"]["nearest to the query"] == [pytest.approx(2 / 3)]  # a tie of picture and title goes to vision
    assert rows["audio"]["nearest to the query"] == [pytest.approx(1 / 3)]
    assert rows["text"]["found with it alone"] == [pytest.approx(1 / 3)]
    shares = [row["nearest to the query"][0] for row in rows.values()]
    assert sum(shares) == pytest.approx(1.0)


def test_coarse_vectors_are_near_the_fine_ones_and_the_finer_the_nearer() -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    fine = coarse(vectors, 16, "float32", vectors)
    np.testing.assert_allclose(fine, unit(vectors[:, :16]), atol=1e-6)
    eight = coarse(vectors, 16, "int8", vectors)
    assert np.abs(eight - fine).max() < 2 * (fine.max() - fine.min()) / 255
    signs = coarse(vectors, 16, "binary", vectors)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert ((signs > 0) == (fine > 0)).all()


def test_bytes_are_those_of_the_precision() -> None:
    assert [bytes_per_item(384, one) for one in ("float32", "int8", "binary")] == [1536, 384, 48]


def test_a_query_is_timed_at_each_precision(monkeypatch) -> None:
    monkeypatch.setattr("modeling_sail.evaluation.robustness.CORPUS", 500)
    assert all(0 < query_seconds(16, one, rounds=1, queries=2) < 1 for one in ("float32", "int8", "binary"))


def test_without_a_right_answer_nothing_came_from_anywhere() -> None:
    wrong = {f"name/{name}": frozenset({item}) for name, item in (("0", "two"), ("2", "three"), ("4", "one"))}
    data = Retrieval(TOWARDS.queries, ITEMS, wrong)
    assert answered_by(data, encode, k=1) == {}


def test_a_model_that_lacks_a_modality_is_refused_in_one_line(tmp_path) -> None:
    model, processor = build_tiny(audio_config=None)
    save(model, processor, tmp_path)
    with pytest.raises(ValueError, match="reads no audio"):
        robustness_tables(tmp_path, tmp_path / "work")
