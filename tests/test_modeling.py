"""The model keeps its promises: batch invariance, isolation, shapes, gradients, attention kernels, errors."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling_sail.training.build import build_tiny, make_processor
from transformers import AutoConfig, BertConfig

from modeling_sail.configuration_sail import SailEmbeddingConfig, preset_config
from modeling_sail.modeling_sail import SailEmbeddingModel, as_tokens, tower_width

from .conftest import picture, seven_items, sound

TOLERANCE = 1e-5


@torch.inference_mode()
def embed(tiny, items, **kwargs):
    model, processor = tiny
    return model(**processor(items, task="i2i", side="target"), **kwargs)


def test_an_item_embeds_the_same_alone_and_in_any_batch(tiny) -> None:
    items = seven_items()
    alone = torch.cat([embed(tiny, [item]).embeddings for item in items])
    for size in (1, 2, 7, 16, 64):
        order = random.Random(size).choices(range(len(items)), k=size)
        together = embed(tiny, [items[place] for place in order]).embeddings
        torch.testing.assert_close(together, alone[order], atol=TOLERANCE, rtol=0)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(7)))
def test_the_order_of_a_batch_does_not_matter(tiny, order) -> None:
    items = seven_items()
    straight = embed(tiny, items).embeddings
    shuffled = embed(tiny, [items[place] for place in order]).embeddings
    torch.testing.assert_close(shuffled, straight[list(order)], atol=TOLERANCE, rtol=0)


def test_a_single_modality_embeds_as_if_the_item_had_no_other(tiny) -> None:
    whole = {"title": "a cat", "image": picture(1), "audio": sound(2)}
    output = embed(tiny, [whole], output_modality_embeddings=True)
    for field, key in (("title", "text"), ("image", "vision"), ("audio", "audio")):
        alone = embed(tiny, [{field: whole[field]}]).embeddings
        torch.testing.assert_close(output[f"{key}_embeddings"], alone, atol=TOLERANCE, rtol=0)
        assert not torch.allclose(output.embeddings, alone, atol=1e-3), "the fused vector must differ from each part"


def test_a_missing_modality_is_marked_and_its_embedding_is_zero(tiny) -> None:
    output = embed(tiny, seven_items(), output_modality_embeddings=True)
    audio, vision, text = output.modality_mask.T
    assert text.tolist() == [True, False, False, True, True, False, True]
    assert vision.tolist() == [False, True, False, True, False, True, True]
    assert audio.tolist() == [False, False, True, False, True, True, True]
    for name, mask in (("text", text), ("vision", vision), ("audio", audio)):
        norms = output[f"{name}_embeddings"].norm(dim=-1)
        assert (norms[~mask] == 0).all()
        assert (norms[mask] > 0).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch is to drop it for torchao
def test_dynamically_quantised_linears_embed_every_kind_of_item_near_the_float_ones(tiny) -> None:
    linear = torch.nn.Linear
    quantised = torch.ao.quantization.quantize_dynamic(tiny[0], {linear}, dtype=torch.qint8)
    assert not any(type(part) is linear for part in quantised.modules())
    found, exact = (embed((model, tiny[1]), seven_items()).embeddings for model in (quantised, tiny[0]))
    assert found.isfinite().all() and not torch.equal(found, exact)
    assert (torch.cosine_similarity(found, exact) > 0.998).all()


def test_pooling_is_the_mean_of_tanh_over_all_tokens(tiny) -> None:
    model, processor = tiny
    batch = processor(["a few words", "one"])
    output = embed(tiny, ["a few words", "one"])
    with torch.inference_mode():
        output = model(**batch)
    expected = torch.stack(
        [
            hidden[mask.bool()].tanh().mean(dim=0)
            for hidden, mask in zip(output.last_hidden_state, batch["attention_mask"], strict=True)
        ]
    )
    torch.testing.assert_close(output.embeddings, expected, atol=1e-6, rtol=0)


def test_without_the_prompt_in_the_pool_its_tokens_are_left_out() -> None:
    torch.manual_seed(0)
    model, processor = build_tiny(pool_prompt=False)
    batch = processor(["words"], task="q2i")
    with torch.inference_mode():
        output = model(**batch)
    item = output.last_hidden_state[0][batch["modality_ids"][0] > 1].tanh().mean(dim=0)
    torch.testing.assert_close(output.embeddings[0], item, atol=1e-6, rtol=0)


def test_fusion_sees_both_ways(tiny) -> None:
    model, _ = tiny
    with torch.inference_mode():
        first = model(input_ids=torch.tensor([[9, 10, 11]])).last_hidden_state[0, 0]
        other = model(input_ids=torch.tensor([[9, 10, 12]])).last_hidden_state[0, 0]
        padded = model(
            input_ids=torch.tensor([[9, 10, 12, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]])
        ).last_hidden_state[0, 0]
    assert (first - other).abs().max() > 1e-2, "the first token must see the last"
    torch.testing.assert_close(padded, other, atol=TOLERANCE, rtol=0)


def test_frame_positions_matter_and_owners_keep_pictures_apart(tiny) -> None:
    one, two = picture(1), picture(2)
    forward, backward = embed(tiny, [{"images": [one, two]}, {"images": [two, one]}]).embeddings
    assert (forward - backward).abs().max() > 1e-6


def test_latents_per_frame_gives_each_frame_its_own_tokens() -> None:
    torch.manual_seed(0)
    model, processor = build_tiny(latents_per_frame=True)
    batch = processor([{"images": [picture(1), picture(2)]}, "text", {"image": picture(3)}])
    assert (batch["modality_ids"] == 3).sum(dim=1).tolist() == [8, 0, 4]
    with torch.inference_mode():
        assert model(**batch).embeddings.isfinite().all()


def test_late_fusion_is_the_gated_sum_and_falls_back_without_a_picture(tiny) -> None:
    model, processor = tiny
    items = [{"title": "x", "image": picture(1)}, "no picture"]
    batch = processor(items)
    with torch.inference_mode():
        output = model(**batch, output_late_fusion=True)
        visual = model.get_image_features(batch["pixel_values"]).pooler_output.mean(dim=1)[0]
        gate = model.late_fusion_gate(torch.cat([visual, output.embeddings[0]])).sigmoid()
    expected = gate * visual + (1 - gate) * output.embeddings[0]
    torch.testing.assert_close(output.late_fusion_embeddings[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.late_fusion_embeddings[1], output.embeddings[1])


def test_every_parameter_gets_a_gradient(tiny) -> None:
    model, processor = build_tiny()
    output = model.train()(**processor(seven_items()), output_modality_embeddings=True, output_late_fusion=True)
    loss = output.embeddings.square().sum() + output.late_fusion_embeddings.square().sum()
    (loss * model.temperatures("default")).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # Key biases cancel in a softmax: their gradient is zero, as it should be.
    assert [name for name in without if not name.endswith(("key.bias", "k_proj.bias"))] == []


def test_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, processor = build_tiny()
    batch = processor(seven_items())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**batch).embeddings.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("perceiver") and grad.any() for name, grad in gradients[0].items())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "packed"])
def test_attention_kernels_agree(tiny, kernel) -> None:
    model, processor = tiny
    batch = processor(seven_items())
    with torch.inference_mode():
        expected = model(**batch).embeddings
        model.set_attn_implementation(kernel)
        try:
            found = model(**batch).embeddings
        finally:
            model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_an_encoder_cannot_be_made_causal() -> None:
    encoder = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match="needs a decoder"):
        build_tiny(text_config=encoder, causal=True)


def test_cached_tower_features_stand_for_pictures_and_sounds(tiny) -> None:
    model, processor = tiny
    batch = processor(seven_items())
    with torch.inference_mode():
        expected = model(**batch).embeddings
        batch["image_features"] = model.vision_features(batch.pop("pixel_values"))
        batch["audio_features"] = model.audio_features(batch.pop("input_features"))
        torch.testing.assert_close(model(**batch).embeddings, expected, atol=TOLERANCE, rtol=0)


# --- towers of other families ---------------------------------------------------------------------------------------

VISION = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "efficientnet": {
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "image_size": 32,
        "hidden_dim": 128,
    },
    "siglip_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "vision_use_head": False,
    },
    "clip_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    },
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
TEXT = {
    "bert": SIZES,
    "qwen2": {**SIZES, "num_key_value_heads": 2},
    "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "modernbert": {
        **SIZES,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "cls_token_id": 0,
        "sep_token_id": 0,
    },
}


def tiny_with(**towers):
    """Model and processor of the tiny preset with another tower."""
    torch.manual_seed(0)
    return build_tiny(**towers)


@pytest.mark.parametrize("family", sorted(VISION))
def test_any_vision_tower_works(family) -> None:
    pair = tiny_with(vision_config={"model_type": family, **VISION[family]})
    items = seven_items()
    together = embed(pair, items).embeddings
    alone = torch.cat([embed(pair, [item]).embeddings for item in items])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", sorted(TEXT))
def test_any_text_backbone_works_and_sees_both_ways(family) -> None:
    pair = tiny_with(text_config={"model_type": family, **TEXT[family]})
    items = seven_items()
    together = embed(pair, items).embeddings
    alone = torch.cat([embed(pair, [item]).embeddings for item in items])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)
    with torch.inference_mode():
        first = pair[0](input_ids=torch.tensor([[9, 10, 11]])).last_hidden_state[0, 0]
        other = pair[0](input_ids=torch.tensor([[9, 10, 12]])).last_hidden_state[0, 0]
    assert (first - other).abs().max() > 1e-3


def test_a_clap_tower_works_with_its_own_extractor_and_pooler() -> None:
    from transformers import ClapFeatureExtractor

    audio = {
        "model_type": "clap_audio_model",
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
    }
    torch.manual_seed(0)
    config = preset_config("tiny", audio_config=audio, audio_pooling="pooler")
    _, base = build_tiny()
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=16_000, max_length_s=1, hop_length=160, fft_window_size=512
    )
    processor = make_processor(config, base.tokenizer, base.image_processor, extractor, max_tokens=256)
    pair = SailEmbeddingModel(config).eval(), processor
    items = [{"audio": sound(1, 0.3)}, {"audio": sound(2, 2.5), "title": "two windows and a half"}, "text"]
    together = embed(pair, items).embeddings
    alone = torch.cat([embed(pair, [item]).embeddings for item in items])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


def test_a_model_of_text_alone_works() -> None:
    config = preset_config("tiny", vision_config=None, audio_config=None)
    model = SailEmbeddingModel(config).eval()
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[9, 10]])).embeddings.shape == (1, 64)
    with pytest.raises(ValueError, match="no vision tower"):
        model.get_image_features(torch.zeros(1, 3, 32, 32))


# --- errors and sizes -----------------------------------------------------------------------------------------------


def test_pictures_that_fit_no_placeholder_are_refused(tiny) -> None:
    model, processor = tiny
    batch = processor([{"image": picture(1)}, "text"])
    with pytest.raises(ValueError, match="names rows"):
        model(**{**batch, "image_owner": torch.tensor([1])})
    with pytest.raises(ValueError, match="placeholders"):
        cut = {**batch, "input_ids": batch["input_ids"][:, 3:], "modality_ids": batch["modality_ids"][:, 3:]}
        ids = cut["modality_ids"].clone()
        ids[0, (ids[0] == 3).nonzero()[0]] = 4
        model(**{**cut, "modality_ids": ids, "attention_mask": (ids != 0).long()})
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()


def test_more_frames_than_positions_are_refused(tiny, monkeypatch) -> None:
    model, processor = tiny
    monkeypatch.setattr(processor, "max_frames", 64)  # as in a folder whose processor was edited
    with pytest.raises(ValueError, match="max_frames=16"):
        model(**processor([{"images": [picture(1)] * 17}]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matryoshka_dims": [32, 16, 64]}, "matryoshka_dims"),
        ({"matryoshka_dims": [16, 32]}, "hidden size 64"),
        ({"perceiver_heads": 3}, "divisor of latent_size"),
        ({"num_latents": 0}, "num_latents"),
        ({"audio_pooling": "max"}, "audio_pooling"),
        ({"temperatures": {"a": 0.0}}, "temperatures"),
        ({"text_config": {"hidden_size": 8}}, "model_type"),
    ],
)
def test_a_bad_configuration_names_its_field(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        preset_config("tiny", **fields)


def test_configurations_survive_saving(tmp_path) -> None:
    config = preset_config("tiny", latents_per_frame=True, temperatures={"a": 0.07, "b": 0.02})
    config.save_pretrained(tmp_path)
    again = SailEmbeddingConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.text_config.is_causal is False


def test_preset_sizes() -> None:
    assert sum(p.numel() for p in SailEmbeddingModel(preset_config("tiny")).parameters()) < 2e6
    with torch.device("meta"):
        big = SailEmbeddingModel(preset_config("2b"))
    assert 1.8e9 <= sum(p.numel() for p in big.parameters()) <= 2.1e9
    assert big.config.hidden_size == 1536
    assert big.config.matryoshka_dims == [128, 768, 1536]


def test_tower_arithmetic() -> None:
    assert as_tokens(torch.zeros(2, 5, 3, 4)).shape == (2, 12, 5)
    assert as_tokens(torch.zeros(2, 7, 5)).shape == (2, 7, 5)
    assert tower_width(AutoConfig.for_model("resnet", hidden_sizes=[8, 24])) == 24
    assert tower_width(AutoConfig.for_model("efficientnet", hidden_dim=96)) == 96


def test_temperatures_are_parameters_with_their_own_initial_values() -> None:
    model = SailEmbeddingModel(preset_config("tiny", temperatures={"pictures": 0.07, "queries": 0.02}))
    assert model.temperatures("queries").item() == pytest.approx(0.02)
    assert model.temperatures.log.requires_grad
    with pytest.raises(ValueError, match="No temperature for dataset 'x'"):
        model.temperatures("x")


def test_a_frozen_tower_keeps_its_batch_norms_still() -> None:
    model, processor = tiny_with(vision_config={"model_type": "resnet", **VISION["resnet"]})
    model.vision_tower.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.vision_tower.state_dict().items()}
    model.train()(**processor([{"image": picture(1)}])).embeddings.sum().backward()
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, before[name]), name
