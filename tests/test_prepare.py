"""`sail behaviour`: what a recipe trains on comes from the events before the split alone, and again after a kill."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from modeling_sail.training.behaviour_job import read_behaviour
from modeling_sail.training.recommendation import prepare as room
from modeling_sail.training.recommendation.behaviour import Interactions, Items, load_items
from modeling_sail.training.recommendation.interests import INTERESTS, Limits, earlier, mine_interests
from modeling_sail.training.recommendation.prepare import (
    Settings,
    clusters_of,
    content_rows,
    evidence_of,
    known_behaviour,
    prepare,
    tables_of,
)
from modeling_sail.training.recommendation.tables import IDTable, save_tables
from modeling_sail.training.recommendation.teachers import TeacherSettings
from modeling_sail.training.rows import as_row

from modeling_sail.cli import main

from .conftest import picture

NUM_USERS, NUM_ITEMS = 30, 24
SPLIT = 1000.0
FAST = TeacherSettings(dim=8, bpr_epochs=3, als_iterations=2, item2vec_epochs=2)
SETTINGS = Settings(
    split_time=SPLIT, limits=Limits(behaviour=0.05, targets=3), clusters=4, teacher=FAST, unseen_share=0.2
)


def event_rows(seed: int = 0) -> list[dict]:
    """Thirty users of two tastes; each chooses sixteen items, the last four after the split."""
    numbers = np.random.default_rng(seed)
    rows = []
    for user in range(NUM_USERS):
        half = np.arange(NUM_ITEMS // 2) + (user % 2) * NUM_ITEMS // 2
        other = np.setdiff1d(np.arange(NUM_ITEMS), half)
        items = numbers.permutation(np.concatenate([numbers.permutation(half)[:12], numbers.permutation(other)[:4]]))
        for place, item in enumerate(items):
            time = 10.0 * place + user if place < 12 else SPLIT + 10 * place
            shown = ["fine", "liked", "loved"][: int(numbers.integers(1, 4))]
            rows.append({"user": f"u{user}", "item": f"i{item}", "time": time, "behaviours": shown})
    return rows


def item_rows() -> list[dict]:
    taste = lambda n: "drama" if n < NUM_ITEMS // 2 else "war"  # noqa: E731
    return [
        {"id": f"i{n}", "title": f"film {n}", "nickname": f"author {n % 5}", "labels": [taste(n), f"l{n % 3}"]}
        for n in range(NUM_ITEMS)
    ]


def embed(items) -> np.ndarray:
    numbers = [int(item["id"][1:]) for item in items]
    return np.random.default_rng(5).normal(size=(NUM_ITEMS, 16)).astype(np.float32)[numbers] + 1.0


def known_of(rows, settings=SETTINGS):
    events, items = pa.Table.from_pylist(rows), pa.Table.from_pylist(item_rows())
    return known_behaviour(Interactions.from_table(events), Items.from_table(items), settings)


def contents(folder: Path) -> dict[str, bytes | list]:
    found = {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}
    report = json.loads((folder / "report.json").read_text())
    return found | {"interests": report["interests"], "teachers": report["teachers"]["tables"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("behaviour")
    report = prepare(known_of(event_rows()), embed, folder, SETTINGS, progress=False)
    return folder, report


def test_the_folder_holds_what_a_recipe_trains_on(made) -> None:
    folder, report = made
    items = {row["id"]: row for row in pq.read_table(folder / "items.parquet").to_pylist()}
    assert len(items) == NUM_ITEMS
    for name in INTERESTS:
        rows = pq.read_table(folder / f"{name}.parquet").to_pylist()
        assert len(rows) == report["interests"][name]["kept"] > 0
        for row in rows:
            read = as_row(row, "r", items=items)
            assert read.target["id"] not in {item["id"] for item in read.query}
            assert 1 <= len(read.query) <= 10
    tables = tables_of(folder)
    assert set(tables) == {"bpr", "als", "item2vec", "graph"}
    assert {row["item"] for row in pq.read_table(folder / "ids.parquet").to_pylist()} == set(tables["als"].ids)
    assert "Interests" in (folder / "report.html").read_text()


def test_no_event_after_the_split_reaches_a_sequence_or_a_teacher(made, tmp_path) -> None:
    numbers = np.random.default_rng(9)
    poisoned = []
    for row in event_rows():
        if row["time"] >= SPLIT:  # another item, all behaviours, another time, twice
            row = {**row, "item": f"i{numbers.integers(NUM_ITEMS)}", "behaviours": ["fine", "liked", "loved"]}
            row["time"] += float(numbers.integers(1000))
            poisoned.append({**row, "time": row["time"] + 1})
        poisoned.append(row)
    known = known_of(poisoned)
    assert len(known.interactions) != len(known_of(event_rows()).interactions)
    prepare(known, embed, tmp_path, SETTINGS, progress=False)
    assert contents(tmp_path) == contents(made[0])


def test_no_event_of_an_unseen_item_reaches_a_sequence_or_a_teacher(made, tmp_path) -> None:
    known = known_of(event_rows())
    unseen = {known.items.ids[place] for place in np.flatnonzero(known.unseen)}
    assert len(unseen) == round(0.2 * NUM_ITEMS)
    kept = [row for row in event_rows() if row["item"] not in unseen]
    prepare(known_of(kept), embed, tmp_path, SETTINGS, progress=False)
    found = contents(made[0])
    assert contents(tmp_path) == found
    for name in INTERESTS:
        assert not unseen & {item for row in found[f"{name}.parquet"] for item in (*row["sequence"], row["target"])}
    assert not unseen & {name for table in tables_of(made[0]).values() for name in table.ids}


def test_a_target_reaches_no_sequence_of_its_pair_and_none_before_it() -> None:
    known = known_of(event_rows())
    limits = replace(SETTINGS.limits, targets=5)
    evidence = evidence_of(known, embed(known.items.records), SETTINGS)
    found = mine_interests(known.learned, evidence, split_time=SPLIT, limits=limits, progress=False)
    times = {
        (user, item): time
        for user, item, time in zip(known.learned.user, known.learned.item, known.learned.time, strict=True)
    }
    for pairs in found.pairs.values():
        for pair in pairs:
            assert pair.time < SPLIT
            assert all(times[pair.user, item] <= pair.time for item in pair.sequence)
            assert pair.target not in pair.sequence


def test_several_targets_are_the_newest_each_with_what_came_before() -> None:
    history = next(known_of(event_rows()).learned.histories())
    cut = list(earlier(history, 1, Limits(targets=4)))
    assert [len(one.items) for one in cut] == [len(history.items) - place for place in range(4)]
    assert list(earlier(history, 1))[0] is history
    assert len(list(earlier(history, 1))) == 1
    twice = history._replace(**{name: np.repeat(getattr(history, name), 2) for name in ("items", "times", "counts")})
    lengths = [2 * len(history.items) - 2 * n for n in range(3)]  # an item that was chosen twice is one target
    assert [len(one.items) for one in earlier(twice, 1, Limits(targets=3))] == lengths
    assert len(list(earlier(history, 99, Limits(targets=4)))) == 1  # its reason is still to be told


def test_a_job_that_was_stopped_goes_on_and_another_one_is_refused(made, tmp_path, monkeypatch) -> None:
    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "train_teachers", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(known_of(event_rows()), embed, tmp_path, SETTINGS, progress=False)
    assert not (tmp_path / "report.json").exists()
    before = (tmp_path / "interests.json").stat().st_mtime_ns
    prepare(known_of(event_rows()), dies, tmp_path, SETTINGS, progress=False)  # nothing is embedded again
    assert (tmp_path / "interests.json").stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(made[0])
    with pytest.raises(ValueError, match="was made from other events, items or settings"):
        prepare(known_of(event_rows()), embed, tmp_path, replace(SETTINGS, seed=1), progress=False)
    with pytest.raises(ValueError, match="or by another model"):
        prepare(known_of(event_rows()), embed, tmp_path, SETTINGS, embedded_by="another", progress=False)
    with pytest.raises(ValueError, match="was made from other events, items or settings"):
        prepare(known_of(event_rows(1)), embed, tmp_path, SETTINGS, progress=False)


def test_content_rows_ask_for_the_whole_item_by_a_part_of_it() -> None:
    items = Items.from_table(pa.Table.from_pylist([*item_rows(), {"id": "one", "title": "alone", "labels": []}]))
    rows = content_rows(items)
    assert len(rows) == NUM_ITEMS  # an item of one field has no part
    for row, record in zip(rows, items.records, strict=False):
        read = as_row(row, "r")
        assert read.target == record and read.target_id == record["id"]
        assert 0 < len(read.query) < len(record) - 1
        assert "id" not in read.query
        assert all(record[name] == value for name, value in read.query.items())
    fewer = Items.from_table(pa.Table.from_pylist(item_rows()[5:]))
    assert content_rows(fewer) == rows[5:]  # a part does not depend on who else is there


def test_items_of_tables_of_ones_own_are_trained_on_too(tmp_path) -> None:
    own = IDTable("mine", ("i23", "i0", "elsewhere"), np.eye(3, dtype=np.float32))
    save_tables([own], tmp_path / "mine.parquet")
    settings = replace(SETTINGS, teachers=(), tables=(str(tmp_path / "mine.parquet"),))
    report = prepare(known_of(event_rows()), embed, tmp_path / "out", settings, progress=False)
    assert [row["item"] for row in pq.read_table(tmp_path / "out" / "ids.parquet").to_pylist()] == ["i0", "i23"]
    assert report["teachers"]["tables"] == {"mine": {"items": 3, "dims": 3}}


def test_items_alike_but_for_their_id_are_no_negatives_of_each_other() -> None:
    twins = [*item_rows()[:3], {**item_rows()[0], "id": "twin"}]
    rows = content_rows(Items.from_table(pa.Table.from_pylist(twins)))
    assert [row["target_id"] for row in rows] == ["i0", "i1", "i2"]


def test_media_are_named_from_anywhere_and_bytes_are_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "pics").mkdir()
    picture(1).save(tmp_path / "pics" / "0.png")
    monkeypatch.chdir(tmp_path.parent)
    rows = [{"id": "a", "title": "t", "image": "pics/0.png"}]
    items = Items.from_table(pa.Table.from_pylist(rows), folder=Path(tmp_path.name))
    (tmp_path / "out").mkdir()
    room.write_items(items, tmp_path / "out" / "items.parquet")
    assert load_items(tmp_path / "out" / "items.parquet").records[0]["image"] == str(tmp_path / "pics" / "0.png")
    assert json.loads(content_rows(items)[0]["target"])["image"] == str(tmp_path / "pics" / "0.png")
    raw = Items.from_table(pa.table({"id": ["a"], "title": ["t"], "image": [b"123"]}))
    with pytest.raises(ValueError, match="item 'a': image is a bytes, which cannot be written by name"):
        content_rows(raw)


def test_labels_and_users_are_part_of_the_job(tmp_path) -> None:
    prepare(known_of(event_rows()), embed, tmp_path, SETTINGS, progress=False)
    known = known_of(event_rows())
    for changed in (
        replace(known, items=replace(known.items, labels=(frozenset(),) * len(known.items))),
        replace(known, learned=replace(known.learned, user_ids=tuple(f"x{name}" for name in known.learned.user_ids))),
    ):
        with pytest.raises(ValueError, match="was made from other events, items or settings"):
            prepare(changed, embed, tmp_path, SETTINGS, progress=False)


def test_a_folder_with_somebodys_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "tables.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="which this command would write; name a folder of its own"):
        prepare(known_of(event_rows()), embed, tmp_path, SETTINGS, progress=False)
    assert (tmp_path / "tables.parquet").read_bytes() == b"mine"


def test_items_of_one_field_have_no_auxiliary_task(tmp_path) -> None:
    known = known_of(event_rows())
    bare = tuple({"id": record["id"], "title": record["title"]} for record in known.items.records)
    prepare(replace(known, items=replace(known.items, records=bare)), embed, tmp_path, SETTINGS, progress=False)
    assert not (tmp_path / "content.parquet").exists()


def test_items_without_an_embedding_are_a_cluster_of_their_own() -> None:
    vectors = np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4 + [[0.0, 0.0]], dtype=np.float32)
    found = clusters_of(vectors, 2, 0)
    assert len(set(found[:4])) == len(set(found[4:8])) == 1
    assert found[0] != found[4] and found[8] not in found[:8]


def test_no_teachers_and_no_tables_is_a_job_too(tmp_path) -> None:
    report = prepare(known_of(event_rows()), embed, tmp_path, replace(SETTINGS, teachers=()), progress=False)
    assert report["teachers"]["tables"] == {} == tables_of(tmp_path)
    assert not (tmp_path / "ids.parquet").exists()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    pq.write_table(pa.Table.from_pylist(event_rows()), tmp_path / "events.parquet")
    pq.write_table(pa.Table.from_pylist(item_rows()), tmp_path / "items.parquet")
    return tmp_path


def test_the_command_reads_two_parquet_files(files, tiny_folder, capsys) -> None:
    given = [str(files / "events.parquet"), str(files / "items.parquet"), "--model", str(tiny_folder)]
    out = files / "out"
    assert main(
        [
            "behaviour",
            *given,
            "--out",
            str(out),
            "--jaccard",
            "0.05",
            "--single-peak",
            "1",
            "--teachers",
            "als",
            "graph",
        ]
    ) in (
        0,
        None,
    )
    assert "events learned from; sequences: content_single_peak" in capsys.readouterr().out
    assert set(tables_of(out)) == {"als", "graph"}
    assert np.load(out / "embeddings.npy").shape[0] == NUM_ITEMS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": "none.parquet"}, "There is no .*none.parquet"),
        ({"items": None}, "comes without a table of items"),
        ({"more": ["--share", "1.5"]}, "share=1.5 must lie between 0 and 1"),
        ({"more": ["--teachers", "svd"]}, r"teachers: there are no \['svd'\]; take some of \['bpr'"),
        ({"more": ["--unseen", "1"]}, "unseen_share=1.0 must be at least 0 and below 1"),
        ({"more": ["--split-time", "-5"]}, "The split at -5.0 leaves"),
        ({"model": "nowhere"}, "nowhere holds no model"),
        ({"events": "items.parquet"}, r"\['user', 'item', 'time', 'behaviours'\] are missing"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(files, tiny_folder, capsys, change, message) -> None:
    events = str(files / change.get("events", "events.parquet"))
    items = [] if change.get("items", "") is None else [str(files / "items.parquet")]
    model = change.get("model", str(tiny_folder))
    code = main(["behaviour", events, *items, "--model", model, "--out", str(files / "out"), *change.get("more", [])])
    assert code
    said = capsys.readouterr().err

    assert re.search(message, said), said
    assert "Traceback" not in said


def test_movielens_is_there_by_name_alone() -> None:
    with pytest.raises(FileNotFoundError, match="movielens"):
        read_behaviour("movielens", "movielens")
