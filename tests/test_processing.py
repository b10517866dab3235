"""The processor: prompts, placeholders, truncation, windows, batches, errors, saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modeling_sail.training.build import build_tiny

from modeling_sail.items_sail import ItemsError
from modeling_sail.processing_sail import Layout, SailEmbeddingProcessor, token_batches

from .conftest import picture, seven_items, sound

EVERYTHING = {
    "text": "bare",
    "title": "title words",
    "ocr": "read in the picture",
    "asr": "heard",
    "nickname": "author",
    "tags": ["one", "two"],
    "image": picture(1),
    "audio": sound(1),
}


def decoded(processor, batch, row=0) -> str:
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    return processor.tokenizer.decode(ids)


def test_the_prompt_has_three_parts_in_the_papers_order(tiny) -> None:
    _, processor = tiny
    text = decoded(processor, processor([EVERYTHING], task="i2i", side="target"))
    instruction = processor.instructions["i2i"]["target"]
    expected = (
        f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n<|audio_pad|>"
        + "<|image_pad|>" * 4
        + "bare\ntitle: title words\nocr: read in the picture\nasr: heard\nnickname: author\ntags: one, two"
        + "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    assert text == expected


def test_every_task_and_side_has_its_own_instruction(tiny) -> None:
    _, processor = tiny
    prompts = [processor.instruction_for(task, side) for task in ("i2i", "q2i", "cls") for side in ("query", "target")]
    assert len(set(prompts)) == 6
    assert processor.instruction_for(None, "query") == ""
    assert processor.prompts()["query"] == processor.prompts()["q2i_query"]


def test_instructions_can_be_edited_and_are_saved(tmp_path) -> None:
    _, processor = build_tiny()
    processor.instructions["i2i"]["query"] = "Mine:"
    processor.instructions["review"] = {"query": "Find a review:", "target": "Review:"}
    processor.save_pretrained(tmp_path)
    again = SailEmbeddingProcessor.from_pretrained(tmp_path)
    assert again.instruction_for("i2i", "query") == "Mine:"
    assert "Mine:" in decoded(again, again(["x"], task="i2i"))
    saved = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert saved["prompts"]["review_target"] == "Review:"


def test_the_plain_form_serves_tokenizers_without_a_template() -> None:
    _, chat = build_tiny()
    chat.tokenizer.chat_template = None
    plain = SailEmbeddingProcessor(chat.image_processor, chat.feature_extractor, chat.tokenizer, num_latents=4)
    assert plain.prompt_format == "plain"
    assert decoded(plain, plain(["words"], task="cls")) == plain.instructions["cls"]["query"] + "words"
    with pytest.raises(ValueError, match="chat template"):
        SailEmbeddingProcessor(chat.image_processor, chat.feature_extractor, chat.tokenizer, prompt_format="chat")


def test_truncation_takes_the_least_important_field_first_and_never_a_placeholder(tiny) -> None:
    _, processor = tiny
    texts = {"title": "T" * 20, "ocr": "O" * 20, "asr": "A" * 20, "nickname": "N" * 20, "tags": "G" * 20}
    whole, _ = processor.sequence(Layout(texts, 2, True))
    original = processor.max_tokens
    order = []
    try:
        for room in range(len(whole), len(whole) - 130, -1):
            processor.max_tokens = room
            ids, segments = processor.sequence(Layout(texts, 2, True))
            assert len(ids) == len(segments) == room
            assert segments.count(3) == 4
            assert segments.count(2) == 1
            kept = processor.tokenizer.decode(ids)
            gone = [letter for letter in "AONGT" if kept.count(letter * 2) == 0]
            order += [letter for letter in gone if letter not in order]
    finally:
        processor.max_tokens = original
    assert order == list("AONGT")


def test_no_room_for_text_is_an_error_not_a_silent_loss(tiny) -> None:
    _, processor = tiny
    original, processor.max_tokens = processor.max_tokens, 10
    try:
        with pytest.raises(ValueError, match="max_tokens=10 leaves no room"):
            processor([{"title": "x", "image": picture(1)}], task="i2i")
    finally:
        processor.max_tokens = original


def test_text_cannot_pose_as_a_picture_or_end_the_turn(tiny) -> None:
    model, processor = tiny
    batch = processor(["a<|image_pad|>b<|audio_pad|><|im_end|>c<|endoftext|>"])
    assert (batch["modality_ids"] == 3).sum() == 0
    assert processor.image_token_id not in batch["input_ids"]
    assert decoded(processor, batch) == decoded(processor, processor(["abc"]))
    with torch.inference_mode():
        assert model(**batch).embeddings.isfinite().all()


@pytest.mark.parametrize(("seconds", "windows"), [(0.01, 1), (0.4, 1), (1.0, 1), (1.2, 2), (3.0, 3), (3.7, 4)])
def test_sound_is_repeated_to_a_window_or_cut_into_windows(tiny, seconds, windows) -> None:
    _, processor = tiny
    samples = np.arange(round(seconds * 16_000), dtype=np.float32)
    made = processor.audio_windows(samples)
    assert [len(window) for window in made] == [16_000] * windows
    tail = samples[(windows - 1) * 16_000 :]
    np.testing.assert_array_equal(made[-1], np.tile(tail, 16_000 // len(tail) + 1)[:16_000])
    np.testing.assert_array_equal(np.concatenate(made)[: len(samples)], samples)


def test_a_tokenizers_saved_max_length_does_not_cut_sound(tmp_path) -> None:
    _, processor = build_tiny()
    processor.tokenizer("a" * 50, truncation=True, max_length=5)
    processor.save_pretrained(tmp_path)
    again = SailEmbeddingProcessor.from_pretrained(tmp_path)
    expected = processor([{"audio": sound(1)}])["input_features"]
    torch.testing.assert_close(again([{"audio": sound(1)}])["input_features"], expected)
    assert expected.shape == (1, 16, 100)
    assert len(again(["a" * 50])["input_ids"][0]) == len(processor(["a" * 50])["input_ids"][0])


def test_owners_tell_whose_pictures_and_windows(tiny) -> None:
    _, processor = tiny
    batch = processor(seven_items())
    assert batch["image_owner"].tolist() == [1, 1, 3, 5, 6, 6, 6]
    assert batch["frame_positions"].tolist() == [0, 1, 0, 0, 0, 1, 2]
    assert batch["audio_owner"].tolist() == [2, 2, 2, 4, 5, 6]
    assert batch["pixel_values"].shape == (7, 3, 32, 32)


def test_missing_modalities_are_no_tensors(tiny) -> None:
    _, processor = tiny
    assert set(processor(["text", "more"])) == {"input_ids", "attention_mask", "modality_ids"}


def test_skipping_leaves_the_good_items_as_they_are(tiny) -> None:
    _, processor = tiny
    good = seven_items()
    mixed = [{"id": "broken", "image": b"no picture"}, *good, {"titel": "x"}, {}]
    batch = processor(mixed, errors="skip")
    clean = processor(good)
    assert set(batch) == set(clean)
    assert all(torch.equal(batch[name], clean[name]) for name in clean)
    assert [status.status for status in batch.statuses] == ["error", *["ok"] * 7, "error", "error"]
    assert batch.statuses[0].id == "broken"
    assert batch.statuses[0].field == "image"
    with pytest.raises(ItemsError) as caught:
        processor(mixed)
    assert len(caught.value.errors) == 3


def test_an_empty_batch_and_a_batch_of_bad_items_do_not_crash(tiny) -> None:
    _, processor = tiny
    assert processor([{}], errors="skip")["input_ids"].shape[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "i3i"}, "i3i"),
        ({"side": "document"}, "side='document'"),
        ({"errors": "ignore"}, "errors"),
        ({"return_tensors": "np"}, "return_tensors"),
    ],
)
def test_bad_arguments_are_named(tiny, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny[1](["x"], **arguments)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000))
def test_token_batches_hold_every_item_once_within_the_budget(lengths, budget) -> None:
    batches = token_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)


def test_batches_by_tokens_equal_one_batch(tiny) -> None:
    model, processor = tiny
    loaded, _ = processor.load(seven_items())
    with torch.inference_mode():
        whole = model(**processor.collate(loaded)).embeddings
        for budget in (1, 100, 400):
            for places, batch in processor.batches(loaded, token_budget=budget):
                torch.testing.assert_close(model(**batch).embeddings, whole[places], atol=1e-5, rtol=0)


def test_a_saved_processor_is_the_same(tiny, tmp_path) -> None:
    _, processor = tiny
    processor.save_pretrained(tmp_path)
    again = SailEmbeddingProcessor.from_pretrained(tmp_path)
    one, other = processor(seven_items(), task="cls"), again(seven_items(), task="cls")
    assert all(torch.equal(one[name], other[name]) for name in one)
