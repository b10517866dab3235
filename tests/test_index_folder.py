"""The folder of an index: whole or not at all, of one process at a time, refused where it is not what was written."""

from __future__ import annotations

import json

import pytest

from modeling_sail import checked_files, index_build
from modeling_sail.cli import main
from modeling_sail.index import load_index
from modeling_sail.index_build import build_index
from modeling_sail.whole_folder import whole_folder

from .vectors import clustered, write

pytestmark = pytest.mark.usefixtures("quick_index")


def test_an_index_is_replaced_whole_and_nothing_else_is(catalogue, tmp_path, monkeypatch) -> None:
    path, _ = catalogue
    out = tmp_path / "index"
    build_index(path, out)

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_build, "held_items", dies)
        with pytest.raises(KeyboardInterrupt):
            build_index(path, out, kind="ivf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    assert load_index(out).manifest["kind"] == "flat"
    (tmp_path / "index.partial" / "new").mkdir(parents=True)
    (tmp_path / "index.partial" / "new" / "rest").write_text("of a killed build")
    (tmp_path / "index.partial" / "lock").touch()
    build_index(path, out, kind="ivf")
    assert load_index(out).manifest["kind"] == "ivf"
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    for place in (tmp_path / "notes", path.parent, path):
        with pytest.raises(ValueError, match="name another"):
            build_index(path, place)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x" and path.is_file()


def test_two_builds_at_one_moment_do_not_harm_each_other(catalogue, tmp_path, monkeypatch, capsys) -> None:
    out, said = tmp_path / "index", []
    command = ["index", str(catalogue[0]), "--out", str(out)]
    real = index_build.held_items

    def meanwhile(*args):
        said.append((main(command), capsys.readouterr().err.splitlines()[-1]))
        return real(*args)

    monkeypatch.setattr(index_build, "held_items", meanwhile)
    build_index(catalogue[0], out)
    assert said == [(2, f"sail index: another process writes {out} at this moment; wait for it")]
    assert len(load_index(out, verify=True)) == 3000 and [entry.name for entry in tmp_path.iterdir()] == ["index"]


def test_embeddings_in_the_folder_of_an_index_are_not_lost(tmp_path) -> None:
    out = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60)), out)
    inside = write(out / "x.parquet", clustered(70))
    with pytest.raises(ValueError, match=r"x\.parquet is in .*name another"):
        build_index(inside, out)
    assert inside.is_file() and len(load_index(out)) == 60


def test_a_folder_beside_that_is_called_old_is_not_touched(catalogue, tmp_path) -> None:
    for _ in range(2):
        with whole_folder(tmp_path / "index.old") as folder:
            (folder / "mine").touch()
        build_index(catalogue[0], tmp_path / "index")
    assert (tmp_path / "index.old" / "mine").exists()


# --- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy", "id_ends.npy", "first.faiss", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "other bytes"])
def test_a_broken_folder_is_one_clear_error(tmp_path, name, how) -> None:
    folder = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60)), folder, precision="int8")
    path, content = folder / name, (folder / name).read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if how == "cut" else b"\xff" * 300 + content[300:])
    with pytest.raises(ValueError, match="broken index|no JSON|holds no Parquet files") as error:
        load_index(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_manifest_that_says_less_or_more_is_refused(tmp_path) -> None:
    folder = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60)), folder)
    known = json.loads((folder / "manifest.json").read_text())
    for change in ({"files": None}, {"parameters": {}}, {"items": 61}, {"version": 1}, {"first": 3}):
        (folder / "manifest.json").write_text(json.dumps(known | change))
        with pytest.raises(ValueError, match="build it again"):
            load_index(folder)


@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy", "id_ends.npy", "first.faiss"])
@pytest.mark.parametrize("files", ["small", "large"])
def test_one_flipped_bit_is_found(tmp_path, monkeypatch, name, files) -> None:
    """At each load, except in a large file that is mapped: there by ``verify``."""
    monkeypatch.setattr(checked_files, "SMALL", 0 if files == "large" else 1 << 26)
    monkeypatch.setattr(checked_files, "SPOT", 1)  # these files are smaller than the places of large ones
    monkeypatch.setattr(checked_files, "SPOTS", 2)
    folder = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60)), folder, precision="int8")
    content = bytearray((folder / name).read_bytes())
    content[-9 if name == "ids.npy" else -40] ^= 1
    (folder / name).write_bytes(content)
    if files == "large" and name != "first.faiss":
        load_index(folder)
    else:
        with pytest.raises(ValueError, match=f"broken index .*{name} is not the file that was written"):
            load_index(folder)
    with pytest.raises(ValueError, match=f"broken index .*{name} is not the file that was written"):
        load_index(folder, verify=True)


def test_search_verifies_an_index_when_it_is_asked_to(tmp_path, tiny_folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(checked_files, "SMALL", 0)
    monkeypatch.setattr(checked_files, "SPOT", 1)
    monkeypatch.setattr(checked_files, "SPOTS", 2)
    folder = tmp_path / "index"
    build_index(write(tmp_path / "x.parquet", clustered(60, 32)), folder)
    content = bytearray((folder / "vectors.npy").read_bytes())
    content[-40] ^= 1
    (folder / "vectors.npy").write_bytes(content)
    search = ["search", "--index", str(folder), "--model", str(tiny_folder), "--text", "x"]
    assert main(search) == 0
    assert main([*search, "--verify"]) == 2
    assert "broken index" in capsys.readouterr().err
