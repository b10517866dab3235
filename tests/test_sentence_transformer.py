"""The folder works for a stranger: in a process that cannot import modeling_sail, and with sentence-transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from modeling_sail.training.build import build_tiny
from sentence_transformers import SentenceTransformer

from modeling_sail.items_sail import ItemsError
from modeling_sail.processing_sail import SailEmbeddingProcessor
from modeling_sail.sentence_transformer_sail import SailSentenceTransformer

from .conftest import picture, seven_items


@pytest.fixture(scope="module")
def encoder(tiny_folder) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_folder), trust_remote_code=True, device="cpu")


def run_without_package(code: str, folder, tmp_path) -> str:
    """Run code in a fresh process in which ``modeling_sail`` cannot be imported."""
    script = tmp_path / "stranger.py"
    script.write_text('import sys\nsys.modules["modeling_sail"] = None\n' + textwrap.dedent(code))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_left_out(model, items: list, places: list[int], reason: str) -> None:
    """Bad items are rows of NaN that change no other row; with errors="raise" the error names each of them."""
    options = {"show_progress_bar": False}
    found = model.encode(items, errors="skip", **options)
    bad = np.isnan(found).all(axis=1)
    assert bad.nonzero()[0].tolist() == places
    good = [item for place, item in enumerate(items) if place not in places]
    np.testing.assert_allclose(found[~bad], model.encode(good, **options), atol=1e-6)
    with pytest.raises(ItemsError, match=reason) as raised:
        model.encode(items, **options)
    (note,) = raised.value.__notes__
    assert len(raised.value.errors) == len(places) and "sorted by length" in note and note.count(" is {") == len(places)


def test_more_pictures_than_the_model_takes_are_one_items_failure(encoder) -> None:
    many, film = {"title": "t", "images": [picture(1)] * 17}, {"images": [picture(2)] * 15, "video": [picture(3)] * 2}
    assert_left_out(encoder, ["a", many, {"images": [picture(1)] * 16}, film], [1, 3], "more than max_frames=16")


def test_more_pictures_than_tokens_are_one_items_failure() -> None:
    model = SentenceTransformer(modules=[SailSentenceTransformer(*build_tiny(latents_per_frame=True))], device="cpu")
    model[0].processor.max_tokens = 60
    items = ["a", {"title": "t", "images": [picture(1)] * 14}, {"title": "t", "images": [picture(1)] * 2}]
    assert_left_out(model, items, [1], "max_tokens=60 leaves no room")


@pytest.mark.slow
def test_a_process_without_the_package_loads_and_encodes(tiny_folder, tmp_path) -> None:
    code = """
    import json
    import numpy as np
    from transformers import AutoModel, AutoProcessor
    from sentence_transformers import SentenceTransformer

    folder = sys.argv[1]
    items = ["words", {"title": "t", "audio": (np.ones(800, "float32"), 8000)}]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    one = model(**processor(items)).embeddings.detach().numpy()
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    encoder = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    other = encoder.encode(items)
    assert abs(one - other).max() < 1e-5
    encoder.save(folder + "-again")
    again = SentenceTransformer(folder + "-again", trust_remote_code=True, device="cpu").encode(items)
    assert abs(again - other).max() < 1e-6
    model.save_pretrained(folder + "-third")
    processor.save_pretrained(folder + "-third")
    third = SentenceTransformer(folder + "-third", trust_remote_code=True, device="cpu").encode(items)
    assert abs(third - other).max() < 1e-6
    print(json.dumps({"module": type(model).__module__, "sum": float(other.sum())}))
    """
    printed = json.loads(run_without_package(code, tiny_folder, tmp_path).splitlines()[-1])
    assert printed["module"].startswith("transformers_modules.")


def test_the_installed_package_loads_the_folder_without_the_flag(tiny_folder) -> None:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(tiny_folder)
    processor = AutoProcessor.from_pretrained(tiny_folder)
    assert type(model).__module__ == "modeling_sail.modeling_sail"
    assert isinstance(processor, SailEmbeddingProcessor)
    assert not model.training


def test_encode_takes_every_item_form_and_keeps_the_order(encoder, tiny) -> None:
    items = [*seven_items(), "bare", seven_items()[3]["image"]]
    together = encoder.encode(items)
    alone = np.stack([encoder.encode(item) for item in items])
    assert together.shape == (9, 64)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for size in (1, 2, 5, 64):
        np.testing.assert_allclose(encoder.encode(items, batch_size=size), together, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(items, token_budget=50), together, atol=1e-5)


def test_under_autocast_the_model_alone_computes_in_bfloat16(encoder) -> None:
    items = seven_items()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, batch = encoder.encode(items), encoder.processor(items)
        assert torch.is_autocast_enabled("cpu")
    for name, value in encoder.processor(items).items():
        assert torch.equal(batch[name], value), name
    plain = encoder.encode(items)
    assert ((cast * plain).sum(axis=1) > 0.999).all() and np.abs(cast - plain).max() > 1e-5


@pytest.mark.parametrize("budget", [0, -3, "9", 2.5, True])
def test_a_token_budget_that_cannot_be_is_one_line(encoder, budget) -> None:
    with pytest.raises(ValueError, match=rf"^token_budget={budget!r} must be a whole number .* above 0.*$"):
        encoder.encode(["a", "b"], token_budget=budget)
    with pytest.raises(ValueError, match="token_budget="):  # as `OnnxSail` asks, which has the processor's passes too
        next(encoder.processor.batches([], "", budget))
    many = encoder.encode(["a", "b"], token_budget=np.int64(9))
    np.testing.assert_allclose(many, encoder.encode(["a", "b"], token_budget=None), atol=1e-5)


def test_prompts_change_the_embedding_and_match_the_processor(encoder) -> None:
    plain = encoder.encode("a kangaroo")
    named = encoder.encode("a kangaroo", prompt_name="q2i_query")
    assert np.abs(plain - named).max() > 1e-3
    np.testing.assert_allclose(encoder.encode_query("a kangaroo"), named, atol=1e-6)
    document = encoder.encode("a kangaroo", prompt_name="q2i_target")
    np.testing.assert_allclose(encoder.encode_document("a kangaroo"), document, atol=1e-6)
    processor = encoder.processor
    assert encoder.prompts["cls_target"] == processor.instruction_for("cls", "target")


def test_truncation_precision_and_similarity(encoder) -> None:
    items = seven_items()
    whole = encoder.encode(items)
    np.testing.assert_allclose(encoder.encode(items, truncate_dim=16), whole[:, :16], atol=1e-6)
    assert encoder.encode(items, precision="ubinary").shape == (7, 8)
    assert encoder.encode(items, precision="int8").dtype == np.int8
    similarity = encoder.similarity(whole, whole)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(7), atol=1e-5, rtol=0)


def test_a_bad_item_is_a_row_of_nan_and_harms_no_neighbour(encoder) -> None:
    items = seven_items()
    mixed = [*items[:2], {"image": b"broken"}, *items[2:]]
    found = encoder.encode(mixed, errors="skip")
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(np.delete(found, 2, axis=0), encoder.encode(items), atol=1e-6)
    with pytest.raises(ValueError, match="1 bad item"):
        encoder.encode(mixed)


def test_modalities_are_advertised(encoder) -> None:
    assert encoder.supports("image")
    assert encoder.supports("audio")
    assert encoder.supports(("image", "text"))
    assert encoder.get_embedding_dimension() == 64
    assert encoder.max_seq_length == 256


@pytest.mark.slow
def test_encoding_in_two_processes_gives_the_same_vectors(tiny_folder, tmp_path) -> None:
    code = """
    import numpy as np
    from sentence_transformers import SentenceTransformer

    if __name__ == "__main__":
        encoder = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
        items = [{"title": "x" * n, "audio": (np.ones(800 * n, "float32"), 8000)} for n in range(1, 9)]
        one, two = encoder.encode(items), encoder.encode(items, device=["cpu", "cpu"], chunk_size=4)
        assert abs(one - two).max() < 1e-5
        print("same")
    """
    assert "same" in run_without_package(code, tiny_folder, tmp_path)


def test_the_published_model_trains_a_step_with_sentence_transformers_own_trainer(tiny_folder, tmp_path) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(str(tiny_folder), trust_remote_code=True, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = {"anchor": [f"query {n}" for n in range(4)], "positive": [f"a target {n} that is longer" for n in range(4)]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(rows), loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("text_tower" in name for name in moved)
