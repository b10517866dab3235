"""Rows to a batch: an item without room beside its instruction costs its row, never the training step."""

from __future__ import annotations

from copy import copy

import pytest
from modeling_sail.training.collate import Collator
from modeling_sail.training.feature_cache import FeatureCache, tower_features
from modeling_sail.training.rows import Row, TrainingDataset
from modeling_sail.training.sampler import SpecializedBatches

from modeling_sail.processing_sail import Layout

from .conftest import picture

LONG = "many words " * 30


@pytest.fixture(params=["decoded", "cached"])
def collate_and_picture(request, tiny, tmp_path) -> tuple[Collator, str]:
    """Of a processor whose ``max_tokens`` a picture beside the instruction of a query fills, and the picture."""
    path = str(tmp_path / "a.png")
    picture(1).save(path)
    processor = copy(tiny[1])
    processor.max_tokens = len(processor.sequence(Layout(num_images=1), processor.instruction_for("q2i", "query"))[0])
    if request.param == "decoded":
        return Collator(processor), path
    images = FeatureCache(tmp_path / "images")
    images.add([path], tower_features(*tiny, "image"), "pictures")
    return Collator(processor, images), path


def test_the_instruction_counts_where_it_is_said_whether_an_item_has_room(collate_and_picture) -> None:
    collate, path = collate_and_picture
    both = {"image": path, "title": LONG}
    rows = [
        Row("picture", {"image": path}, {"title": LONG}, "1"),
        Row("both", both, {"title": "one"}, "2"),
        Row("text", {"title": LONG}, both, "3"),  # the instruction of a target is shorter
    ]
    batch = SpecializedBatches([TrainingDataset("d", rows, tasks=("q2i",))], collate, 3).batch(0)
    ((name, reason),) = batch["skipped"]
    assert name == "both" and reason.startswith(
        f"query: item: max_tokens={collate.processor.max_tokens} leaves no room"
    )
    assert len(batch["target_ids"]) == 2
    assert batch["items"]["input_ids"].shape == (4, collate.processor.max_tokens)


def test_a_training_of_items_without_room_ends_at_its_first_batch(collate_and_picture) -> None:
    collate, path = collate_and_picture
    rows = [Row(f"r{n}", {"image": path, "title": "x"}, {"title": f"t{n}"}, f"t{n}") for n in range(9)]
    batches = SpecializedBatches([TrainingDataset("d", rows, tasks=("q2i",))], collate, 3)
    with pytest.raises(RuntimeError, match="could be read. The last: .*max_tokens=.* leaves no room"):
        batches.batch(0)


def test_items_without_room_beside_an_instruction_are_named(collate_and_picture) -> None:
    collate, path = collate_and_picture
    items = ["one", {"image": path, "title": "x"}]
    assert len(collate.encode_items(items)["input_ids"]) == 2
    with pytest.raises(ValueError, match="^item 1: item: max_tokens=.* leaves no room"):
        collate.encode_items(items, collate.processor.instruction_for("q2i", "query"))
