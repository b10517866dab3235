"""Arguments of the benchmarks that cannot be: one line before anything is measured, not a traceback minutes later."""

from __future__ import annotations

import json

import pytest
import torch
from modeling_sail.evaluation.benchmarks import __main__ as command
from modeling_sail.evaluation.benchmarks.figures import figure

LINE = figure("loss", "c", "f", "s", 1.0, None, "")


def refused(*given: str) -> str:
    """The one line that the command ends with, having printed no figure."""
    with pytest.raises(SystemExit) as ended:
        command.main(list(given))
    said = ended.value.code
    assert isinstance(said, str) and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("mine --size 0", "mine: --size 0: 16 pairs at least"),
        ("mine --size 15", "--size 15"),
        ("loss --size 0", "loss: --size 0: "),
        ("loss --size 1", "two pairs at least"),
        ("cache --size 0", "cache: --size 0: 8 pairs at least"),
        ("cache --size 7", "--size 7"),
        ("gpu --device cpu --size 0", "gpu: --size 0: at least one item"),
        ("gpu --device cpu --size -1", "--size -1"),
        ("index --size 0", "index: --size 0, --dim 384: at least 20 items"),
        ("index --size 100 --dim 0", "--dim 0: "),
        ("bulk --model m --kills -1", "--kills -1: "),
        ("bulk --model m --items 0", "--items 0, "),
        ("bulk --model m --smaller 0", "--smaller [0]: above 0"),
        ("ray --model m --cores-each 0", "--cores-each 0 for 2 workers: "),
        ("ray --model m --cores-each 10000", "--cores-each 10000 for 2 workers: "),
    ],
)
def test_numbers_that_cannot_be_are_one_line(given, said, capsys) -> None:
    assert said in refused(*given.split())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["profile", "compile", "train", "gpu"])
def test_a_device_that_is_not_here_is_one_line(name, tiny_folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = [] if name == "gpu" else ["--model", str(tiny_folder)]
    for device in ("cuda", "cuda:0"):
        said = f"{name}: --device {device}: torch sees no GPU here; take --device cpu."
        assert refused(name, *model, "--device", device) == said
    assert refused(name, *model, "--device", "tpu") == f"{name}: --device tpu: take cpu or cuda."
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--out", "--picture"])
def test_a_file_that_cannot_be_written_is_said_before_the_run(flag, tmp_path, monkeypatch) -> None:
    ran = []
    monkeypatch.setitem(command.BENCHMARKS, "loss", ("stands in", lambda args: ran.append(args) or [LINE], {}))
    nowhere = tmp_path / "none" / "x.svg"
    assert (
        refused(flag, str(nowhere), "loss") == f"loss: {flag} {nowhere} cannot be written: No such file or directory."
    )
    assert f"{tmp_path} cannot be written: Is a directory" in refused(flag, str(tmp_path), "loss")
    assert not ran


def test_asking_whether_a_file_can_be_written_changes_none(tmp_path, monkeypatch) -> None:
    def failing(args):
        raise ValueError("no model")
        yield

    out = tmp_path / "lines.jsonl"
    monkeypatch.setitem(command.BENCHMARKS, "loss", ("stands in", failing, {}))
    assert refused("--out", str(out), "loss") == "loss: no model" and not out.exists()
    out.write_text("what was there\n", encoding="utf-8")
    assert "line 1 is not JSON" in refused("--out", str(out), "loss") and out.read_text() == "what was there\n"
    out.write_bytes(b"\xff\x00")
    assert "lines.jsonl holds no lines of figures" in refused("--out", str(out), "loss")
    there = {**LINE, "case": "what was there"}
    out.write_text(json.dumps(there) + "\n", encoding="utf-8")
    monkeypatch.setitem(command.BENCHMARKS, "loss", ("stands in", lambda args: [LINE], {}))
    command.main(["--out", str(out), "loss"])
    first, second = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == there and json.loads(second) == LINE
