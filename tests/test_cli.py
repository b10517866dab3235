"""The command line as a user meets it: build, encode, resume, search, and the errors of bad input."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from modeling_sail import demo, encode_job, encode_source
from modeling_sail.cli import main
from modeling_sail.index import index_of, load_index, search

from .conftest import picture, sound


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """A JSONL file of good and bad items, with media beside it."""
    folder = tmp_path_factory.mktemp("items")
    picture(1).save(folder / "one.png")
    soundfile.write(folder / "one.wav", sound(1)[0], 8000)
    (folder / "bad.png").write_bytes(b"not a picture")
    lines = [
        json.dumps({"id": "a", "title": "first", "image": "one.png"}),
        json.dumps({"id": "b", "audio": "one.wav"}),
        json.dumps({"id": "c", "image": "bad.png"}),
        "{broken",
        json.dumps({"id": "e", "title": "fifth"}),
        json.dumps({"id": "f", "image": "https://example.org/x.png"}),
        json.dumps("just a string"),
    ]
    path = folder / "items.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def encode(catalogue, tiny_folder, out, *more) -> int:
    return main(["encode", str(catalogue), "--model", str(tiny_folder), "--out", str(out), "--workers", "0", *more])


def test_a_bad_item_is_a_row_with_its_reason(catalogue, tiny_folder, tmp_path) -> None:
    out = tmp_path / "x.parquet"
    assert encode(catalogue, tiny_folder, out) == 0
    table = pq.read_table(out)
    assert table.column_names == ["id", "embedding", "status", "reason"]
    rows = {row["id"]: row for row in table.to_pylist()}
    assert list(rows) == ["a", "b", "c", "4", "e", "f", "7"]
    assert [rows[name]["status"] for name in rows] == ["ok", "ok", "error", "error", "ok", "error", "ok"]
    assert rows["c"]["reason"].startswith("image")
    assert "not JSON" in rows["4"]["reason"]
    assert "allow_urls" in rows["f"]["reason"]
    assert rows["c"]["embedding"] is None
    np.testing.assert_allclose(np.linalg.norm(rows["a"]["embedding"]), 1, atol=1e-5)
    assert not (tmp_path / "x.parquet.parts").exists()


def test_a_file_of_no_item_at_all_is_no_success(tiny_folder, tmp_path, capsys) -> None:
    (tmp_path / "notes.md").write_text("# no items\n\nbut prose\n")
    assert encode(tmp_path / "notes.md", tiny_folder, tmp_path / "x.parquet") == 2
    assert "no item of" in capsys.readouterr().err and pq.read_table(tmp_path / "x.parquet").num_rows == 2


def test_a_killed_job_resumes_to_the_same_bytes(catalogue, tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(encode_job, "WINDOW", 2)
    whole, broken = tmp_path / "whole.parquet", tmp_path / "broken.parquet"
    assert encode(catalogue, tiny_folder, whole) == 0
    real, calls = encode_job.embed, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(encode_job, "embed", dies)
    assert encode(catalogue, tiny_folder, broken) == 130
    assert not broken.exists()
    assert encode(catalogue, tiny_folder, broken) == 0
    assert len(calls) == 3 + 2, "windows that were done must not be done again"
    assert broken.read_bytes() == whole.read_bytes()
    assert "4 ok, 3 error; 3 items now" in capsys.readouterr().out
    assert encode(catalogue, tiny_folder, broken) == 0
    assert "4 ok, 3 error; it was finished already" in capsys.readouterr().out


def test_the_result_of_another_job_is_not_written_over(catalogue, tiny_folder, tmp_path, capsys) -> None:
    out = tmp_path / "x.parquet"
    assert encode(catalogue, tiny_folder, out, "--dim", "32") == 0
    before = out.read_bytes()
    assert encode(catalogue, tiny_folder, out, "--dim", "16") == 2
    assert "dim: 32 there, 16 now" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_items_come_from_parquet_too(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": 7, "title": "a", "image": "a.png", "labels": ["x"]},
        {"id": 8, "title": None, "image": "b.png", "labels": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    found = dict(encode_source.read_items(tmp_path / "items.parquet"))
    assert found["7"] == {"id": 7, "title": "a", "image": str(tmp_path / "a.png")}
    assert found["8"] == {"id": 8, "image": str(tmp_path / "b.png")}
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "items.parquet").read_bytes()[:50])
    with pytest.raises(ValueError, match="cut.parquet is not a whole Parquet file"):
        encode_source.read_items(tmp_path / "cut.parquet")
    pq.write_table(pa.table({"id": [1], "labels": [["x"]]}), tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="items have any of id, text, title"):
        encode_source.read_items(tmp_path / "bare.parquet")


def test_files_of_one_name_in_a_folder_are_one_item(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    picture(1).save(tmp_path / "sub" / "cat.png")
    (tmp_path / "sub" / "cat.wav").write_bytes(b"x")
    (tmp_path / "dog.txt").write_text("a dog")
    (tmp_path / "notes.pdf").write_bytes(b"x")
    items = dict(encode_source.read_items(tmp_path))
    assert set(items) == {"dog", "sub/cat"}
    assert set(items["sub/cat"]) == {"id", "image", "audio"}
    assert items["dog"]["text"] == "a dog"


def test_search_finds_an_item_by_itself(catalogue, tiny_folder, tmp_path, capsys) -> None:
    out = tmp_path / "x.parquet"
    encode(catalogue, tiny_folder, out, "--task", "none", "--dim", "32")
    capsys.readouterr()
    arguments = ["search", "--index", str(out), "--model", str(tiny_folder), "--task", "none", "--top", "2"]
    assert main([*arguments, "--audio", str(catalogue.parent / "one.wav")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["1", "1.0000", "b"]
    assert second.split()[0] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["encode", "nowhere.jsonl", "--model", "MODEL", "--out", "x.parquet"],
            "neither a JSONL or Parquet file nor a folder",
        ),
        (["encode", "ITEMS", "--model", "nowhere", "--out", "x.parquet"], "holds no model"),
        (["encode", "ITEMS", "--model", "MODEL", "--out", "x.parquet", "--task", "i3i"], "i3i"),
        (["search", "--index", "nowhere.parquet", "--model", "MODEL", "--text", "x"], "no file nowhere.parquet"),
        (["search", "--index", "nowhere.parquet", "--model", "MODEL"], "give a query"),
        (["demo", "--model", "nowhere", "--out", "x.html"], "holds no model"),
        (["demo", "--model", "MODEL", "--out", "x.html", "--subset", "0"], "at least 1"),
    ],
)
def test_a_users_mistake_is_one_clear_line(
    arguments, message, catalogue, tiny_folder, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"MODEL": str(tiny_folder), "ITEMS": str(catalogue)}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


def test_a_dimension_that_does_not_fit_is_refused(tiny_folder) -> None:
    module = encode_job.load_module(tiny_folder)
    with pytest.raises(ValueError, match="100 dimensions"):
        search(module, index_of(["a"], np.ones((1, 100), np.float32)), ["x"])
    with pytest.raises(ValueError, match="at least 1"):
        search(module, index_of(["a"], np.ones((1, 64), np.float32)), ["x"], top=0)


def test_an_index_of_bad_rows_alone_is_refused(tmp_path, tiny_folder) -> None:
    source = tmp_path / "items.jsonl"
    source.write_text('{"titel": "x"}\n')
    out = tmp_path / "x.parquet"
    assert encode(source, tiny_folder, out) == 2
    with pytest.raises(ValueError, match="no item that could be encoded"):
        load_index(out)


def test_the_demo_page_holds_everything_and_marks_hits(tiny_folder, tmp_path, monkeypatch) -> None:
    rows = []
    for index in range(12):
        picture(index).save(tmp_path / f"{index}.png")
        for language in ("fr", "es"):
            soundfile.write(tmp_path / f"{index}-{language}.wav", sound(index)[0], 8000)
        speech = {language: str(tmp_path / f"{index}-{language}.wav") for language in ("fr", "es")}
        names = {"en": f"<thing> {index}", "es": "cosa"}
        rows.append({"id": str(index), "names": names, "image": str(tmp_path / f"{index}.png"), "speech": speech})
    (tmp_path / "3.png").write_bytes(b"broken")
    monkeypatch.setattr(demo, "load_tuxpaint", lambda: rows)
    monkeypatch.setattr(demo, "split_by_name", lambda rows: {"test": rows})
    page = demo.make_demo(tiny_folder, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert page.name == "index.html"
    assert "src='http" not in text
    assert "data:image/png;base64," in text
    assert "data:audio/wav;base64," in text
    assert "<thing>" not in text
    assert "&lt;thing&gt;" in text
    assert "class='card hit'" in text
    assert "Items that could not be read" in text


def test_train_leaves_the_process_group_when_the_recipe_is_done(monkeypatch, capsys) -> None:
    from modeling_sail.training import distributed, recipe, stages

    done = []
    monkeypatch.setattr(recipe, "load_recipe", lambda name, overrides: name)
    monkeypatch.setattr(stages, "run_recipe", lambda name: done.append(name) or "folder")
    monkeypatch.setattr(distributed, "leave", lambda failed: done.append(failed))
    assert main(["train", "pairs.yaml"]) == 0
    assert done == ["pairs.yaml", False] and capsys.readouterr().out.strip() == "folder"
    monkeypatch.delattr(stages, "run_recipe")
    assert main(["train", "pairs.yaml"]) == 2
    assert done == ["pairs.yaml", False, True]
