"""Files that are not what was written are told: small ones to the bit, large ones by places spread over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modeling_sail import checked_files
from modeling_sail.checked_files import SPOT, SPOTS, check_files, describe_files

SIZE = 3_000_000


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "large").write_bytes(np.random.default_rng(0).bytes(SIZE))
    (tmp_path / "small").write_bytes(b"a few bytes")
    (tmp_path / "empty").touch()
    return tmp_path


@pytest.fixture
def sampled(monkeypatch) -> None:
    """Only the large file counts as large."""
    monkeypatch.setattr(checked_files, "SMALL", 1000)


def change(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


def flip(path: Path, place: int) -> None:
    change(path, place, bytes([path.read_bytes()[place] ^ 1]))


def test_what_was_written_passes_and_other_files_do_not_matter(folder, sampled) -> None:
    known = describe_files(folder)
    assert {name for name, about in known.items() if "spots" in about} == {"below/large"} < set(known)
    (folder / "another").touch()
    check_files(folder, known)
    check_files(folder, known, whole=True)


@pytest.mark.parametrize("place", [0, 1_234_567, SIZE - 1])
def test_a_flipped_bit_of_a_small_file_is_found(folder, place) -> None:
    known = describe_files(folder)
    flip(folder / "below" / "large", place)
    with pytest.raises(ValueError, match="large is not the file that was written"):
        check_files(folder, known)


@pytest.mark.parametrize("start", [0, 1_000_001, SIZE - SIZE // 255 - SPOT])
def test_a_hole_in_a_large_file_is_found(folder, sampled, start) -> None:
    known = describe_files(folder)
    change(folder / "below" / "large", start, bytes(SIZE // (SPOTS - 1)))
    with pytest.raises(ValueError, match="is not the file"):
        check_files(folder, known)


def test_a_flipped_bit_of_a_large_file_is_found_by_the_whole_check_alone(folder, sampled) -> None:
    known = describe_files(folder)
    flip(folder / "below" / "large", SPOT + 10)
    check_files(folder, known)
    with pytest.raises(ValueError, match="is not the file"):
        check_files(folder, known, whole=True)


def test_missing_and_cut_files_are_named(folder) -> None:
    known = describe_files(folder)
    (folder / "below" / "large").write_bytes(b"short")
    with pytest.raises(ValueError, match=f"large has 5 bytes, {SIZE} were written"):
        check_files(folder, known)
    (folder / "below" / "large").unlink()
    with pytest.raises(ValueError, match="large is missing"):
        check_files(folder, known)


@pytest.mark.parametrize("about", [None, 3, [], {}, {"bytes": 11}, {"sha256": "x"}, "text"])
def test_a_description_that_is_none_is_one_clear_error(folder, about) -> None:
    with pytest.raises(ValueError, match="small is known, but not its bytes and sha256"):
        check_files(folder, {"small": about})
