"""Rows from files, what is refused and why; patterns; batches that replay, share out and resume."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.patterns import LETTERS, PATTERNS, check_pattern, parts_of, valid_rows
from modeling_sail.training.rows import (
    Row,
    RowError,
    TrainingDataset,
    as_row,
    dropped_fields,
    item_key,
    open_source,
)
from modeling_sail.training.sampler import MOST_BEHIND, SpecializedBatches

from .conftest import picture

RECORDS = [{"id": f"r{n}", "query": f"query {n}", "target": {"id": f"t{n}", "title": f"target {n}"}} for n in range(10)]


def parquet(path, records):
    from datasets import Dataset

    Dataset.from_list(records).to_parquet(str(path))


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def saved(path, records):
    from datasets import Dataset

    Dataset.from_list(records).save_to_disk(str(path))


KINDS = {"rows.jsonl": jsonl, "rows.parquet": parquet, "rows": saved}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, name, streamed) -> None:
    records = [{**RECORDS[0], "negatives": [{"title": "no"}], "score": 0.5, "teacher_scores": [1, 0]}, *RECORDS[1:]]
    blank = {"negatives": None, "score": None, "teacher_scores": None}
    KINDS[name](tmp_path / name, [{**blank, **record} for record in records])
    source = open_source(tmp_path / name, streamed)
    dataset = TrainingDataset("d", source)
    generator = random.Random(0)
    given = list(source) if streamed else [None] * len(source)
    rows = [dataset.read(place, generator, record) for place, record in enumerate(given)]
    assert [row.id for row in rows] == [f"r{n}" for n in range(10)]
    assert rows[0].query == "query 0"
    assert rows[0].target == {"id": "t0", "title": "target 0"}
    assert rows[0].target_id == "t0"
    assert rows[0].negatives == ({"title": "no"},)
    assert (rows[0].score, rows[0].teacher_scores) == (0.5, (1.0, 0.0))
    assert (rows[1].negatives, rows[1].score, rows[1].teacher_scores) == ((), None, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": None}, "query must be an item .* it is missing"),
        ({"target": "  "}, "target must be an item"),
        ({"target": 3}, "target must be an item .* it is 3"),
        ({"query": '{"title": '}, "query looks like JSON, but is none"),
        ({"negative": []}, "unknown column 'negative'; known are id, query"),
        ({"negatives": "one"}, "negatives must be a list of items, got str"),
        ({"score": "high"}, "score must be a number, got 'high'"),
        ({"score": float("nan")}, "score must be finite"),
        ({"teacher_scores": 0.5}, "teacher_scores must be a list of numbers, got 0.5"),
        ({"teacher_scores": [1, 2]}, "teacher_scores has 2 entries; 1 are needed"),
    ],
)
def test_a_record_that_is_no_row_is_refused_by_its_id(change, reason) -> None:
    with pytest.raises(RowError, match=f"row 'r0': .*{reason}"):
        as_row({**RECORDS[0], **change}, "x:0")


def test_relative_media_lie_beside_the_dataset_and_equal_targets_have_equal_ids(tmp_path) -> None:
    record = {"query": '{"image": "a.png", "video": "https://x/y.mp4"}', "target": {"images": ["b.png", "/c.png"]}}
    row = as_row(record, "x:1", tmp_path)
    assert row.query == {"image": str(tmp_path / "a.png"), "video": "https://x/y.mp4"}
    assert row.target == {"images": [str(tmp_path / "b.png"), "/c.png"]}
    assert row.id == "x:1"
    ids = {as_row({"query": "q", "target": target}, "x").target_id for target in ("cat", {"text": "cat"})}
    assert len(ids) == 1
    assert as_row({"query": "q", "target": "dog"}, "x").target_id not in ids


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.jsonl", None, FileNotFoundError, "There is no .*none.jsonl"),
        ("empty.jsonl", "", ValueError, "has no rows"),
        ("rows.csv", "a,b", ValueError, "neither .jsonl nor .parquet"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, name, content, error, message) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        open_source(tmp_path / name)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_broken_line_is_an_error_of_its_row_alone(tmp_path, streamed) -> None:
    lines = [json.dumps(RECORDS[0]), "{broken", "[1]", "", json.dumps(RECORDS[1])]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    dataset = TrainingDataset("d", open_source(tmp_path / "rows.jsonl", streamed))
    batches = SpecializedBatches([dataset], lambda draw: draw, 4)
    draw = batches.draw(0)
    assert sorted(row.id for row in draw.rows) == ["r0", "r1"]
    assert sorted(name for name, _ in draw.skipped) == ["rows.jsonl:2", "rows.jsonl:3"]
    assert any("no JSON object, but a list" in reason for _, reason in draw.skipped)


def test_dropping_fields_never_takes_all_that_an_item_has() -> None:
    generator = random.Random(0)
    text = {"id": "a", "title": "t", "ocr": "o", "tags": ["x"]}
    found = [dropped_fields(text, 0.9, generator) for _ in range(200)]
    assert all(set(item) & {"title", "ocr", "tags"} and item["id"] == "a" for item in found)
    assert {len(item) for item in found} == {2, 3, 4}
    assert any("title" not in dropped_fields({**text, "image": "i"}, 0.9, generator) for _ in range(20))
    assert dropped_fields({"title": "t", "image": "i"}, 1.0, generator) == {"image": "i"}
    assert dropped_fields("bare", 1.0, generator) == "bare"
    assert dropped_fields(text, 0.0, generator) is text


# --- patterns -------------------------------------------------------------------------------------------------------


def test_the_papers_patterns_and_any_other_are_there() -> None:
    assert {"ITC", "IIC", "VTC", "VVC", "TTC", "OOC", "ATC", "AAC", "IAC", "TOC"} <= set(PATTERNS)
    assert len(PATTERNS) == len(LETTERS) ** 2
    with pytest.raises(ValueError, match="no pattern 'ITX'; one is two letters and C"):
        check_pattern("ITX")


def test_a_pattern_takes_the_rows_that_have_both_parts() -> None:
    picture = parts_of(has_pictures=True, has_frames=False, has_audio=False, has_text=False)
    video = parts_of(has_pictures=True, has_frames=True, has_audio=True, has_text=False)
    text = parts_of(has_pictures=False, has_frames=False, has_audio=False, has_text=True)
    query, target = torch.stack([picture, video, text, picture]), torch.stack([text, text, text, video])
    expected = {"ITC": [1, 0, 0, 0], "VTC": [0, 1, 0, 0], "TTC": [0, 0, 1, 0], "IVC": [0, 0, 0, 1], "OOC": [1] * 4}
    for name, rows in expected.items():
        assert valid_rows(name, query, target).long().tolist() == rows, name


# --- batches --------------------------------------------------------------------------------------------------------


def dataset(name: str, count: int) -> TrainingDataset:
    return TrainingDataset(name, [Row(f"{name}{n}", "q", "t", f"{name}{n}") for n in range(count)])


def ids(batches, step) -> list[str]:
    return [row.id for row in batches.draw(step).rows]


def sampler(**options) -> SpecializedBatches:
    names = {"a": 10, "b": 7, "c": 5}
    return SpecializedBatches([dataset(*pair) for pair in names.items()], lambda draw: draw, 4, **options)


def test_a_step_is_the_same_whatever_came_before_and_comes_from_one_dataset() -> None:
    one, other = sampler(seed=3), sampler(seed=3)
    expected = [ids(one, step) for step in range(30)]
    assert [ids(other, step) for step in reversed(range(30))] == expected[::-1]
    assert all(len({name[0] for name in batch}) == 1 for batch in expected)
    assert expected != [ids(sampler(seed=4), step) for step in range(30)]


def test_ranks_draw_the_same_dataset_and_share_the_rows_of_the_whole_batch() -> None:
    whole = sampler(seed=5)
    ranks = [sampler(seed=5, rank=rank, world_size=2) for rank in range(2)]
    for step in range(20):
        assert ids(ranks[0], step) + ids(ranks[1], step) == ids(whole, step)
        assert len({one.draw(step).task for one in (whole, *ranks)}) == 1


def test_an_epoch_has_every_row_once() -> None:
    batches = SpecializedBatches([dataset("a", 12)], lambda draw: draw, 4, seed=1)
    epochs = [sorted(sum((ids(batches, 3 * epoch + n) for n in range(3)), [])) for epoch in range(3)]
    assert all(epoch == sorted(f"a{n}" for n in range(12)) for epoch in epochs)
    assert ids(batches, 0) != ids(batches, 3)


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0, 5.0]), min_size=1, max_size=6), st.integers(0, 99))
def test_no_dataset_falls_behind_its_share_unless_its_weight_is_zero(weights, seed) -> None:
    if not sum(weights):
        weights[0] = 1.0
    names = [f"d{place}" for place in range(len(weights))]
    given = dict(zip(names, weights, strict=True))
    batches = SpecializedBatches([dataset(name, 3) for name in names], lambda draw: draw, 2, given, seed)
    for steps in (50, 400):
        counts = Counter(names[batches.dataset_of(step)] for step in range(steps))
        for name, weight in given.items():
            share = weight / sum(weights) * steps
            assert counts[name] >= share - MOST_BEHIND - len(weights)
            assert weight or not counts[name]


def test_a_stream_resumes_where_it_was_and_ranks_take_turns() -> None:
    class Stream:
        def __iter__(self):
            return iter([{"id": str(n), "query": "q", "target": "t"} for n in range(10)])

    def streamed(**options):
        return SpecializedBatches([TrainingDataset("s", Stream())], lambda draw: draw, 4, **options)

    whole = streamed()
    found = [ids(whole, step) for step in range(5)]
    assert sum(found, []) == [str(n % 10) for n in range(20)]
    assert ids(streamed(), 3) == found[3]
    ranks = [streamed(rank=rank, world_size=2) for rank in range(2)]
    assert [ids(ranks[0], step) + ids(ranks[1], step) for step in range(5)] == found


def test_worker_processes_give_the_same_batches_in_the_same_order() -> None:
    from torch.utils.data import DataLoader

    batches = SpecializedBatches([dataset("a", 9)], first_ids, 3, seed=2, start=4)
    expected = [ids(batches, step) for step in range(4, 12)]
    for workers in (0, 2):
        loader = iter(DataLoader(batches, batch_size=None, num_workers=workers))
        assert [next(loader)["ids"] for _ in range(8)] == expected


def first_ids(draw):
    return {"ids": [row.id for row in draw.rows], "target_ids": draw.rows, "skipped": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probabilities": {"z": 1}}, r"unknown datasets \['z'\]"),
        ({"probabilities": {"a": 0, "b": 0, "c": 0}}, "one of them above 0"),
        ({"probabilities": {"a": -1}}, "must be >= 0"),
        ({"world_size": 3}, "batch_size=4 must be a positive multiple of the 3 ranks"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_two_datasets_of_one_name_and_a_dataset_without_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        SpecializedBatches([dataset("a", 2), dataset("a", 3)], lambda draw: draw, 2)
    with pytest.raises(ValueError, match="'b' has no rows"):
        dataset("b", 0)


def test_equal_media_have_equal_keys_and_different_ones_do_not() -> None:
    import numpy as np

    quiet, loud = np.zeros(48_000), np.zeros(48_000)
    loud[20_000:21_000] = 1.0  # their printed forms are the same
    assert item_key({"audio": (quiet, 16_000)}) != item_key({"audio": (loud, 16_000)})
    assert item_key({"audio": (quiet, 16_000)}) == item_key({"audio": (quiet.copy(), 16_000)})
    assert item_key({"image": picture(1)}) == item_key({"image": picture(1)}) != item_key({"image": picture(2)})
    assert item_key({"image": b"1"}) != item_key({"image": b"2"})


def test_a_negative_that_is_the_target_itself_has_its_id() -> None:
    record = {
        "query": "q",
        "target": {"title": "t"},
        "target_id": "named",
        "negatives": [{"title": "t"}, {"title": "u"}],
    }
    row = as_row(record, "x")
    assert row.negative_ids[0] == row.target_id != row.negative_ids[1]


def test_a_source_that_raises_costs_its_row_alone() -> None:
    def broken(generator):
        raise OSError("a decoder gave up")

    fine = Row("fine", "q", "t", "t")
    draw = SpecializedBatches([TrainingDataset("d", [fine, broken])], lambda draw: draw, 2).draw(0)
    assert [row.id for row in draw.rows] == ["fine"]
    assert draw.skipped == [("d:1", "the record cannot be read (OSError: a decoder gave up)")]


def test_a_stream_that_shares_itself_out_is_refused_in_workers() -> None:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    stream = Dataset.from_list([{"query": "q", "target": "t"}] * 8).to_iterable_dataset(num_shards=2)
    batches = SpecializedBatches([TrainingDataset("s", stream)], first_ids, 2)
    next(iter(DataLoader(batches, batch_size=None)))
    with pytest.raises(ValueError, match="shares itself out over worker processes; use workers=0"):
        next(iter(DataLoader(batches, batch_size=None, num_workers=2)))
