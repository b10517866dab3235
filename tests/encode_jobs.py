"""What the tests of `sail encode` share: items, small jobs on them, and a child that is killed at a write.

Fixtures are taken by name, such as ``items = encode_jobs.items``.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import soundfile

from modeling_sail import encode_files, encode_job
from modeling_sail.encode_job import Options, encode, encode_here
from modeling_sail.encode_output import Output

from .conftest import picture, sound

ITEMS = 15


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A JSONL file of ragged items, two of them bad and two of one id."""
    folder = tmp_path_factory.mktemp("items")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
        soundfile.write(folder / f"{seed}.wav", sound(seed, 0.4 + seed)[0], 8000)
    rows: list[dict] = [{"id": f"i{number}", "title": "many words " * (number * 7 % 5)} for number in range(ITEMS)]
    for number in range(0, ITEMS, 2):
        rows[number] |= {"image": f"{number % 3}.png"}
    for number in range(0, ITEMS, 3):
        rows[number] |= {"audio": f"{number % 3}.wav"}
    rows[5] = {"id": "i5", "image": "gone.png"}
    rows[9]["id"] = "i8"
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]) + "{broken\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(encode_job, "WINDOW", 3)


@pytest.fixture
def run(tiny_folder, items):
    """Encode; in windows of 3 and shards of 6 items, without worker processes unless asked for."""

    def run(out: Path, source: Path = items, model: Path = tiny_folder, **options) -> dict:
        chosen = Options(**{"shard_size": 6, "workers": 0, "device": "cpu", **options})
        return encode(model, source, Output(out), chosen, encode_here)

    return run


def content(out: Path) -> dict[str, bytes]:
    """Every file of a result, hidden ones too, by its name."""
    if out.is_file():
        assert not out.with_name(out.name + ".parts").exists()
        return {"": out.read_bytes()}
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def run_killed(run, out: Path, writes: int, after: bool) -> bool:
    """Run in a child that is killed at its n-th write, before or after the rename; whether it came that far."""
    child = os.fork()
    if child == 0:
        real, left = encode_files.put_in_place, [writes]

        def dies(partial: Path, path: Path) -> None:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(partial, path)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        encode_files.put_in_place = dies
        try:
            run(out)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
