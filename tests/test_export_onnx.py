"""`sail export` around its graphs: what fails is said; the folder is whole or as it was, of one process at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling_sail.training.build import build_tiny, save
from torch import nn

from modeling_sail import export_onnx as job
from modeling_sail import onnx_runtime
from modeling_sail.checked_files import check_files
from modeling_sail.cli import main
from modeling_sail.export_onnx import export_onnx
from modeling_sail.onnx_parts import Graph
from modeling_sail.onnx_runtime import MANIFEST, OnnxSail

OPEN = onnx_runtime.open_session


def shaken(**options):
    """A tiny model whose biases, norms and positions count: fresh ones are zeros and ones."""
    torch.manual_seed(0)
    model, processor = build_tiny(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, processor


# --- cheap graphs, for what happens around them ---------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, values):
        return values * 2


class Counting(nn.Module):
    def forward(self, values):
        return values[: int(values.sum().item())] if values.mean().item() > 0 else values


def cheap(part: str, module: nn.Module, factor: float = 2) -> Graph:
    probes = [(torch.ones(size, 3),) for size in (2, 5)]
    return Graph(part, module, {"values": {0: "items"}}, "doubled", lambda values: values * factor, probes)


@pytest.fixture(scope="session")
def doubles() -> dict[str, Any]:
    """Programs of `Double`, each traced once: it holds no weights that writing would change."""
    return {}


@pytest.fixture
def graphs(monkeypatch, doubles) -> dict[str, Graph]:
    """Stands in for the parts of a model; a test puts others in."""
    parts = {part: cheap(part, Double()) for part in ("vision", "audio")}
    traced = job._traced

    def once(graph, opset):
        if not isinstance(graph.module, Double):
            return traced(graph, opset)
        if "double" not in doubles:
            doubles["double"] = traced(graph, opset)
        return doubles["double"]

    monkeypatch.setattr(job, "_traced", once)
    monkeypatch.setattr(job, "graphs_of", lambda part, model, processor: iter([parts[part]]))
    return parts


def export(folder: Path, out: Path, *more: str) -> int:
    return main(["export", str(folder), "--out", str(out), *more])


def test_a_graph_that_is_not_the_model_ends_the_export(graphs, tiny_folder, tmp_path, capsys) -> None:
    graphs["audio"] = cheap("audio", Double(), 2.01)
    assert export(tiny_folder, tmp_path / "out", "--parts", "vision", "audio") == 2
    assert "audio.onnx differs from the model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_cannot_be_exported_is_said_and_the_others_are_there(graphs, tiny_folder, tmp_path, capsys) -> None:
    graphs["vision"] = cheap("vision", Counting())
    assert export(tiny_folder, tmp_path / "out", "--parts", "vision", "audio") == 2
    printed = capsys.readouterr()
    assert "vision: cannot be exported: " in printed.out and "not exported: vision" in printed.err.splitlines()[-1]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert list(manifest["parts"]) == ["audio"] and "vision" in manifest["not_exported"]
    assert (tmp_path / "out" / "audio.onnx").exists() and not (tmp_path / "out" / "vision.onnx").exists()
    with pytest.raises(ValueError, match="neither the part text nor fusion"):
        OnnxSail(tmp_path / "out")


def test_not_a_number_is_not_the_model(graphs, tiny_folder, tmp_path) -> None:
    graphs["audio"].probes[1][0][0, 0] = torch.nan  # in the second probe: max would lose it
    with pytest.raises(job.NotTheModelError, match="nan"):
        export_onnx(tiny_folder, tmp_path / "out", ["audio"], say=lambda line: None)


def test_a_graph_that_onnxruntime_cannot_run_is_not_there(graphs, tiny_folder, tmp_path, monkeypatch) -> None:
    def refuse(path, threads=None):
        raise ValueError(f"cannot read {path.name}")

    with monkeypatch.context() as patch:
        patch.setattr(job, "open_session", lambda path: refuse(path) if "vision" in path.name else OPEN(path))
        manifest = export_onnx(tiny_folder, tmp_path / "out", ["vision", "audio"], say=lambda line: None)
    assert manifest["not_exported"] == {"vision": "ValueError: cannot read vision.onnx"}
    assert [path.name for path in (tmp_path / "out").glob("*.onnx")] == ["audio.onnx"]


def test_an_export_that_yields_nothing_is_an_error(graphs, tiny_folder, tmp_path) -> None:
    graphs["vision"] = cheap("vision", Counting())
    with pytest.raises(RuntimeError, match="no part could be exported"):
        export_onnx(tiny_folder, tmp_path / "out", ["vision"], say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_stays_until_the_new_one_is_whole(graphs, tiny_folder, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    assert export(tiny_folder, out, "--parts", "vision") == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    (tmp_path / "out.partial" / "new").mkdir(parents=True)  # of a run that was killed
    (tmp_path / "out.partial" / "new" / "half.onnx").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(job, "_compared", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_onnx(tiny_folder, out, ["audio"])
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
    assert export(tiny_folder, out, "--parts", "audio") == 0
    assert (out / "audio.onnx").exists() and not (out / "vision.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_at_one_moment_do_not_harm_each_other(graphs, tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    out, said = tmp_path / "out", []
    real = job._compared

    def meanwhile(*args):
        said.append((export(tiny_folder, out, "--parts", "audio"), capsys.readouterr().err.splitlines()[-1]))
        return real(*args)

    monkeypatch.setattr(job, "_compared", meanwhile)
    export_onnx(tiny_folder, out, ["vision"], say=lambda line: None)
    assert said == [(2, f"sail export: another process writes {out} at this moment; wait for it")]
    check_files(out, onnx_runtime.read_manifest(out)["files"], whole=True)
    assert (out / "vision.onnx").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_broken_export_of_ours_is_replaced(graphs, tiny_folder, tmp_path) -> None:
    out = tmp_path / "out"
    assert export(tiny_folder, out, "--parts", "vision") == 0
    (out / "vision.onnx").write_bytes(b"cut")
    assert export(tiny_folder, out, "--parts", "vision") == 0
    check_files(out, onnx_runtime.read_manifest(out)["files"], whole=True)


def test_something_else_in_the_way_is_left_alone(graphs, tiny_folder, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert export(tiny_folder, out, "--parts", "vision") == 0
    (out / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for where in (out, file, tiny_folder):
        assert export(tiny_folder, where, "--parts", "vision") == 2
        assert "name another --out" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == file.read_text() == "mine" and (tiny_folder / "config.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parts", "smell", "text"], "no part smell"),
        (["--opset", "17"], "opset 17"),
        (["--opset", "23"], "opset 23"),
    ],
)
def test_a_bad_request_is_one_line(tiny_folder, tmp_path, capsys, more, message) -> None:
    assert export(tiny_folder, tmp_path / "out", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys) -> None:
    assert export(tmp_path, tmp_path / "out") == 2
    assert "holds no model" in capsys.readouterr().err.splitlines()[-1]


def test_missing_packages_are_named_with_the_command(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    assert export(tiny_folder, tmp_path / "out") == 2
    assert "pip install 'sail-embedding[onnx]'" in capsys.readouterr().err


def test_a_model_in_half_precision_is_exported_in_float32(tmp_path, monkeypatch) -> None:
    model, processor = shaken()
    save(model.to(torch.bfloat16), processor, tmp_path / "half")
    seen = []

    def graphs(part, model, processor):
        seen.append(model.dtype)
        yield cheap(part, Double())

    monkeypatch.setattr(job, "graphs_of", graphs)
    export_onnx(tmp_path / "half", tmp_path / "out", ["vision"], say=lambda line: None)
    assert seen == [torch.float32]
