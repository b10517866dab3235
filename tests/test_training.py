"""The first training: batches that replay, a cache that survives, a Trainer that learns and resumes, what ships."""

from __future__ import annotations

import json
import random

import pytest
import torch
from modeling_sail.training import build as build_module
from modeling_sail.training import mini
from modeling_sail.training.build import apply_trained, build_tiny
from modeling_sail.training.feature_cache import FeatureCache, tower_features
from modeling_sail.training.pairs import CachedCollator, PairBatches, PairDataset
from modeling_sail.training.trainer import ContrastiveTrainer
from transformers import TrainingArguments

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


def row(files, index):
    word = "abcdefgh"[index] * 3
    return lambda generator: ({"image": str(files / f"{index}.png")}, {"text": word}, word)


@pytest.fixture
def setup(tiny, files, tmp_path):
    """Collator on cached features, and two datasets."""
    model, processor = tiny
    images, sounds = FeatureCache(tmp_path / "images"), FeatureCache(tmp_path / "sounds")
    images.add([str(files / f"{i}.png") for i in range(8)], tower_features(model, processor, "image"), "pictures")
    sounds.add([str(files / f"{i}.wav") for i in range(8)], tower_features(model, processor, "audio"), "sounds")
    pictures = PairDataset("pictures", [row(files, index) for index in range(8)], 3, ("cls", None))
    spoken = PairDataset(
        "spoken", [lambda g, i=i: ({"audio": str(files / f"{i}.wav")}, {"text": f"n{i}"}, str(i)) for i in range(8)], 1
    )
    return CachedCollator(processor, images, sounds), [pictures, spoken]


def test_cached_features_embed_like_the_media_themselves(setup, tiny, files) -> None:
    model, processor = tiny
    collate, _ = setup
    items = [{"image": str(files / "3.png"), "text": "x"}, {"audio": str(files / "7.wav")}, {"text": "only"}]
    with torch.inference_mode():
        cached = model(**collate.side(items, "Find:")).embeddings
        direct = model(**processor(items, instruction="Find:")).embeddings
    torch.testing.assert_close(cached, direct, atol=2e-3, rtol=0)  # features are kept in half precision


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
    assert calls == [keys[:2], [keys[2]]]
    assert keys[1] in again.failed
    assert "image" in again.failed[keys[1]]
    assert torch.equal(again[keys[0]], cache[keys[0]])


def test_a_step_is_the_same_batch_whatever_came_before(setup) -> None:
    collate, datasets = setup
    one, other = (PairBatches(datasets, collate, 4, seed=7) for _ in range(2))
    stream = iter(PairBatches(datasets, collate, 4, seed=7, start=3))
    for step in range(3):
        one.batch(step)
    for found in (other.batch(3), next(stream)):
        for side in ("query", "target"):
            assert all(torch.equal(found[side][name], value) for name, value in one.batch(3)[side].items())
    different = PairBatches(datasets, collate, 4, seed=8)
    assert any(
        not torch.equal(one.batch(s)["target"]["input_ids"], different.batch(s)["target"]["input_ids"])
        for s in range(4)
    )


def test_a_batch_comes_from_one_dataset_and_weights_count(setup) -> None:
    collate, datasets = setup
    batches = PairBatches(datasets, collate, 4, seed=0)
    kinds = ["image_features" in batches.batch(step)["query"] for step in range(200)]
    assert all(
        ("image_features" in batch["query"]) != ("audio_features" in batch["query"])
        for batch in (batches.batch(step) for step in range(20))
    )
    assert 0.6 < sum(kinds) / 200 < 0.9
    with pytest.raises(ValueError, match="nothing to train on"):
        PairBatches([PairDataset("none", [], 1)], collate, 4)


def arguments(tmp_path, steps) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        learning_rate=3e-3,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        save_steps=5,
        logging_steps=1,
        disable_tqdm=True,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
    )


def test_the_trainer_learns_resumes_exactly_and_keeps_towers_frozen(setup, tmp_path) -> None:
    collate, datasets = setup

    def fresh():
        torch.manual_seed(0)
        model, _ = build_tiny()
        model.requires_grad_(False)
        for part in (model.perceiver, model.audio_adapter, model.temperatures):
            part.requires_grad_(True)
        return model

    def trainer(model, steps, start=0):
        batches = PairBatches(datasets, collate, 8, seed=1, start=start)
        settings = arguments(tmp_path / "run", steps)
        settings.ignore_data_skip = True
        return ContrastiveTrainer(model, settings, train_dataset=batches)

    whole = fresh()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    run = trainer(whole, 10)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    for name, tensor in whole.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        if name.startswith(("text_tower", "vision_tower", "audio_tower")):
            assert not moved, name
    assert not torch.equal(whole.temperatures.log, before["temperatures.log"])

    resumed = trainer(fresh(), 10, start=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], atol=1e-6, rtol=0, msg=name)


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
    assert [row["title"] for row in mini.few_per_title(rows)] == ["A cat", "cat", "cat!", "dog"]


def test_a_name_is_said_as_spoken_only_where_it_can_be_spelt() -> None:
    row = {"names": {"en": "cat", "fr": "chat", "ru": "кот"}}
    assert [mini.said_name(row, language) for language in ("fr", "ru", "xx")] == ["chat", "cat", "cat"]


def test_rows_of_the_recipe_are_drawn_by_the_generator() -> None:
    row = {"title": "Cat", "tags": ["pet", "animal"], "image": "x.png"}
    make = mini._titled(row)
    texts = {make(random.Random(seed))[1]["text"] for seed in range(40)}
    assert "Cat" in texts
    assert len(texts) > 3
    assert make(random.Random(5)) == make(random.Random(5))
