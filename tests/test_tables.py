"""What ID tables promise: what is written is read, in whatever form it stands; nothing odd gets in without a word."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.recommendation import tables as module
from modeling_sail.training.recommendation.tables import IDTable, load_tables, save_tables

NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32)


@st.composite
def id_tables(draw: st.DrawFn, name: str) -> IDTable:
    """A table of up to 8 items, no row all zero."""
    ids = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=8, unique=True))
    dim = draw(st.integers(1, 4))
    vectors = [[draw(NUMBERS.filter(bool)), *(draw(NUMBERS) for _ in range(dim - 1))] for _ in ids]
    return IDTable(name, tuple(ids), np.array(vectors, dtype=np.float32))


def write(path: Path, names: Any, ids: Any, vectors: Any, kind: pa.DataType | None = None) -> Path:
    """A file as somebody else would write it."""
    pq.write_table(pa.table({"name": names, "id": ids, "vector": pa.array(vectors, kind)}), path)
    return path


def assert_same(one: IDTable, other: IDTable) -> None:
    assert (one.name, one.ids, one.dim, len(one)) == (other.name, other.ids, other.dim, len(other))
    assert one.vectors.dtype == other.vectors.dtype == np.float32
    assert one.vectors.tobytes() == other.vectors.tobytes()


# --- round trip -----------------------------------------------------------------------------------------------------


@given(
    st.sets(st.sampled_from(["bpr", "als", "ä b", "0"]), min_size=1).flatmap(
        lambda names: st.tuples(*(id_tables(name) for name in sorted(names)))
    )
)
@settings(max_examples=50)
def test_what_is_saved_is_loaded_bit_by_bit(given_tables: tuple[IDTable, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "tables.parquet"
        save_tables(reversed(given_tables), path)
        loaded = load_tables([path])
        assert [*path.parent.iterdir()] == [path]
    assert list(loaded) == sorted(table.name for table in given_tables)
    for table in given_tables:
        assert_same(loaded[table.name], table)


def test_a_long_table_is_read_and_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    vectors = np.arange(1, 21, dtype=np.float32).reshape(10, 2)
    table = IDTable("a", tuple("abcdefghij"), vectors)
    save_tables([table], tmp_path / "a.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 4
    assert_same(load_tables([tmp_path / "a.parquet"])["a"], table)
    vectors[7, 1] = np.inf
    write(tmp_path / "b.parquet", ["a"] * 10, list("abcdefghij"), vectors.tolist())
    with pytest.raises(ValueError, match=r"b\.parquet: row 7 has a vector with a null, or a number"):
        load_tables([tmp_path / "b.parquet"])


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, table = tmp_path / "a.parquet", IDTable("a", ("x",), np.ones((1, 2), np.float32))
    save_tables([table], path)
    monkeypatch.setattr(module, "_as_arrow", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        save_tables([IDTable("b", ("y",), table.vectors)], path)
    assert_same(load_tables([path])["a"], table)


# --- many forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)],
    ids=str,
)
@pytest.mark.parametrize(
    "ids", [[7, 8], ["7", "8"], pa.array(["7", "8"]).dictionary_encode()], ids=["int", "str", "dict"]
)
def test_lists_of_any_kind_and_ids_of_any_kind_are_read(tmp_path: Path, kind: pa.DataType, ids: Any) -> None:
    names = pa.array(["a", "a"]).dictionary_encode()
    path = write(tmp_path / "a.parquet", names, ids, np.array([[0.5, 4], [-3, 0]], dtype=np.float16).tolist(), kind)
    table = load_tables([path])["a"]
    assert table.ids == ("7", "8") and table.vectors.tolist() == [[0.5, 4], [-3, 0]]  # as long as they were


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20), st.integers(1, 5))
@settings(max_examples=50)
def test_tables_may_stand_mixed_in_files_and_be_spread_over_them(names: list[str], cut: int) -> None:
    """Whatever rows lie between, each table has its own, in order, of its own length."""
    dims = {"a": 1, "b": 2, "c": 3}
    rows = [(name, str(row), [float(row + 1)] * dims[name]) for row, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as folder:
        parts = [part for part in (rows[:cut], rows[cut:]) if part]
        paths = [write(Path(folder) / str(place), *zip(*part, strict=True)) for place, part in enumerate(parts)]
        loaded = load_tables(paths)
    assert list(loaded) == sorted(set(names))
    for name, table in loaded.items():
        own = [row for row in rows if row[0] == name]
        assert table.ids == tuple(row[1] for row in own) and table.vectors.tolist() == [row[2] for row in own]


def test_other_columns_are_passed_over(tmp_path: Path) -> None:
    pq.write_table(pa.table({"vector": [[1.0]], "id": ["x"], "more": [1], "name": ["a"]}), tmp_path / "a.parquet")
    assert load_tables([tmp_path / "a.parquet"])["a"].ids == ("x",)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_items_without_a_row_get_zeros_and_are_told() -> None:
    table = IDTable("a", ("x", "y"), np.array([[3, 4], [0, -1]], dtype=np.float32))
    rows, known = table.rows_for(["y", "?", "x", "y"])
    assert rows.dtype == np.float32 and rows.tolist() == [[0, -1], [0, 0], [3, 4], [0, -1]]
    assert known.dtype == bool and known.tolist() == [True, False, True, True]
    rows, known = table.rows_for([])
    assert rows.shape == (0, 2) and known.shape == (0,)
    assert (table.dim, len(table), table.place_of) == (2, 2, {"x": 0, "y": 1})


def test_a_row_of_zeros_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.parquet", ["a"] * 4, list("wxyz"), [[0.0, 0.0], [0.0, 1.0], [-0.0, 0.0], [2.0, 0.0]])
    with caplog.at_level(logging.WARNING):
        table = load_tables([path])["a"]
    assert table.ids == ("x", "z") and table.vectors.tolist() == [[0, 1], [2, 0]]
    assert "Table 'a': 2 of 4 vectors are zero and are left out" in caplog.text
    caplog.clear()
    IDTable.of("a", ["x"], [[1.0]])
    assert not caplog.text


# --- bad inputs -----------------------------------------------------------------------------------------------------

GOOD = {"name": ["a", "a"], "id": ["x", "y"], "vector": [[1.0, 2.0], [3.0, 4.0]]}
BAD = {
    "no vector column": ({"vector": None}, r"\['vector'\] are missing: add or rename"),
    "floats in place of lists": ({"vector": [1.0, 2.0]}, r"'vector' is of type double; list of floats is needed"),
    "lists of integers": ({"vector": [[1], [2]]}, r"'vector' is of type list<element: int64>; list of floats"),
    "ids that are floats": ({"id": [1.0, 2.0]}, r"'id' is of type double; string or integer is needed"),
    "names that are numbers": ({"name": [1, 2]}, r"'name' is of type int64; string is needed"),
    "no rows": ({name: pa.array([], pa.array(GOOD[name]).type) for name in GOOD}, "has no rows"),
    "a null id": ({"id": ["x", None]}, "row 1 has no id"),
    "a null name": ({"name": [None, "a"]}, "row 0 has no name"),
    "an empty name": ({"name": ["a", ""]}, "row 1 has no name"),
    "a null vector": ({"vector": [[1.0, 2.0], None]}, "row 1 has no vector, or an empty one"),
    "a null vector of fixed size": (
        {"vector": pa.array([[1.0, 2.0], None], pa.list_(pa.float64(), 2))},
        "row 1 has no vector, or an empty one",
    ),
    "an empty vector": ({"vector": [[], [1.0]]}, "row 0 has no vector, or an empty one"),
    "a null in a vector": ({"vector": [[1.0, 2.0], [None, 4.0]]}, "row 1 has a vector with a null"),
    "not a number": ({"vector": [[1.0, 2.0], [float("nan"), 4.0]]}, "row 1 has .* not finite as float32"),
    "too large for float32": ({"vector": [[1e300, 2.0], [1e300, 4.0]]}, r"row 0 has .* float32 \(2 rows are so\)"),
    "two lengths": (
        {"vector": [[1.0], [3.0, 4.0]]},
        "row 1 of table 'a' has a vector of another length than row 0's 1",
    ),
    "an item twice": ({"id": ["x", "x"]}, r"'a' has id 'x' twice \(.*row 0; .*row 1\).*Keep one"),
    "an item twice, once zero": (
        {"id": ["x", "x"], "vector": [[0.0, 0.0], [1.0, 1.0]]},
        r"'a' has id 'x' twice",
    ),
    "nothing but zeros": ({"vector": [[0.0], [0.0]]}, r"'a' has vectors of float32 \(0, 1\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_column_or_row(tmp_path: Path, name: str) -> None:
    wrong, message = BAD[name]
    columns = {column: value for column, value in {**GOOD, **wrong}.items() if value is not None}
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=message) as error:
        load_tables([tmp_path / "bad.parquet"])
    assert "bad.parquet" in str(error.value) or name == "nothing but zeros"


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.parquet", ["b", "a"], ["y", "x"], [[1.0], [1.0, 2.0]])
    same = write(tmp_path / "same.parquet", ["a"], ["x"], [[1.0, 2.0]])
    longer = write(tmp_path / "longer.parquet", ["a"], ["z"], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"'a' has id 'x' twice \(.*one\.parquet, row 1; .*same\.parquet, row 0\)"):
        load_tables([one, same])
    with pytest.raises(
        ValueError, match=r"of 2 numbers \(.*one\.parquet, row 1\) and of 3 \(.*longer\.parquet, row 0\)"
    ):
        load_tables([one, longer])


def test_what_is_no_file_of_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet is not there"):
        load_tables([tmp_path / "none.parquet"])
    with pytest.raises(FileNotFoundError, match="is a folder; give its files"):
        load_tables([tmp_path])
    (tmp_path / "text.parquet").write_text("name,id,vector")
    with pytest.raises(ValueError, match=r"text\.parquet is not a whole Parquet file"):
        load_tables([tmp_path / "text.parquet"])
    for paths in ([], "tables.parquet"):
        with pytest.raises(ValueError, match="a list of Parquet files, at least one"):
            load_tables(paths)


@pytest.mark.parametrize(
    ("name", "ids", "vectors", "message"),
    [
        ("", ("x",), np.ones((1, 2), np.float32), "a string that is not empty"),
        ("a", ("x",), np.ones((1, 2)), r"float64 \(1, 2\); float32 of shape \(N, E\)"),
        ("a", ("x",), [[1.0]], "vectors of list; float32"),
        ("a", (), np.ones((0, 2), np.float32), r"float32 \(0, 2\)"),
        ("a", ("x", "y"), np.ones((1, 2), np.float32), "2 ids in a tuple; a tuple of 1"),
        ("a", ["x"], np.ones((1, 2), np.float32), "1 ids in a list; a tuple of 1"),
        ("a", (7,), np.ones((1, 2), np.float32), "row 0 has an id that is no string"),
        ("a", ("x", "y", "x"), np.ones((3, 2), np.float32), "id 'x' more than once"),
        ("a", ("x", "y"), np.array([[1], [np.nan]], np.float32), "row 1 has a number that is not finite"),
        ("a", ("x", "y"), np.array([[1], [0]], np.float32), r"row 1 is all zero; leave it out, as IDTable\.of"),
    ],
)
def test_a_table_that_cannot_be_is_refused(name: str, ids: Any, vectors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IDTable(name, ids, vectors)


def test_tables_are_saved_under_one_name_each(tmp_path: Path) -> None:
    table = IDTable("a", ("x",), np.ones((1, 2), np.float32))
    for wrong in ([], [table, table]):
        with pytest.raises(ValueError, match="at least one is needed, and each name once"):
            save_tables(wrong, tmp_path / "a.parquet")
    assert not any(tmp_path.iterdir())
