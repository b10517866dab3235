"""ONNX: every graph is the model at any size, OnnxSail is SentenceTransformer, and a folder is whole or refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling_sail.training.build import build_tiny, save
from sentence_transformers import SentenceTransformer
from torch import nn

from modeling_sail import export_onnx as job
from modeling_sail import onnx_runtime
from modeling_sail.cli import main
from modeling_sail.configuration_sail import AUDIO, PRESETS, TEXT, VISION
from modeling_sail.export_onnx import TOLERANCE, difference, export_onnx
from modeling_sail.fingerprints import model_hash
from modeling_sail.onnx_parts import PARTS, Graph, graphs_of
from modeling_sail.onnx_runtime import MANIFEST, OnnxSail, pad_groups

from .conftest import picture, seven_items, sound

OPEN = onnx_runtime.open_session
BERT = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
BERT |= {"num_attention_heads": 4, "vocab_size": 320}
LLAMA = {**PRESETS["tiny"]["text_config"], "num_hidden_layers": 1}

# Exports take seconds a graph and layer: one layer of each tower says as much as two.
ONE_LAYER = {
    "text_config": BERT,
    "vision_config": {**PRESETS["tiny"]["vision_config"], "num_hidden_layers": 1},
    "audio_config": {**PRESETS["tiny"]["audio_config"], "encoder_layers": 1},
    "perceiver_depth": 1,
}


def shaken(**options):
    """A tiny model whose biases, norms and positions count: fresh ones are zeros and ones."""
    torch.manual_seed(0)
    model, processor = build_tiny(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, processor


def saved(folder: Path, **options) -> Path:
    save(*shaken(**options), folder)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> tuple[Path, Path, dict, list[str]]:
    """A model of all modalities and all of it exported: its folder, the export, the manifest, the lines."""
    folder = tmp_path_factory.mktemp("onnx")
    lines: list[str] = []
    model = saved(folder / "model", **ONE_LAYER)
    manifest = export_onnx(model, folder / "out", say=lines.append)
    return model, folder / "out", manifest, lines


@pytest.fixture(scope="session")
def reader(whole) -> OnnxSail:
    return OnnxSail(whole[1], threads=1)


@pytest.fixture(scope="session")
def ours(whole) -> SentenceTransformer:
    return SentenceTransformer(str(whole[0]), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="session")
def dual(tmp_path_factory) -> tuple[Path, Path]:
    """A dual tower without sound, frames with latents of their own: model and export."""
    folder = tmp_path_factory.mktemp("dual")
    options = {"text_config": LLAMA, "audio_config": None, "fusion": "separate", "latents_per_frame": True}
    model = saved(folder / "model", **ONE_LAYER | options)
    export_onnx(model, folder / "out", ["fusion", "vision"], say=lambda line: None)
    return model, folder / "out"


@pytest.fixture(scope="session")
def text_only(tmp_path_factory) -> tuple[Path, Path]:
    """A model of text alone, its prompts not pooled: model, and export by the command line."""
    folder = tmp_path_factory.mktemp("text")
    model = saved(folder / "model", text_config=BERT, vision_config=None, audio_config=None, pool_prompt=False)
    assert main(["export", str(model), "--out", str(folder / "out"), "--parts", "text", "--opset", "20"]) == 0
    return model, folder / "out"


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    assert np.isnan(found).any() or (found * expected).sum(axis=1).min() > 0.9999


# --- the graphs -----------------------------------------------------------------------------------------------------

VARIANTS = {
    "joint": {},
    "separate": {"fusion": "separate"},
    "latents per frame": {"latents_per_frame": True},
    "shortcut": {"shortcut_size": 24, "shortcut_memory": 7},
    "shortcut, separate": {"shortcut_size": 24, "shortcut_memory": 7, "fusion": "separate"},
    "prompt not pooled": {"pool_prompt": False},
    "no tanh, causal": {"pool_tanh": False, "causal": True},
    "mean of windows": {"audio_pooling": "mean"},
    "one block": {"perceiver_depth": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_traced_is_the_model_in_every_variant(variant) -> None:
    model, processor = shaken(**VARIANTS[variant])
    with torch.no_grad():
        for part in PARTS:
            for graph in graphs_of(part, model, processor):
                for probe in graph.probes:
                    expected = graph.reference(*probe)
                    assert expected.abs().max() > 1e-3
                    torch.testing.assert_close(graph.module(*probe), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("items", [1, 3, 7])
def test_text_is_the_model_at_any_length(whole, ours, items) -> None:
    session, model = onnx_runtime.open_session(whole[1] / "text.onnx"), ours[0].model
    for length in (1, 2, 5, 17, 40):
        ids = torch.randint(5, 260, (items, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (items, 1))).long()
        with torch.inference_mode():
            expected = model(ids, mask).embeddings
        found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        assert difference(found, expected) < TOLERANCE


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8), st.integers(1, 30)), min_size=1, max_size=7))
def test_fusion_is_the_model_whatever_the_rows_hold(whole, ours, reader, rows) -> None:
    """Rows of a sound or none, so many visual tokens, so much text."""
    length = max(map(sum, rows))
    segments = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (audio, vision, text) in enumerate(rows):
        segments[row, : audio + vision + text] = torch.tensor([AUDIO] * audio + [VISION] * vision + [TEXT] * text)
    random = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 260, segments.shape, generator=random)
    where = (segments == AUDIO) | (segments == VISION)
    media = torch.randn(int(where.sum()), 64, generator=random)
    model = ours[0].model
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(ids).masked_scatter(where[..., None], media)
        expected = model(inputs_embeds=embeds, modality_ids=segments).embeddings
    given = {"input_ids": ids.numpy(), "modality_ids": segments.numpy(), "media_tokens": media.numpy()}
    assert difference(reader._run("fusion", **given), expected) < TOLERANCE


def test_groups_are_laid_side_by_side() -> None:
    values, present = pad_groups(np.array([1, 2, 3, 4]), np.array([0, 2, 2, 5]))
    assert values.tolist() == [[1, 0], [2, 3], [4, 0]]
    assert present.tolist() == [[True, False], [True, True], [True, False]]


def test_difference_is_absolute_below_one_and_relative_above() -> None:
    assert difference(np.array([0.5]), torch.tensor([0.75])) == 0.25
    assert difference(np.array([50.0, 1]), torch.tensor([100.0, 1])) == 0.5
    assert difference(np.zeros(2), torch.zeros(3)) == float("inf")


# --- whole items ----------------------------------------------------------------------------------------------------


def ragged_items() -> list[dict]:
    """0 to 3 pictures and 0 to 4 windows, with text and without."""
    items = []
    for images in range(4):
        for windows in range(5):
            item = {"title": "word " * (images + windows)} if (images + windows) % 2 or not images + windows else {}
            item |= {"images": [picture(10 * images + place) for place in range(images)]} if images else {}
            item |= {"audio": sound(windows, windows - 0.5)} if windows else {}
            items.append(item if images or windows else {"title": "text alone"})
    return items


def test_items_embed_as_with_sentence_transformers(ours, reader) -> None:
    items = [*ragged_items(), *seven_items(), "a string", picture(3)]
    same(reader.encode(items), ours.encode(items))
    same(reader.encode(items, task="i2i", side="target"), ours.encode(items, prompt_name="i2i_target"))
    same(reader.encode(items[:5], dim=32), ours.encode(items[:5], truncate_dim=32, normalize_embeddings=True))


def test_an_item_embeds_the_same_alone_and_in_any_batch(reader) -> None:
    items = seven_items()
    together = reader.encode(items)
    same(np.concatenate([reader.encode([item]) for item in items]), together)
    same(reader.encode(items[::-1], token_budget=40)[::-1], together)
    assert np.abs(together[0] - together[1]).max() > 1e-2  # not all the same


def test_a_dual_tower_without_sound_embeds_as_with_sentence_transformers(dual) -> None:
    model, out = dual
    items = [item for item in [*ragged_items(), *seven_items()] if set(item) - {"audio"}]
    expected = SentenceTransformer(str(model), trust_remote_code=True, device="cpu").encode(items)
    same(OnnxSail(out).encode(items), expected)
    with pytest.raises(ValueError, match="audio"):
        OnnxSail(out).encode([{"audio": sound(1)}])


def test_text_alone_needs_one_graph(text_only) -> None:
    model, out = text_only
    items = ["one", "two words and more " * 9, {"title": "t", "tags": ["a", "b"]}]
    expected = SentenceTransformer(str(model), trust_remote_code=True, device="cpu").encode(
        items, prompt_name="q2i_query"
    )
    same(OnnxSail(out).encode(items, task="q2i"), expected)
    manifest = json.loads((out / MANIFEST).read_text())
    assert list(manifest["graphs"]) == ["text"] and manifest["opset"] == 20
    assert list(manifest["graphs"]["text"]["inputs"]) == ["input_ids", "attention_mask", "modality_ids"]


def test_bad_items_are_reported_as_with_sentence_transformers(ours, reader) -> None:
    items = ["good", {"image": "nowhere.png", "id": "x"}, {"title": "good too"}, {}, {"image": picture(1)}]
    with pytest.raises(ValueError) as theirs:
        ours[0].preprocess(items)
    with pytest.raises(type(theirs.value)) as raised:
        reader.encode(items)
    assert str(raised.value) == str(theirs.value)
    vectors, statuses = reader.encode_with_statuses(items, errors="skip")
    assert [status.status for status in statuses] == ["ok", "error", "ok", "error", "ok"] and statuses[1].id == "x"
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False, True, False]
    same(vectors, ours.encode(items, errors="skip"))


def test_odd_calls_have_an_answer(reader) -> None:
    assert reader.encode([]).shape == (0, 64)
    assert np.isnan(reader.encode([{}, {}], errors="skip")).all()
    with pytest.raises(TypeError, match="list"):
        reader.encode("one string")
    with pytest.raises(ValueError, match="threads=0"):
        OnnxSail(reader.folder, threads=0)
    with pytest.raises(ValueError, match="dim=65"):
        reader.encode(["a"], dim=65)
    with pytest.raises(ValueError, match="task='none'"):
        reader.encode(["a"], task="none")
    with pytest.raises(ValueError, match="17 pictures and frames; max_frames=16"):
        reader.encode([{"images": [picture(1)] * 17}])


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_exported_and_how_close_it_is(whole) -> None:
    model, out, returned, lines = whole
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest == json.loads(json.dumps(returned))
    assert manifest["model"]["hash"] == model_hash(model) and manifest["opset"] == 18
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["not_exported"] == {}
    assert list(manifest["parts"]) == list(PARTS) and sum(manifest["parts"].values(), []) == list(manifest["graphs"])
    for graph in manifest["graphs"].values():
        assert 0 <= graph["largest_difference"] <= TOLERANCE and len(graph["probes"]) >= 3
    assert manifest["encode"]["largest_difference"] <= TOLERANCE and manifest["encode"]["smallest_cosine"] > 0.9999
    assert len(lines) == 4 and all(line.startswith(f"{part}: ") for part, line in zip(PARTS, lines, strict=True))
    assert not out.with_name("out.partial").exists()


def test_graphs_keep_each_weight_once_and_no_path_of_this_machine(whole, ours) -> None:
    out = whole[1]
    used = sum(parameter.nbytes for parameter in ours[0].model.parameters())
    assert (out / "weights.data").stat().st_size < 1.6 * used + 4096 * 40  # pages; text and fusion share the backbone
    for path in out.glob("*.onnx"):
        content = path.read_bytes()
        assert str(Path(job.__file__).parent).encode() not in content and b"site-packages" not in content


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
    (tmp_path / "out.partial").mkdir()  # of a run that was killed
    (tmp_path / "out.partial" / "half.onnx").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(job, "_compared", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_onnx(tiny_folder, out, ["audio"])
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
    assert export(tiny_folder, out, "--parts", "audio") == 0
    assert (out / "audio.onnx").exists() and not (out / "vision.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_broken_export_of_ours_is_replaced(graphs, tiny_folder, tmp_path) -> None:
    out = tmp_path / "out"
    assert export(tiny_folder, out, "--parts", "vision") == 0
    (out / "vision.onnx").write_bytes(b"cut")
    assert export(tiny_folder, out, "--parts", "vision") == 0
    onnx_runtime.check_files(out, onnx_runtime.read_manifest(out))


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


def test_a_tower_that_is_not_there_cannot_be_exported(dual, tmp_path) -> None:
    with pytest.raises(ValueError, match="no audio tower"):
        export_onnx(dual[0], tmp_path / "out", ["text", "audio"])


def test_missing_packages_are_named_with_the_command(tiny_folder, tmp_path, monkeypatch, capsys, whole) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    assert export(tiny_folder, tmp_path / "out") == 2
    assert "pip install 'sail-embedding[onnx]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install"):
        OnnxSail(whole[1])


# --- folders that are not whole -------------------------------------------------------------------------------------


@pytest.fixture
def copied(text_only, tmp_path) -> Path:
    return shutil.copytree(text_only[1], tmp_path / "copy")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (MANIFEST, Path.unlink, "sail export MODEL"),
        (MANIFEST, cut, "is broken"),
        (MANIFEST, lambda path: path.write_text("[]"), "is broken"),
        (MANIFEST, lambda path: path.write_text('{"files": {}}'), "is broken"),
        ("weights.data", cut, "copy or export"),
        ("text.onnx", Path.unlink, "is missing"),
        ("processor/tokenizer.json", Path.unlink, "is missing"),
        ("text.onnx", garble, "cannot read"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(copied, name, spoil, message) -> None:
    spoil(copied / name)
    with pytest.raises(ValueError, match=message) as raised:
        OnnxSail(copied)
    assert "\n" not in str(raised.value)


def test_a_copy_is_read_where_the_model_is_not(copied) -> None:
    assert OnnxSail(copied).encode(["a"]).shape == (1, 64)


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
