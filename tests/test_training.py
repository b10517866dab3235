"""Features that are cached, the sources of `mini`, and what ships of a training."""

from __future__ import annotations

import json
import random

import pytest
import torch
from modeling_sail.training import build as build_module
from modeling_sail.training import mini
from modeling_sail.training.build import apply_trained, build_tiny
from modeling_sail.training.collate import Collator
from modeling_sail.training.data import mini_pairs
from modeling_sail.training.feature_cache import FeatureCache, cache_media, tower_features
from modeling_sail.training.rows import Row, TrainingDataset
from modeling_sail.training.sampler import SpecializedBatches
from modeling_sail.training.stages import save_whole

from modeling_sail import SailEmbeddingModel
from modeling_sail.processing_sail import SailEmbeddingProcessor

from .conftest import picture, sound


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eight pictures and eight sounds on disk, and one broken picture."""
    import soundfile

    folder = tmp_path_factory.mktemp("media")
    for index in range(8):
        picture(index).save(folder / f"{index}.png")
        soundfile.write(folder / f"{index}.wav", sound(index, 0.4 + 0.3 * index)[0], 8000)
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture
def caches(tiny, files, tmp_path) -> tuple[FeatureCache, FeatureCache]:
    model, processor = tiny
    images, sounds = FeatureCache(tmp_path / "images"), FeatureCache(tmp_path / "sounds")
    images.add([str(files / f"{i}.png") for i in range(8)], tower_features(model, processor, "image"), "pictures")
    sounds.add([str(files / f"{i}.wav") for i in range(8)], tower_features(model, processor, "audio"), "sounds")
    return images, sounds


def test_cached_features_embed_like_the_media_themselves(caches, tiny, files) -> None:
    model, processor = tiny
    items = [{"image": str(files / "3.png"), "text": "x"}, {"audio": str(files / "7.wav")}, {"text": "only"}]
    items.append(
        {"title": "Tea", "tags": ["tea", "hot", "HOT"], "image": str(files / "4.png")}
    )  # each thing is said once
    with torch.inference_mode():
        cached = model(**Collator(processor, *caches).encode_items(items, "Find:")).embeddings
        direct = model(**processor(items, instruction="Find:")).embeddings
        uncached = model(**Collator(processor).encode_items(items, "Find:")).embeddings
    torch.testing.assert_close(cached, direct, atol=2e-3, rtol=0)  # features are kept in half precision
    torch.testing.assert_close(uncached, direct, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"video": "a.mp4", "title": "t"}, "video: a feature cache holds one picture"),
        ({"images": ["a.png"]}, "images: a feature cache holds one picture"),
        ({"image": picture(1)}, "image: with a feature cache it must be a path, got Image"),
        ({"title": " "}, "item: nothing is left"),
        ({"title": ["a", "b"]}, "title: must be a string, got list"),
    ],
)
def test_what_a_feature_cache_cannot_hold_is_a_bad_item(caches, tiny, item, reason) -> None:
    assert reason in Collator(tiny[1], *caches).prepare([item])[0].reason


def test_another_tower_has_a_cache_of_its_own(tiny, files, tmp_path) -> None:
    model, processor = tiny
    row = Row("r", {"image": str(files / "1.png")}, "one", "1")
    datasets = [TrainingDataset("d", [row])]
    cache_media(model, processor, datasets, tmp_path)
    again = SailEmbeddingModel.from_pretrained(_saved(tiny, tmp_path / "saved"))
    cache_media(again, SailEmbeddingProcessor.from_pretrained(tmp_path / "saved"), datasets, tmp_path)
    assert len(list(tmp_path.glob("images-*"))) == 1
    with torch.no_grad():
        again.vision_tower.layernorm.weight += 1
    cache_media(again, processor, datasets, tmp_path)
    assert len(list(tmp_path.glob("images-*"))) == 2
    assert len(list(tmp_path.glob("sounds-*"))) == 1


def _saved(tiny, folder):
    save_whole(*tiny, folder)
    return folder


def test_a_file_that_is_not_in_the_cache_is_a_bad_row(caches, tiny, files) -> None:
    collate = Collator(tiny[1], *caches)
    good = Row("good", {"image": str(files / "1.png")}, "one", "1")
    bad = Row("bad", {"image": "other.png"}, "two", "2")
    batch = SpecializedBatches([TrainingDataset("d", [good, bad])], collate, 2).batch(0)
    assert len(batch["target_ids"]) == 1
    assert batch["skipped"] == [("bad", "query: image: 'other.png' is not in the feature cache")]


def test_the_cache_resumes_and_remembers_what_failed(tiny, files, tmp_path) -> None:
    model, processor = tiny
    calls = []
    inner = tower_features(model, processor, "image")

    def compute(keys):
        calls.append(list(keys))
        return inner(keys)

    keys = [str(files / "0.png"), str(files / "broken.png"), str(files / "1.png")]
    cache = FeatureCache(tmp_path / "cache")
    cache.add(keys[:2], compute, "first")
    (tmp_path / "cache" / "half.partial").write_bytes(b"a killed write")
    again = FeatureCache(tmp_path / "cache")
    again.add(keys, compute, "second")
    assert calls == [keys[:2], keys[1:]]  # what failed is tried again: the file may be there now
    assert keys[1] in again.failed
    assert "image" in again.failed[keys[1]]
    assert torch.equal(again[keys[0]], cache[keys[0]])


def test_what_training_changed_is_all_that_ships_and_hashes_are_checked(tmp_path) -> None:
    torch.manual_seed(0)
    base, _ = build_tiny()
    trained, _ = build_tiny()
    trained.load_state_dict(base.state_dict())
    with torch.no_grad():
        trained.perceiver.latents += 1
        trained.text_tower.layers[1].mlp.up_proj.weight += 0.5
    mini.export(trained, base, tmp_path, {"seed": 0})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seed"] == 0

    again, _ = build_tiny()
    again.load_state_dict(base.state_dict())
    apply_trained(again, tmp_path)
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=2e-3, rtol=2e-3, msg=name)
    from safetensors import safe_open

    with safe_open(tmp_path / "trained.safetensors", "pt") as file:
        towers = [name for name in file.keys() if "tower" in name]  # noqa: SIM118
    assert towers == ["text_tower.layers.1.mlp.up_proj.weight"]

    with torch.no_grad():
        again.text_tower.norm.weight += 1
    with pytest.raises(RuntimeError, match="text_tower has sha256"):
        apply_trained(again, tmp_path)
    data = bytearray((tmp_path / "trained.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "trained.safetensors").write_bytes(bytes(data))
    with pytest.raises(RuntimeError, match="trained.safetensors has sha256"):
        apply_trained(base, tmp_path)


def test_building_an_unknown_preset_or_an_incomplete_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no preset 'huge'"):
        build_module.build("huge", tmp_path)


def test_a_tokenizer_without_a_spare_token_gets_two_new_ones() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "cat": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[UNK]")
    image = build_module._placeholder(tokenizer, build_module.IMAGE_TOKENS)
    audio = build_module._placeholder(tokenizer, build_module.AUDIO_TOKENS)
    assert tokenizer.convert_tokens_to_ids([image, audio]) == [3, 4]
    assert tokenizer(f"a{image}cat", add_special_tokens=False)["input_ids"] == [1, 3, 2]


def test_at_most_three_rows_share_a_title() -> None:
    rows = [{"title": title} for title in ("A cat", "cat", "cat!", "the cat", "dog")]
    assert [row["title"] for row in mini_pairs.few_per_title(rows)] == ["A cat", "cat", "cat!", "dog"]


def test_a_name_is_said_as_spoken_only_where_it_can_be_spelt() -> None:
    row = {"names": {"en": "cat", "fr": "chat", "ru": "кот"}}
    assert [mini_pairs.said_name(row, language) for language in ("fr", "ru", "xx")] == ["chat", "cat", "cat"]


def test_records_of_the_recipe_are_drawn_by_the_generator() -> None:
    row = {"id": "x", "title": "Cat", "tags": ["pet", "animal"], "image": "x.png"}
    make = mini_pairs._titled(row)
    texts = {make(random.Random(seed))["target"]["text"] for seed in range(40)}
    assert "Cat" in texts
    assert len(texts) > 3
    assert make(random.Random(5)) == make(random.Random(5))
    dataset = TrainingDataset("openclipart", [make])
    assert dataset.read(0, random.Random(1)).query == {"image": "x.png"}


def test_two_drawings_of_a_title_and_two_graded_titles_are_rows() -> None:
    rows = [{"id": n, "title": "Cat", "tags": ["pet", "animal"][:n], "image": f"{n}.png"} for n in range(3)]
    made = TrainingDataset("t", [mini_pairs._twins(rows)]).read(0, random.Random(0))
    assert set(made.query) == {"image", "title"}
    assert set(made.target) == {"image", "tags"}
    assert made.query["image"] != made.target["image"]
    graded = TrainingDataset("g", [mini_pairs._graded(rows[1], rows[2])]).read(0, random.Random(0))
    assert graded.score == 0.5
