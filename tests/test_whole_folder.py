"""A folder is there whole or not at all, whoever writes at the same moment and whenever a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modeling_sail import whole_folder as module
from modeling_sail.whole_folder import locked, refuse_other_things, whole_folder

HOLDS = """
import sys, time
from pathlib import Path
from modeling_sail.whole_folder import whole_folder

with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("of a process that is killed")
    print("in", flush=True)
    time.sleep(600)
"""


def put(out: Path, content: str) -> None:
    with whole_folder(out) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text(content)


def held(out: Path) -> str:
    return (out / "below" / "file").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_of_two_writers_is_refused_and_the_first_is_not_harmed(tmp_path) -> None:
    out = tmp_path / "out"
    link = tmp_path / "link"
    link.symlink_to(out)
    with whole_folder(out) as folder:
        (folder / "file").write_text("first")
        for same in (out, tmp_path / "x" / ".." / "out", link):
            with pytest.raises(ValueError, match="another process writes .* at this moment"), whole_folder(same):
                raise AssertionError("two at a time")
    assert (out / "file").read_text() == "first" and names(tmp_path) == ["link", "out"]


def test_a_link_stays_one(tmp_path) -> None:
    put(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and held(tmp_path / "real") == "new"
    assert names(tmp_path) == ["link", "real"]


def test_what_a_killed_process_left_is_taken_over_once_it_is_dead(tmp_path) -> None:
    out = tmp_path / "out"
    put(out, "old")
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="another process"):
        put(out, "at the same moment")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "out.partial" / "new" / "half").exists() and held(out) == "old"
    put(out, "new")
    assert held(out) == "new" and names(out) == ["below"] and names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    put(out, "old")
    work.mkdir()
    (work / "lock").touch()
    (work / "new").mkdir()
    out.rename(work / "old")
    with pytest.raises(KeyError), whole_folder(out):
        assert held(out) == "old"
        raise KeyError
    assert held(out) == "old" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_block_or_a_rename_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch, error) -> None:
    out = tmp_path / "out"
    put(out, "old")

    def fails(*args):
        raise error

    with pytest.raises(error), whole_folder(out) as folder:
        (folder / "file").write_text("half")
        fails()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(module, "put_in_place", fails)
        put(out, "new")
    assert held(out) == "old" and names(tmp_path) == ["out"]


def test_all_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch) -> None:
    out, events = tmp_path / "out", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *places: (events.append("renamed"), replace(*places)))
    put(out, "new")
    at = events.index("renamed")
    assert {path.stat().st_ino for path in (out, out / "below", out / "below" / "file")} <= set(events[:at])
    assert tmp_path.stat().st_ino in events[at:], "the name itself must last, too"


def test_a_folder_that_only_has_the_name_of_an_unfinished_one_is_left_alone(tmp_path) -> None:
    mine = tmp_path / "out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial .* holds notes\.txt"):
        put(tmp_path / "out", "new")
    assert mine.read_text() == "mine" and not (tmp_path / "out").exists()


def test_many_at_once_leave_one_whole_folder_and_nothing_else(tmp_path) -> None:
    out, done, refused, wrong = tmp_path / "out", [], [], []

    def write(number: int) -> None:
        for turn in range(25):
            try:
                put(out, f"{number} {turn}")
                done.append(1)
            except ValueError:
                refused.append(1)
            except OSError as error:
                wrong.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) + len(refused) == 200 and done and refused
    assert names(out) == ["below"] and names(tmp_path) == ["out"]


def test_a_lock_that_was_removed_by_its_holder_is_taken_anew(tmp_path, monkeypatch) -> None:
    path, real, removed = tmp_path / "work" / "lock", module.fcntl.flock, []

    def late(handle, how):
        real(handle, how)
        if not removed:
            removed.append(path.unlink())
            path.parent.rmdir()

    monkeypatch.setattr(module.fcntl, "flock", late)
    with locked(path, tmp_path):
        assert path.exists()
        with pytest.raises(ValueError, match="another process"), locked(path, tmp_path):
            raise AssertionError("two at a time")
        assert path.exists(), "who is refused must not remove the lock"
    assert not path.exists()


def test_only_what_is_known_may_be_in_the_way(tmp_path) -> None:
    refuse_other_things(tmp_path / "nothing", (), "index")
    refuse_other_things(tmp_path, (), "index")
    put(tmp_path / "out", "old")
    refuse_other_things(tmp_path / "out", ("below/file", "other"), "index")
    for known, message in (((), "out"), (("other",), "below/file is in")):
        with pytest.raises(ValueError, match=f"{message}.*, which is no index to replace; name another --out"):
            refuse_other_things(tmp_path / "out", known, "index")
    with pytest.raises(ValueError, match="file exists, which is no index"):
        refuse_other_things(tmp_path / "out" / "below" / "file", ("file",), "index")
