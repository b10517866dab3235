"""Items to vectors for the evaluation: what a model cannot take beside its instruction is a row with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from modeling_sail.evaluation.item_embedder import ItemEmbedder
from sentence_transformers import SentenceTransformer

from modeling_sail.processing_sail import Layout

from .conftest import picture


@pytest.fixture
def short(tiny_folder) -> SentenceTransformer:
    """A model whose ``max_tokens`` a picture beside the instruction of a query fills."""
    model = SentenceTransformer(str(tiny_folder), trust_remote_code=True, device="cpu")
    processor = model[0].processor
    processor.max_tokens = len(processor.sequence(Layout(num_images=1), model.prompts["q2i_query"])[0])
    return model


def test_an_item_without_room_beside_the_instruction_has_that_reason(short) -> None:
    items = [{"image": picture(1)}, {"image": picture(2), "title": "owl"}, {"title": "owl"}]
    vectors, reasons = ItemEmbedder(short).embed(items, prompt_name="q2i_query")
    assert [bool(reason) for reason in reasons] == [False, True, False]
    assert f"max_tokens={short[0].processor.max_tokens} leaves no room" in reasons[1]
    assert not vectors[1].any()
    bare, reasons = ItemEmbedder(short).embed(items)
    assert reasons == ["", "", ""] and bare.any(axis=1).all()
    assert (np.abs(bare[[0, 2]] - vectors[[0, 2]]).max(axis=1) > 1e-3).all(), "the instruction was not said"
