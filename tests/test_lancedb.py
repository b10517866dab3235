"""The README's example of a vector database runs as it is printed there, and finds what our exact index finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from modeling_sail.index import load_index

from .vectors import clustered, write

pytest.importorskip("lancedb")
README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    """The one fenced block with LanceDB in it."""
    (found,) = re.findall(r"```python\n([^`]*import lancedb[^`]*)```", README.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("shards", [False, True])
def test_lancedb_finds_what_our_exact_index_finds(tmp_path, monkeypatch, shards) -> None:
    vectors, query = clustered(900, 384), clustered(1, 384, seed=1)[0]
    monkeypatch.chdir(tmp_path)
    code, place = example(), Path("items.parquet")
    if shards:
        place = Path("items")
        place.mkdir()
        for number in range(3):
            start = 300 * number
            write(place / f"part-{number:05d}.parquet", vectors[start : start + 300], {start % 7}, first=start)
        (place / "manifest.json").write_text(json.dumps({"finished": True}))
        instead = re.search(r"# a folder of shards: (ds\.dataset\(.*\))", code)[1]
        code = code.replace('ds.dataset("items.parquet")', instead)
    else:
        write(place, vectors, {3, 899})
    known = {"query": query}
    exec(code, known)
    (ids,), (cosines,) = load_index(place).search(query[None], 10)
    assert [row["id"] for row in known["found"]] == ids.tolist()
    np.testing.assert_allclose([1 - row["_distance"] for row in known["found"]], cosines, atol=1e-5)
