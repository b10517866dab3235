"""The paper's tables end to end on a small log: trained by the recipe, asked, kept; and what the tables show."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from modeling_sail.evaluation import cre
from modeling_sail.evaluation.cre import (
    Questions,
    embeddings_of,
    label_popularity,
    ranker_table,
    recommenders,
    spread,
    tables,
)
from modeling_sail.training.recommendation.prepare import tables_of

from .test_prepare import SETTINGS, event_rows, known_of

QUICK = [
    "defaults.freeze=[]",
    "defaults.save_steps=2",
    *(
        f"stages.{name}.{key}={value}"
        for name in ("content", "seq2item", "id2item")
        for key, value in (("steps", 2), ("batch_size", 4))
    ),
]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("cre")
    known = known_of(event_rows())
    return known, cre.train(known, tiny_folder, work, SETTINGS, QUICK), work


def test_the_recipe_trains_every_stage_on_any_log(trained) -> None:
    known, folders, work = trained
    assert list(folders) == ["before", "content", "seq2item", "id2item"]
    vectors = [embeddings_of(folder, known.items.records, work / f"{name}.npy") for name, folder in folders.items()]
    assert all(one.shape == vectors[0].shape for one in vectors)
    assert all(not np.allclose(one, other) for one, other in zip(vectors, vectors[1:], strict=False))


def test_every_question_has_an_answer_between_0_and_1(trained, monkeypatch) -> None:
    known, folders, work = trained
    monkeypatch.setattr(cre, "ID_CLUSTERS", 3)
    monkeypatch.setattr(cre, "alignment", lambda *args, **kwargs: {"nmi": 0.5})
    asked = Questions(known, tables_of(work / "data"), 0)
    mine = asked.embedding(embeddings_of(folders["id2item"], known.items.records, work / "id2item.npy"))
    assert {"vanilla R@1", "filtered R@25", "unseen R@50", "unseen among unseen R@10", "content-i2i R@50"} <= set(mine)
    assert {"ID-i2i R@100", "ID-i2i of unseen items R@50", "copairs nmi"} <= set(mine)
    assert all(0 <= value <= 1 for value in mine.values())
    found = recommenders(asked)
    assert {"popularity", "popularity of labels", "bpr", "als", "graph", "als, its own users", "SASRec"} <= set(found)
    for name in ("als", "bpr", "SASRec"):  # they have nothing to say of an item without an event
        assert found[name]["unseen R@50"] == found[name]["unseen among unseen R@50"] == 0
    truth = np.zeros((len(known.items), 2), dtype=np.float32)
    truth[np.arange(24), (np.arange(24) >= 12).astype(int)] = 1  # the two tastes
    assert (
        asked.embedding(truth + 0.01 * np.random.default_rng(0).normal(size=truth.shape))["vanilla R@10"]
        > mine["vanilla R@10"]
    )


def test_labels_say_what_their_items_say() -> None:
    labels = [frozenset("a"), frozenset("a"), frozenset("ab"), frozenset("b"), frozenset()]
    found = label_popularity(np.array([4.0, 2.0, 0.0, 8.0, 9.0], dtype=np.float32), labels)
    np.testing.assert_allclose(found, [2.0, 2.0, 3.0, 4.0, 0.0])


def test_tables_show_the_mean_and_half_the_distance_of_the_extremes() -> None:
    assert spread([0.1, 0.2, 0.4]) == "0.233 ±0.150"
    assert spread([0.25]) == "0.250"
    values = [{"base": {"auc": 0.7, "gauc": 0.6}, "id2item: both": {"auc": 0.7 + n, "gauc": 0.6}} for n in (0.1, 0.2)]
    asked = [
        {"als": {"vanilla R@1": n}, "mini": {"vanilla R@1": 0.5, "filtered R@1": 0.1, "copairs tau": 0.2}}
        for n in (0, 1)
    ]
    results = [{"table": asked[n], "ranker": {"liked": values[n]}} for n in (0, 1)]
    first, cold, copairs, _ = tables(results).split("\n\n")
    assert first.splitlines()[0] == "| | vanilla R@1 | filtered R@1 |"
    assert first.splitlines()[2:] == ["| als | 0.500 ±0.500 |  |", "| mini | 0.500 ±0.000 | 0.100 ±0.000 |"]
    assert len(cold.splitlines()) == 2 and copairs.splitlines()[2:] == ["| mini | 0.200 ±0.000 |"]
    assert (
        "| liked | id2item: both | 0.8500 ±0.0500 | 0.1500 ±0.0500 | 0.6000 ±0.0000 | 0.0000 ±0.0000 |"
        in ranker_table(results)
    )


def test_the_picture_has_a_bar_of_the_mean_for_each_stage_and_question() -> None:
    asked = [{name: dict.fromkeys(cre.SHOWN, value) for name in ("als", "before", "id2item")} for value in (0.2, 0.4)]
    root = ElementTree.fromstring(cre.picture([{"table": one} for one in asked]))
    bars = [one for one in root.iter() if one.tag.endswith("rect") and one.get("width") == "22"]
    assert len(bars) == 2 * len(cre.SHOWN)  # als is no stage
    assert {one.get("height") for one in bars} == {"150.0"}  # 0.3 where the axis has 0.4 in 200 pixels
    assert [one.text for one in root.iter() if one.tag.endswith("text") and one.text in cre.SHOWN] == list(cre.SHOWN)


def test_an_answer_that_is_there_is_read(tmp_path) -> None:
    assert cre._kept(tmp_path / "a.json", lambda: {"x": 1}) == {"x": 1}
    assert cre._kept(tmp_path / "a.json", lambda: {"x": 2}) == {"x": 1}


def test_the_settings_of_the_tables_set_items_aside() -> None:
    assert 0 < cre.SETTINGS.unseen_share < 0.5
