"""Sources of `sail encode`: every form of the same items is read alike, and a shard is read from its own beginning."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sail import encode_media, encode_source
from modeling_sail.encode_job import Options, encode, encode_here
from modeling_sail.encode_output import Output
from modeling_sail.encode_source import BadLine, open_source, read_items, stretches
from modeling_sail.encode_window import cut_windows

from .conftest import picture

TITLES = st.lists(st.text(max_size=12), min_size=1, max_size=30)


def write(folder, form: str, titles: list[str]):
    """The same items as a file or folder of some form."""
    rows = [{"id": f"i{number}", "title": title} for number, title in enumerate(titles)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / form
    if form == "dataset":
        path.mkdir()
        half = len(rows) // 2
        pq.write_table(
            pa.Table.from_pylist(rows[:half], pa.schema([("id", "string"), ("title", "string")])), path / "a.parquet"
        )
        (path / "b.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[half:]))
    elif form == "media":
        for number, title in enumerate(titles):
            (path / f"{number // 4:02d}").mkdir(parents=True, exist_ok=True)
            (path / f"{number // 4:02d}" / f"{number:02d}.txt").write_text(title, "utf-8", "replace", newline="")
    elif form == "x.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    else:
        (gzip.open if form.endswith(".gz") else open)(path, "wb").write(lines)
    return path


@pytest.mark.parametrize("form", ["x.jsonl", "x.jsonl.gz", "x.parquet", "dataset", "media"])
@given(titles=TITLES, size=st.integers(1, 12))
@settings(max_examples=12)
def test_a_shard_read_from_its_own_place_is_that_stretch_of_the_source(form, titles, size, tmp_path_factory) -> None:
    source = open_source(write(tmp_path_factory.mktemp("source"), form, titles))
    everything = list(source.items())
    assert len(everything) == len(titles)
    shards = source.shards(size)
    assert [shard.first for shard in shards] == list(range(0, len(titles), size))
    for shard in shards:
        (one,) = [list(items) for _, items in stretches(source, [shard])]
        assert one == everything[shard.first : shard.first + shard.items]
    some = shards[::2]  # gaps: shards that are done already
    for shard, items in stretches(source, some):
        assert list(items) == everything[shard.first : shard.first + shard.items]
    if form != "media":
        assert [(name, item["title"]) for name, item, _ in everything] == [
            (f"i{number}", title) for number, title in enumerate(titles)
        ]


def test_lines_that_are_no_items_keep_their_places(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encode_source, "MAX_LINE", 100)
    path = tmp_path / "x.jsonl"
    deep = b"[" * 90
    path.write_bytes(
        b'\xef\xbb\xbf{"title": "first"}\r\n\n  \n{"title": "fo\xffrth"}\n{broken\n[1]\n'
        + b"x" * 350
        + b"\n"
        + deep
        + b"\n"
        b'{"id": 7, "title": "last"}'
    )
    found = list(read_items(path))
    assert [name for name, _ in found] == ["1", "4", "5", "6", "7", "8", "7"]
    assert found[0][1] == {"title": "first"}
    assert [type(item) for _, item in found[1:6]] == [BadLine, BadLine, list, BadLine, BadLine]
    assert "line 4 is not UTF-8" in found[1][1].reason and "write it as UTF-8" in found[1][1].reason
    assert "line 5 is not JSON" in found[2][1].reason
    assert "line 7 is longer" in found[4][1].reason
    assert found[6][1]["title"] == "last"


def test_a_row_group_that_is_broken_costs_its_rows_alone(tmp_path) -> None:
    path = write(tmp_path, "x.parquet", [f"title {number}" for number in range(20)])
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    found = list(read_items(path))
    assert [isinstance(item, BadLine) for _, item in found] == [5 <= number < 10 for number in range(20)]
    assert "row 5 cannot be read" in found[5][1].reason
    assert [item["title"] for _, item in found[10:]] == [f"title {number}" for number in range(10, 20)]


def test_media_paths_are_relative_to_the_file_that_names_them(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    line = {"image": "a.png", "images": ["b.png", {"path": "c.png"}], "audio": "/abs.wav", "video": "http://x/y.mp4"}
    (tmp_path / "sub" / "one.jsonl").write_text(json.dumps(line) + '\n{"image": "", "title": "t"}')
    (_, item), (name, other) = read_items(tmp_path)
    folder = tmp_path / "sub"
    assert item["image"] == str(folder / "a.png")
    assert item["images"] == [str(folder / "b.png"), {"path": str(folder / "c.png")}]
    assert (item["audio"], item["video"]) == ("/abs.wav", "http://x/y.mp4")
    assert other["image"] == "", "an absent field stays absent"
    assert name == "sub/one.jsonl:2", "line numbers of several files must not collide"


def test_a_folder_of_item_files_is_these_and_the_jobs_own_files_are_none(tmp_path) -> None:
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "out.parquet.parts").mkdir()
    pq.write_table(pa.table({"id": ["x"], "embedding": [[1.0]]}), tmp_path / "older.parquet")
    source = open_source(tmp_path)
    assert [name for name, *_ in source.items()] == ["a"], "embeddings are no items"
    (tmp_path / "items.jsonl").write_text('{"id": "line", "image": "a.png"}\n')
    assert [name for name, *_ in open_source(tmp_path).items()] == ["line"]
    assert [name for name, *_ in open_source(tmp_path, (tmp_path / "items.jsonl",)).items()] == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "neither a JSONL or Parquet file nor a folder"),
        ("x.jsonl", b"\n \n", "holds no items"),
        ("x.jsonl.gz", gzip.compress(b'{"title": "x"}\n' * 500, mtime=0)[:40], "not a whole gzip file"),
        ("x.jsonl.gz", b"plain", "not a whole gzip file"),
        ("x.parquet", b"PAR1 and no more", "not a whole Parquet file"),
        ("photo.PNG", b"\x89PNG", 'one image file, no list of items; name its folder, or .* {"image": "photo.PNG"}'),
        ("x.json", b'[{"title": "a"}, {"title": "b"}]', "x.json holds one JSON array; .* one object a line"),
        ("x.json", b'\xef\xbb\xbf[\n {"title": "a"}\n]\n', "holds one JSON array"),
        ("x.json", b'\n[{\n  "title": "a"\n}]\n', "holds one JSON array"),
        ("x.json", b'[{"title": "a"},\n{"title": "b"}]', "holds one JSON array"),
        ("x.json.gz", gzip.compress(b'[{"title": "a"}]', mtime=0), "holds one JSON array"),
        ("x.json", b'{\n "title": "a"\n}\n', "holds one JSON object over several lines"),
    ],
)
def test_a_source_that_cannot_be_is_said_before_anything_is_encoded(name, content, message, tmp_path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name).shards(10)


@pytest.mark.parametrize("first", [b"[1]", b'["a', b"{", b'[{"title": "a"}]'])
def test_a_first_line_that_is_bad_is_a_row_like_another(first, tmp_path) -> None:
    (tmp_path / "x.jsonl").write_bytes(first + b'\n{"title": "good"}\n')
    (_, bad), (_, good) = read_items(tmp_path / "x.jsonl")
    assert not isinstance(bad, dict) and good == {"title": "good"}


def test_files_of_a_folder_that_are_in_no_item_are_said_and_chosen_by_name(tmp_path, caplog) -> None:
    (tmp_path / "sub").mkdir()
    names = ("b.wav", "b.ogg", "b.jpg", "b.png", "c.mp4", "c.TXT", "c.txt", "c.mkv")
    for name in ("a.wav", "a.mp4", *names):
        (tmp_path / ("sub" if name in names else "") / name).write_bytes(name.encode())
    source, sub = open_source(tmp_path), tmp_path / "sub"
    assert caplog.messages == []
    assert [shard.items for shard in source.shards(2)] == [2, 1]
    (message,) = caplog.messages
    assert "3 file(s) are passed over" in message
    assert "sub/b.wav (b.ogg is taken), sub/c.mp4 (c.mkv is taken), sub/c.txt (c.TXT is taken). Give" in message
    items = {name: item for name, item, _ in source.items()}
    assert items["a"] == {"id": "a", "video": str(tmp_path / "a.mp4"), "audio": str(tmp_path / "a.wav")}
    pictures = {"image": str(sub / "b.jpg"), "images": [str(sub / "b.png")]}
    assert items["sub/b"] == {"id": "sub/b", "audio": str(sub / "b.ogg"), **pictures}
    assert items["sub/c"] == {"id": "sub/c", "text": "c.TXT", "video": str(sub / "c.mkv")}


def test_links_to_nothing_and_pipes_of_a_folder_are_rows_that_say_so(tmp_path, tiny_folder) -> None:
    folder = tmp_path / "media"
    (folder / "sub.png").mkdir(parents=True)
    (folder / "good.txt").write_text("a word")
    for name in ("gone.png", "gone-text.txt"):
        (folder / name).symlink_to("../.git/annex/objects/x")
    (folder / "link.png").symlink_to("sub.png")
    for name in ("pipe.png", "pipe-text.txt"):
        os.mkfifo(folder / name)
    names = [name for name, _ in read_items(folder)]
    assert names == ["gone-text", "gone", "good", "pipe-text", "pipe"], "directories and links to them are left out"
    out = tmp_path / "x.parquet"
    encode(tiny_folder, folder, Output(out), Options(device="cpu", workers=0), encode_here)
    reasons = dict(zip(names, pq.read_table(out).column("reason").to_pylist(), strict=True))
    assert reasons.pop("good") == ""
    for name, reason in reasons.items():
        field, said = ("text", ".txt") if name.endswith("text") else ("image", ".png")
        known = "is not a regular file" if name.startswith("pipe") else "no such file"
        assert reason.startswith(f"{field}: ") and known in reason and f"{name}{said}" in reason


def test_texts_of_a_folder_are_utf_8_or_what_their_byte_order_mark_says(tmp_path, monkeypatch) -> None:
    word = "caf\u00e9"
    marked = {"b": "utf-8-sig", "c": "utf-16", "d": "utf-32"}
    for name, encoding in {"a": "utf-8", **marked, "x": "latin-1"}.items():
        (tmp_path / f"{name}.txt").write_bytes(word.encode(encoding))
    (tmp_path / "e.txt").write_bytes(b"\xfe\xff" + word.encode("utf-16-be"))
    (tmp_path / "y.txt").write_bytes(b"\xff\xfea\0b")
    (tmp_path / "z.txt").write_bytes(b"\xff\0")
    (tmp_path / "a.TXT").write_text("taken")
    (tmp_path / "f.TXT").write_text("taken")
    (tmp_path / "f.txt").write_bytes(b"passed over \xff")
    found = dict(read_items(tmp_path))
    assert {name: found[name]["text"] for name in "abcdef"} == {
        **dict.fromkeys("bcde", word),
        "a": "taken",
        "f": "taken",
    }
    assert [type(found[name]) for name in "xyz"] == [BadLine] * 3
    for name, said in (("x", "x.txt is not UTF-8 ("), ("y", "not UTF-8, nor utf-16-le as"), ("z", "not UTF-8 (")):
        assert found[name].reason.startswith("text: ") and said in found[name].reason
        assert "write it as UTF-8" in found[name].reason
    monkeypatch.setattr(encode_media, "MAX_TEXT", 4)
    (tmp_path / "a.TXT").unlink()
    assert dict(read_items(tmp_path))["a"]["text"] == "caf", "a character that is cut is no error"


@given(costs=st.lists(st.integers(0, 130), min_size=1, max_size=60))
@settings(max_examples=60)
def test_windows_are_bounded_in_items_and_bytes_and_lose_nothing(costs) -> None:
    items = [(str(number), cost, bytes([cost])) for number, cost in enumerate(costs)]
    windows = list(cut_windows(items, lambda item: item, (7, 100)))
    assert [name for each in windows for name in each.names] == [name for name, *_ in items]
    assert [each.number for each in windows] == list(range(len(windows)))
    for each in windows:
        assert len(each.items) <= 7
        assert sum(each.items) <= 100 or len(each.items) == 1
    for one, other in zip(windows, windows[1:], strict=False):  # none ends before it must
        assert len(one.items) == 7 or sum(one.items) + other.items[0] > 100
