"""`sail mine`: what it writes trains, what it drops is shown, a killed run goes on, what cannot be mined is told."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from modeling_sail.training import mine_job
from modeling_sail.training import survey as survey_module
from modeling_sail.training.collate import Collator
from modeling_sail.training.data.sources import open_dataset
from modeling_sail.training.mine_job import mine_dataset
from modeling_sail.training.mining import mine
from modeling_sail.training.recipe import DatasetSpec
from modeling_sail.training.rows import TrainingDataset, item_key
from modeling_sail.training.survey import embed, survey

from modeling_sail.cli import main

from .conftest import picture

WORDS = ("red", "green", "blue", "round", "flat", "old", "new", "tall")


def records(folder, count=24):
    """Pictures of things and their names; some names are there twice, so two targets answer one query."""
    made = []
    for n in range(count):
        picture(n).save(folder / f"{n}.png")
        name = f"{WORDS[n % 8]} {WORDS[(n // 2) % 8]} thing"
        query = {"image": f"{n}.png"} if n % 2 else {"image": f"{n}.png", "title": f"{name} please"}
        made.append({"id": f"r{n}", "query": query, "target": {"title": name}, "target_id": f"t{n % 20}"})
    return made


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(tmp_path)))
    return path


def opened(path, **changes) -> TrainingDataset:
    return open_dataset("rows", DatasetSpec(path=str(path), tasks=["q2i"], **changes))


@pytest.fixture
def job(tiny, rows, tmp_path):
    model, processor = tiny
    return model, Collator(processor), opened(rows), tmp_path / "out"


def test_the_command_writes_rows_that_train_a_report_and_a_page_with_pictures(
    tiny_folder, rows, tmp_path, capsys
) -> None:
    out = tmp_path / "out"
    assert main(["mine", str(rows), "--model", str(tiny_folder), "--out", str(out), "--negatives", "3"]) == 0
    assert "negatives of 24 rows; lambda*" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    table = pq.read_table(out / "rows.parquet").to_pylist()
    assert len(table) == report["pairs"] == 24
    assert report["negatives"] == sum(len(row["negatives"]) for row in table) > 0
    assert report["false_negatives_dropped"] == sum(row["mined"]["false_negatives"] for row in table)
    assert max(report["curve"]["f1"]) == pytest.approx(report["f1"])
    assert not (out / "work").exists()
    again = opened(out / "rows.parquet")
    for place in range(24):
        row = again.read(place, None)
        assert 0 < len(row.negatives) <= 3
        assert row.target_id not in row.negative_ids
        assert all(name.startswith("t") for name in row.negative_ids), "a negative keeps the name of its target"
        scores = table[place]["mined"]["scores"]
        assert scores == sorted(scores, reverse=True) and all(score < report["lambda"] for score in scores)
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 3
    assert page.count("class='pair'") == 1 + min(10, report["queries_with_false_negatives"]) > 1
    assert "data:image/png;base64," in page and "http" not in re.sub(r"base64,[^']*", "", page)


def test_what_is_written_equals_mining_the_embeddings_themselves(job) -> None:
    model, collate, dataset, out = job
    report = mine_dataset(model, collate, dataset, out, num_negatives=4)
    read = [dataset.read(place, None) for place in range(24)]
    sides = [
        embed(model, collate, [getattr(row, name) for row in read], collate.processor.instruction_for("q2i", name))[0]
        for name in ("query", "target")
    ]
    ids = {"query_ids": [item_key(row.query) for row in read], "target_ids": [row.target_id for row in read]}
    found = mine(*sides, **ids, num_negatives=4)
    assert report["lambda"] == pytest.approx(found.threshold.value, abs=1e-6)
    for number, row in enumerate(pq.read_table(out / "rows.parquet").to_pylist()):
        names = [json.loads(item)["id"] for item in row["negatives"]]
        assert names == [read[place].target_id for place in found.negatives[number].tolist() if place >= 0]


def test_rows_that_cannot_be_read_are_left_out_and_listed(job, rows, tmp_path) -> None:
    lines = rows.read_text().splitlines()
    (tmp_path / "3.png").write_bytes(b"no picture")
    lines[5] = json.dumps({"id": "r5", "query": {"title": "x"}})
    rows.write_text("\n".join(lines))
    model, collate, _, out = job
    report = mine_dataset(model, collate, opened(rows), out)
    assert {row["id"] for row in report["rows_skipped"]} == {"r3", "r5"}
    table = pq.read_table(out / "rows.parquet").to_pylist()
    assert [row["id"] for row in table] == [f"r{n}" for n in range(24) if n not in (3, 5)]
    for row in table:  # places behind the ones left out are not shifted
        names = {json.loads(item)["id"]: json.loads(item)["title"] for item in row["negatives"]}
        for name, title in names.items():
            n = int(name[1:])
            assert title in {f"{WORDS[m % 8]} {WORDS[(m // 2) % 8]} thing" for m in (n, n + 20)}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_the_part_that_it_died_in(job, monkeypatch) -> None:
    model, collate, dataset, out = job
    monkeypatch.setattr(survey_module, "PART", 5)
    fill, filled = survey_module._fill, []

    def dies(*given):
        filled.append(given[3])
        if len(filled) == 3:
            raise Killed
        return fill(*given)

    monkeypatch.setattr(survey_module, "_fill", dies)
    with pytest.raises(Killed):
        mine_dataset(model, collate, dataset, out)
    write = mine_job._write_rows
    monkeypatch.setattr(mine_job, "_write_rows", None)  # and is killed again when all is mined
    with pytest.raises(TypeError):
        mine_dataset(model, collate, dataset, out)
    assert (out / "work" / "mine.safetensors").is_file()
    monkeypatch.setattr(mine_job, "_write_rows", write)
    report = mine_dataset(model, collate, dataset, out)
    assert filled == [range(0, 5), range(5, 10), range(10, 15), range(10, 15), range(15, 20), range(20, 24)]
    monkeypatch.setattr(survey_module, "_fill", fill)
    whole = mine_dataset(model, collate, dataset, out.with_name("whole"))
    assert report == whole
    ours, theirs = (pq.read_table(folder / "rows.parquet") for folder in (out, out.with_name("whole")))
    assert ours.equals(theirs)


def test_parts_of_another_model_or_dataset_are_refused(job, rows) -> None:
    model, collate, dataset, out = job
    survey(model, collate, dataset, out)
    with pytest.raises(ValueError, match="was begun with another task; remove it"):
        survey(model, collate, open_dataset("rows", DatasetSpec(path=str(rows), tasks=["i2i"])), out)
    with torch.no_grad():
        before = model.perceiver.latents.clone()
        model.perceiver.latents.add_(1.0)
    try:
        with pytest.raises(ValueError, match="was begun with another model; remove it"):
            survey(model, collate, dataset, out)
    finally:
        with torch.no_grad():
            model.perceiver.latents.copy_(before)


def test_an_item_that_rows_of_a_part_repeat_is_embedded_once(job, tmp_path, monkeypatch) -> None:
    model, collate, _, out = job
    targets = [{"id": "a", "title": "owl"}, {"id": "a", "title": "another owl"}, "owl", {"image": "missing.png"}]
    lines = [{"id": f"r{n}", "query": f"query {n % 3}", "target": targets[n % 4]} for n in range(24)]
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = open_dataset("again", DatasetSpec(path=str(tmp_path / "again.jsonl"), tasks=["q2i"]))
    asked, embed = [], survey_module.embed

    def counted(model, collate, items, instruction=""):
        asked.append(list(items))
        return embed(model, collate, items, instruction)

    monkeypatch.setattr(survey_module, "embed", counted)
    found = survey(model, collate, dataset, out)
    assert list(map(len, asked)) == [3, 4]  # items of one id and another content are not the same
    assert len(found.skipped) == 6 and all("missing.png" in reason for _, reason in found.skipped)
    good = [line for n, line in enumerate(lines) if n % 4 < 3]
    for name, vectors in (("query", found.queries), ("target", found.targets)):
        instruction = collate.processor.instruction_for("q2i", name)
        expected, _ = embed(model, collate, [line[name] for line in good], instruction)
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_arrays_that_were_cut_short_are_refused(job) -> None:
    model, collate, dataset, out = job
    survey(model, collate, dataset, out)
    whole = (out / "queries.npy").read_bytes()
    (out / "queries.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="queries.npy is broken .*; remove"):
        survey(model, collate, dataset, out)
    (out / "queries.npy").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(ValueError, match="is broken: embeddings that are done have no length of 1"):
        survey(model, collate, dataset, out)


def test_rows_with_a_teachers_scores_can_be_read_again(job, rows) -> None:
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        line |= {"negatives": [{"title": "something else"}], "teacher_scores": [0.9, 0.2]}
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    model, collate, _, out = job
    mine_dataset(model, collate, opened(rows), out, num_negatives=2)
    again = opened(out / "rows.parquet")
    for place in range(24):
        row = again.read(place, None)
        assert row.teacher_scores[:2] == (0.9, 0.2) and len(row.teacher_scores) == 1 + len(row.negatives) > 2
        assert all(score != score for score in row.teacher_scores[2:]), "a mined negative has no teacher's score"


def test_media_that_have_no_path_cannot_be_written(job) -> None:
    model, collate, _, out = job
    source = [{"query": {"image": picture(n)}, "target": f"thing {n}"} for n in range(6)]
    with pytest.raises(ValueError, match="image is a Image, which cannot be written by name; give paths"):
        mine_dataset(model, collate, TrainingDataset("made", source), out)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"query": "a", "target": "b"}], "at least two"),
        ([{"query": "a", "target": "b"}] * 3, "There is no negative: every target is a positive of every query"),
        (
            [{"query": "same", "target": "b", "target_id": f"t{n}"} for n in range(3)],
            "There is no negative",
        ),
        (
            [{"query": {"text": "same", "id": n}, "target": {"text": "same", "id": f"t{n}"}} for n in range(3)],
            "does not tell these items apart",
        ),
        ([{"query": "a"}, {"query": "b"}], "Not one of 2 rows of .* could be embedded. The first: .*target must be"),
    ],
)
def test_a_dataset_that_says_nothing_is_one_line(tiny_folder, tmp_path, capsys, lines, message) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["mine", str(path), "--model", str(tiny_folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^sail mine: .*{message}", error.splitlines()[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "nothing.jsonl"}, "There is no nothing.jsonl"),
        ({"rows": "mini:nothing"}, "There is no built-in source 'mini:nothing'"),
        ({"--model": "nowhere"}, "nowhere holds no model; build one: sail build"),
        ({"--task": "i3i"}, "i3i"),
        ({"--negatives": "0"}, "num_negatives=0 must be at least 1"),
        ({"--memory": "0"}, "memory_bytes=0 holds no score"),
    ],
)
def test_a_bad_argument_is_one_line(tiny_folder, rows, tmp_path, capsys, change, message) -> None:
    given = {"--model": str(tiny_folder), "--out": str(tmp_path / "out"), **change}
    path = given.pop("rows", str(rows))
    assert main(["mine", path, *(part for pair in given.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err
