"""What behaviour data promise: what cannot be is dropped and counted, nothing crosses a split, errors are plain."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modeling_sail.training.data.movielens import (
    behaviours_of,
    find_credits,
    load_movielens,
    plain_title,
    read_credits,
    title_key,
)
from modeling_sail.training.recommendation.behaviour import (
    Interactions,
    Items,
    load_interactions,
    load_items,
    split_by_time,
)
from modeling_sail.training.recommendation.validation import REASONS, validate

Event = tuple[str | None, str | None, float | None, tuple[str, ...]]

SCHEMA = pa.schema(
    [("user", pa.string()), ("item", pa.string()), ("time", pa.float64()), ("behaviours", pa.list_(pa.string()))]
)


def event_table(events: list[Event]) -> pa.Table:
    columns = [list(column) for column in zip(*events, strict=True)] or [[], [], [], []]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), SCHEMA)


def interactions_of(*events: Event) -> Interactions:
    return Interactions.from_table(event_table(list(events)))


def items_named(*names: str, **columns: list[Any]) -> Items:
    return Items.from_table(pa.table({"id": list(names), "title": [f"title {name}" for name in names], **columns}))


def events_of(interactions: Interactions) -> list[Event]:
    """The events as they would be written, in their order."""
    return [
        (
            interactions.user_ids[user] if user >= 0 else None,
            interactions.item_ids[item] if item >= 0 else None,
            float(time),
            tuple(name for name, shown in zip(interactions.behaviour_names, line, strict=True) if shown),
        )
        for user, item, time, line in zip(
            interactions.user, interactions.item, interactions.time, interactions.behaviours, strict=True
        )
    ]


BEHAVIOURS = st.sets(st.sampled_from(["liked", "shared", "watched"])).map(lambda some: tuple(sorted(some)))
WHOLE_EVENTS = st.tuples(
    st.sampled_from(["u1", "u2", "u10"]), st.sampled_from("abcd"), st.integers(0, 9).map(float), BEHAVIOURS
)
ANY_EVENTS = st.tuples(
    st.sampled_from(["u1", "u2", "u10", None]),
    st.sampled_from(["a", "b", "unheard of", None]),
    st.sampled_from([None, -1.0, math.nan, math.inf, 0.0, 5.0, 6.0, 99.0]),
    BEHAVIOURS,
)

# --- tables ---------------------------------------------------------------------------------------------------------


@given(st.lists(WHOLE_EVENTS, min_size=1, max_size=30))
def test_events_are_sorted_by_user_and_time_and_else_stay_as_they_came(events: list[Event]) -> None:
    assert events_of(interactions_of(*events)) == sorted(events, key=lambda event: (event[0], event[2]))


@given(st.lists(WHOLE_EVENTS, min_size=1, max_size=30))
def test_histories_hold_every_event_once_and_count_behaviours_up_to_each(events: list[Event]) -> None:
    interactions = interactions_of(*events)
    seen: dict[tuple[str, str], set[str]] = {}
    expected = []
    for user, item, _, shown in sorted(events, key=lambda event: (event[0], event[2])):
        expected.append((user, item, len(seen.setdefault((user, item), set()) | set(shown))))
        seen[user, item] |= set(shown)
    found = [
        (interactions.user_ids[history.user], interactions.item_ids[item], count)
        for history in interactions.histories()
        for item, count in zip(history.items.tolist(), history.counts.tolist(), strict=True)
    ]
    assert found == expected
    assert all((np.diff(history.times) >= 0).all() for history in interactions.histories())
    assert interactions.counts.tolist() == [len(event[3]) for event in events_of(interactions)]


def test_ids_may_be_numbers_times_timestamps_and_strings_dictionaries() -> None:
    table = pa.table(
        {
            "user": pa.array([7, 7]),
            "item": pa.array(["a", "b"]).dictionary_encode(),
            "time": pa.array([2_000, 1_000], pa.timestamp("ms")),
            "behaviours": pa.array([["liked", None], None], pa.large_list(pa.string())),
            "device": pa.array(["x", "y"]),
        }
    )
    assert events_of(Interactions.from_table(table)) == [("7", "b", 1.0, ()), ("7", "a", 2.0, ("liked",))]


def test_what_is_written_is_read_and_other_columns_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = [("u", "a", 1.0, ("liked",)), ("u", "b", 2.0, ())]
    pq.write_table(event_table(events).append_column("device", [["x", "y"]]), tmp_path / "events.parquet")
    assert events_of(load_interactions(tmp_path / "events.parquet")) == events
    assert "['device'] are passed over" in caplog.text
    table = pa.table({"id": [1], "image": ["a.png"], "tags": [["x"]], "title": [None], "labels": [["l", "l", None]]})
    pq.write_table(table, tmp_path / "items.parquet")
    items = load_items(tmp_path / "items.parquet")
    assert items.records == ({"id": "1", "tags": ["x"], "image": str(tmp_path / "a.png")},)
    assert items.labels == (frozenset("l"),) and np.isnan(items.released).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, r"\['user'\] are missing"),
        ({"user": pa.array([1.5])}, "'user' is of type double; string or integer is needed"),
        ({"time": pa.array(["noon"])}, "'time' is of type string; a number"),
        ({"behaviours": pa.array(["liked"])}, "'behaviours' is of type string; a list of strings"),
        ({"behaviours": pa.array([[1.0]])}, "'behaviours' is of type double"),
    ],
)
def test_a_wrong_table_of_interactions_is_refused(change: dict[str, Any], message: str) -> None:
    columns = {"user": ["u"], "item": ["a"], "time": [1], "behaviours": [["x"]], **change}
    with pytest.raises(ValueError, match=message):
        Interactions.from_table(pa.table({name: value for name, value in columns.items() if value is not None}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": ["x"]}, r"\['id'\] are missing"),
        ({"id": ["a"], "name": ["x"]}, "items are needed, with any of text, title"),
        ({"id": pa.array([], pa.string()), "title": pa.array([], pa.string())}, "no rows"),
        ({"id": ["a", None], "title": ["x", "y"]}, "row 1 has no id"),
        ({"id": ["a", "a"], "title": ["x", "y"]}, "'a'.*Keep one"),
        ({"id": ["a"], "title": ["x"], "labels": ["drama"]}, "'labels' is of type string"),
        ({"id": ["a"], "title": ["x"], "released": ["1995"]}, "'released' is of type string"),
    ],
)
def test_a_wrong_table_of_items_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Items.from_table(pa.table(columns))


def test_a_missing_a_broken_and_an_empty_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    with pytest.raises(FileNotFoundError, match=r"events\.parquet"):
        load_interactions(path)
    pq.write_table(event_table([("u", "a", 1.0, ())]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        load_interactions(path)
    pq.write_table(event_table([]), path)
    with pytest.raises(ValueError, match="no rows"):
        load_interactions(path)
    pq.write_table(pa.table({"users": ["u"]}), path)
    with pytest.raises(ValueError, match=r"has columns \['users'\].*'user'.* are missing"):
        load_interactions(path)


# --- validation -----------------------------------------------------------------------------------------------------


def test_each_thing_that_cannot_be_is_counted_once_and_shown() -> None:
    items = Items.from_table(
        pa.table({"id": ["a", "b", "void"], "title": ["A", "B", None], "released": pa.array([None, 50, None])})
    )
    wrong = {
        "missing_user": (None, "unheard of", 60.0, ("liked",)),
        "unknown_item": ("lost", "unheard of", -1.0, ()),
        "item_without_content": ("u", "void", 60.0, ()),
        "invalid_time": ("u", "b", math.nan, ()),
        "before_release": ("u", "b", 49.0, ()),
        "in_the_future": ("u", "a", 101.0, ()),
        "duplicate": ("u", "a", 60.0, ("liked",)),
    }
    good = [("u", "a", 60.0, ("liked",)), ("u", "a", 61.0, ("liked",)), ("u", "a", 60.0, ("shared",))]
    kept, report = validate(interactions_of(*good, *wrong.values(), ("u", None, 1.0, ())), items, now=100)
    assert Counter(events_of(kept)) == Counter(good) and kept.item_ids == items.ids and kept.user_ids == ("u",)
    assert report.dropped == {**dict.fromkeys(REASONS, 1), "unknown_item": 2}
    assert (report.events, report.kept, report.users, report.empty_users) == (11, 3, 1, 1)
    assert (report.items, report.unused_items, report.repeated_pairs, report.same_content) == (3, 2, 1, 0)
    assert report.examples["empty_users"] == ["lost"] and report.examples["repeated_pairs"] == [["u", "a"]]
    assert report.examples["invalid_time"] == [{"user": "u", "item": "b", "time": None, "behaviours": []}]
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()


@given(st.lists(ANY_EVENTS, min_size=1, max_size=30))
def test_validation_keeps_the_good_events_and_accounts_for_all_others(events: list[Event]) -> None:
    good = [
        event
        for event in events
        if event[0] and event[1] in ("a", "b") and event[2] is not None and 5 <= event[2] <= 10
    ]
    items = items_named("b", "a", "z", released=[5.0, 5.0, None])
    if not good:
        with pytest.raises(ValueError, match="No event is left"):
            validate(interactions_of(*events), items, now=10)
        return
    kept, report = validate(interactions_of(*events), items, now=10)
    assert sorted(events_of(kept)) == sorted(set(good))
    assert report.kept + sum(report.dropped.values()) == report.events == len(events)
    assert report.dropped["duplicate"] == len(good) - len(set(good))
    assert report.users + report.empty_users == len({event[0] for event in events if event[0]})
    again, clean = validate(kept, items, now=10)
    assert events_of(again) == events_of(kept) and not sum(clean.dropped.values())


def test_an_item_under_two_ids_is_one_item_afterwards() -> None:
    items = Items.from_table(pa.table({"id": ["a", "twin", "b"], "title": ["A", "A", "B"]}))
    events = interactions_of(("u", "twin", 1.0, ()), ("u", "a", 1.0, ()), ("u", "twin", 2.0, ()))
    kept, report = validate(events, items)
    assert events_of(kept) == [("u", "a", 1.0, ()), ("u", "a", 2.0, ())]
    assert report.same_content == 1 and report.examples["same_content"] == [["twin", "a"]]
    apart, _ = validate(events, items, merge=False)
    assert events_of(apart) == [("u", "twin", 1.0, ()), ("u", "a", 1.0, ()), ("u", "twin", 2.0, ())]


# --- split ----------------------------------------------------------------------------------------------------------


@given(st.lists(WHOLE_EVENTS, min_size=2, max_size=30), st.floats(0.01, 0.99))
def test_no_event_is_on_the_wrong_side_of_a_split_and_none_is_lost(events: list[Event], share: float) -> None:
    interactions = interactions_of(*events)
    times = sorted(event[2] for event in events)
    if times[int(share * len(times))] == times[0]:
        with pytest.raises(ValueError, match="choose one between"):
            split_by_time(interactions, share=share)
        return
    before, after, time = split_by_time(interactions, share=share)
    assert before.time.max() < time <= after.time.min() and len(before) <= share * len(events)
    assert Counter(events_of(before) + events_of(after)) == Counter(events)
    assert all(history.times.max() < time for history in before.histories())
    assert before.user_ids == after.user_ids == interactions.user_ids


def test_a_split_at_a_time_puts_that_time_after() -> None:
    interactions = interactions_of(*(("u", "a", float(time), ()) for time in (1, 2, 2, 3)))
    before, after, time = split_by_time(interactions, time=2.0)
    assert before.time.tolist() == [1] and after.time.tolist() == [2, 2, 3] and time == 2


def test_a_split_that_cannot_be_is_refused() -> None:
    for share in (0.0, 1.0, -1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_by_time(interactions_of(("u", "a", 1.0, ())), share=share)
    with pytest.raises(ValueError, match="call `validate` first"):
        split_by_time(interactions_of(("u", "a", None, ()), ("u", "a", 1.0, ())))
    with pytest.raises(ValueError, match="go from 1.0 to 2.0"):
        split_by_time(interactions_of(("u", "a", 1.0, ()), ("u", "a", 2.0, ())), time=1.0)


# --- MovieLens ------------------------------------------------------------------------------------------------------

FILMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
2\tMatrix, The\t1999\tAction Sci-Fi
10\tLand Before Time III: The Great (1995)\tV\tAnimation
3\tunkonwn\tunkonwn\tunknown
"""
RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t5\t100\n1\t10\t3\t90\n2\t2\t1\t80\n"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder as the loader wants it."""
    (tmp_path / "ml-100k.item").write_text(FILMS)
    (tmp_path / "ml-100k.inter").write_text(RATINGS)
    with sqlite3.connect(tmp_path / "movies.db") as database:
        database.execute('CREATE TABLE omdb ("Title" TEXT, "Year" INTEGER, "Director" TEXT, "Cast" TEXT)')
        rows = [("The Matrix", 1998, "Two", "A, B"), ("Twice", 1990, "X", ""), ("twice!", 1990, "Y", None)]
        database.executemany("INSERT INTO omdb VALUES (?, ?, ?, ?)", [*rows, ("No year", None, "", "")])
    database.close()
    return tmp_path


def test_films_and_ratings_become_items_and_behaviours(small: Path) -> None:
    events, films = load_movielens(small)
    items = Items.from_table(films)
    assert items.ids == ("movielens/2", "movielens/3", "movielens/10")
    assert items.records[0] == {
        "id": "movielens/2",
        "title": "The Matrix",
        "nickname": "Two",
        "ocr": "A, B",
        "tags": ["Action", "Sci-Fi", "1999"],
    }
    assert items.records[1] == {"id": "movielens/3"} and items.labels[1] == frozenset()
    assert items.records[2]["tags"] == ["Animation", "1995"] and items.released[2] == 788918400
    assert events_of(Interactions.from_table(events)) == [
        ("1", "movielens/10", 90.0, ("fine",)),
        ("1", "movielens/2", 100.0, ("fine", "liked", "loved")),
        ("2", "movielens/2", 80.0, ()),
    ]
    assert [len(behaviours_of(rating)) for rating in (1, 2, 3, 4, 5)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("Matrix, The", "The Matrix"),
        ("Enfer, L'", "L'Enfer"),
        ("Paris, Texas", "Paris, Texas"),
        ("Blue Angel, The (Blaue Engel, Der)", "The Blue Angel (Der Blaue Engel)"),
        ("Land Before Time III (1995)", "Land Before Time III"),
        ("Seven (Se7en)", "Seven (Se7en)"),
    ],
)
def test_a_title_is_written_as_one_says_it(written: str, plain: str) -> None:
    assert plain_title(written) == plain


def test_credits_are_of_the_same_title_and_about_the_same_year(small: Path) -> None:
    credits = read_credits(small / "movies.db")
    assert title_key("Les Misérables") == title_key("les MISERABLES") and title_key("A & B") == title_key("A and B")
    found = [find_credits("Matrix", year, credits) for year in (1997, 1998, 1999, 2000, None)]
    assert [one is not None for one in found] == [True, True, True, False, False]
    assert find_credits("Unheard of (The Matrix)", 1998, credits) == ("Two", "A, B")
    assert find_credits("Twice", 1990, credits) is None  # which of the two?


def test_broken_files_of_movielens_are_named(small: Path, tmp_path: Path) -> None:
    (small / "ml-100k.inter").write_text(RATINGS + "1\t2\n")
    with pytest.raises(ValueError, match="line 5 has 2 cells"):
        load_movielens(small)
    (small / "ml-100k.inter").write_text(RATINGS + "1\t2\tgood\t1\n")
    with pytest.raises(ValueError, match="no number"):
        load_movielens(small)
    (small / "ml-100k.inter").write_text("a\tb\n")
    with pytest.raises(ValueError, match="columns"):
        load_movielens(small)
    (small / "movies.db").write_bytes(b"no database")
    with pytest.raises(ValueError, match=r"movies\.db"):
        load_movielens(small)
    (small / "movies.db").unlink()
    with pytest.raises(FileNotFoundError, match=r"movies\.db is missing"):
        load_movielens(small)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_movielens(tmp_path / "nowhere")


@pytest.mark.network
def test_movielens_is_whole() -> None:
    events, films = load_movielens()
    interactions, items = Interactions.from_table(events), Items.from_table(films)
    assert (len(interactions.user_ids), len(items), len(interactions)) == (943, 1682, 100_000)
    assert interactions.counts.tolist().count(3) == 21_201  # ratings of 5
    assert sum("nickname" in record or "ocr" in record for record in items.records) == 1390
    kept, report = validate(interactions, items)
    counts = {reason: count for reason, count in report.dropped.items() if count}
    assert counts == {"item_without_content": 9, "before_release": 33, "duplicate": 37} and len(kept) == 99_921
    assert report.same_content == 18 and report.empty_users == 0
    before, after, _ = split_by_time(kept)
    assert (len(before), len(after), before.num_users) == (79_936, 19_985, 751)
