"""ONNX: every graph is the model at any size, OnnxSail is SentenceTransformer, and a folder is whole or refused."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling_sail.training.build import save
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from modeling_sail import checked_files, onnx_runtime
from modeling_sail import export_onnx as job
from modeling_sail.checked_files import describe_files
from modeling_sail.cli import main
from modeling_sail.configuration_sail import AUDIO, PRESETS, TEXT, VISION
from modeling_sail.export_onnx import TOLERANCE, difference, export_onnx
from modeling_sail.fingerprints import model_hash
from modeling_sail.onnx_parts import PARTS
from modeling_sail.onnx_runtime import MANIFEST, OnnxSail

from .conftest import picture, seven_items, sound
from .test_export_onnx import shaken

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


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
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
    with pytest.raises(ValueError, match="17 pictures, more than max_frames=16"):
        reader.encode([{"images": [picture(1)] * 17}])


def test_pictures_beyond_what_the_graph_has_places_for_are_refused(reader, monkeypatch) -> None:
    """A processor that was saved without the limit lets them through."""
    monkeypatch.setattr(reader.processor, "max_frames", 64)
    with pytest.raises(ValueError, match="17 pictures and frames; max_frames=16"):
        reader.encode([{"images": [picture(1)] * 17}])


def test_threads_that_share_a_reader_from_its_first_call_get_what_one_alone_gets(whole) -> None:
    items = seven_items()
    expected = OnnxSail(whole[1], threads=1).encode(items)
    for _ in range(3):
        fresh, barrier = OnnxSail(whole[1], threads=1), Barrier(8)

        def embed(turn: int, fresh=fresh, barrier=barrier) -> np.ndarray:
            barrier.wait()
            return np.roll(fresh.encode(items[turn % 7 :] + items[: turn % 7]), turn % 7, axis=0)

        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(embed, range(8)):
                same(found, expected)


def test_no_call_changes_a_tokenizer_that_was_saved_with_truncation_and_padding(copied) -> None:
    """Tokenizers before 0.23 raise "Already borrowed" where one thread changes it while another reads text."""
    expected = OnnxSail(copied).encode(["many words " * 9])
    saved = Tokenizer.from_file(str(copied / "processor" / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=4)
    saved.save(str(copied / "processor" / "tokenizer.json"))
    describe_again(copied)
    reader = OnnxSail(copied)
    backend = reader.processor.tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None, "before any call"
    same(reader.encode(["many words " * 9]), expected)


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


def test_a_tower_that_is_not_there_cannot_be_exported(dual, tmp_path) -> None:
    with pytest.raises(ValueError, match="no audio tower"):
        export_onnx(dual[0], tmp_path / "out", ["text", "audio"])


def test_without_onnxruntime_the_command_to_install_it_is_named(whole, monkeypatch) -> None:
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


def forget_hashes(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": dict.fromkeys(manifest["files"], 1)}))


def describe_again(folder: Path) -> None:
    """Let a folder that was changed pass for whole."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: about for name, about in describe_files(folder).items() if name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(manifest))


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
        ("text.onnx", garble, "text.onnx is not the file that was written"),
        ("weights.data", garble, "weights.data is not the file that was written"),
        (MANIFEST, forget_hashes, "not its bytes and sha256"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(copied, name, spoil, message) -> None:
    spoil(copied / name)
    with pytest.raises(ValueError, match=message) as raised:
        OnnxSail(copied)
    assert "\n" not in str(raised.value)


def test_a_graph_that_onnxruntime_refuses_is_one_line(copied) -> None:
    garble(copied / "text.onnx")
    describe_again(copied)
    with pytest.raises(ValueError, match="cannot read .*text.onnx") as raised:
        OnnxSail(copied)
    assert "\n" not in str(raised.value)


def test_weights_too_large_to_hash_each_time_are_hashed_when_asked_to(copied, monkeypatch) -> None:
    for name, value in {"SMALL": 100_000, "SPOT": 1, "SPOTS": 2}.items():  # first and last byte of the weights
        monkeypatch.setattr(checked_files, name, value)
    describe_again(copied)
    content = bytearray((copied / "weights.data").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "weights.data").write_bytes(content)
    OnnxSail(copied)
    with pytest.raises(ValueError, match="weights.data is not the file"):
        OnnxSail(copied, verify=True)


def test_a_copy_is_read_where_the_model_is_not(copied) -> None:
    assert OnnxSail(copied).encode(["a"]).shape == (1, 64)
