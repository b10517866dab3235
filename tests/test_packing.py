"""Rows packed end to end embed as padded ones do, whatever the backbone; and never see each other."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.build import build_tiny
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    XLMRobertaConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_sail import kernels_sail, packing_sail
from modeling_sail.kernels_sail import in_few_sizes, plain_kernels
from modeling_sail.modeling_sail import build_tower
from modeling_sail.packing_sail import fuse_packed, packed_attention
from modeling_sail.sentence_transformer_sail import SailSentenceTransformer

from .conftest import seven_items

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 264,
}
BACKBONES = {
    "bert": BertConfig(**SIZES),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
}


def both(config: PretrainedConfig, items: list, **options):
    """Outputs of a model of this backbone as it loads, and packed."""
    torch.manual_seed(0)
    model, processor = build_tiny(text_config=config, **options)
    batch = processor(items, task="i2i")
    with torch.inference_mode():
        plain = model(**batch, output_modality_embeddings=True, output_hidden_states=True)
        model.set_attn_implementation("packed")
        return plain, model(**batch, output_modality_embeddings=True, output_hidden_states=True), batch


CASES = [(name, options) for name in BACKBONES for options in ({}, {"causal": True}, {"fusion": "separate"})]
CASES.remove(("bert", {"causal": True}))  # an encoder has no causal form


@pytest.mark.parametrize(("backbone", "options"), CASES)
def test_packed_and_padded_rows_embed_alike(backbone, options) -> None:
    plain, packed, batch = both(BACKBONES[backbone], seven_items(), **options)
    for name in ("embeddings", "text_embeddings", "vision_embeddings", "audio_embeddings"):
        torch.testing.assert_close(packed[name], plain[name], rtol=0, atol=1e-5)
    assert packed.last_hidden_state.shape == plain.last_hidden_state.shape
    if not options.get("fusion"):
        there = batch["attention_mask"].bool()
        for ours, other in zip(packed.hidden_states, plain.hidden_states, strict=True):
            torch.testing.assert_close(ours[there], other[there], rtol=0, atol=1e-5)
            assert not ours[~there].any()


def test_it_runs_without_padding(monkeypatch) -> None:
    model, processor = build_tiny()
    model.set_attn_implementation("packed")
    batch = processor(["a long text " * 9, "b", "cd"])
    seen = []
    model.text_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    with torch.inference_mode():
        model(**batch)
    tokens = int(batch["attention_mask"].sum())
    assert seen[-1][:2] == (1, in_few_sizes(tokens)) and tokens < in_few_sizes(tokens) < batch["input_ids"].numel()


def test_gradients_are_those_of_padded_rows() -> None:
    gradients = []
    for kernel in ("sdpa", "packed"):
        torch.manual_seed(0)
        model, processor = build_tiny()
        model.set_attn_implementation(kernel)
        model(**processor(seven_items())).embeddings.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert gradients[0]["text_tower.embed_tokens.weight"].any()


def test_it_is_chosen_when_a_model_is_loaded(tiny_folder) -> None:
    module = SailSentenceTransformer.load(str(tiny_folder)).eval()
    packed = SailSentenceTransformer.load(str(tiny_folder), model_kwargs={"attn_implementation": "packed"}).eval()
    assert packed.model.text_tower.config._attn_implementation == "packed"
    with torch.inference_mode():
        with plain_kernels():
            padded = module(module.preprocess(seven_items()))["sentence_embedding"]
        ours = packed(packed.preprocess(seven_items()))["sentence_embedding"]
    assert not torch.equal(ours, padded)
    torch.testing.assert_close(ours, padded, rtol=0, atol=1e-5)


# --- on a CPU by default ----------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of each pass that was packed, as it is."""
    seen: list[int] = []

    def watched(tower, embeds, *args, **kwargs):
        output = fuse_packed(tower, embeds, *args, **kwargs)
        if tower in packing_sail._PACKS:  # else it is being tried
            seen.append(len(embeds))
        return output

    monkeypatch.setattr(packing_sail, "fuse_packed", watched)
    return seen


RAGGED = ["a long text " * 9, "b", "cd"]


@pytest.mark.parametrize(("backbone", "options"), CASES)
def test_without_padding_items_embed_alike(passes, backbone, options) -> None:
    torch.manual_seed(0)
    model, processor = build_tiny(text_config=BACKBONES[backbone], **options)
    batch = processor(seven_items(), task="i2i")
    with torch.inference_mode():
        ways = [model(**batch, unpadded=unpadded).embeddings for unpadded in (False, True)]
    assert passes and model.text_tower.config._attn_implementation == "sdpa"
    torch.testing.assert_close(ways[1], ways[0], rtol=0, atol=1e-5)


def test_sentence_transformers_runs_without_padding_and_plain_kernels_with_it(tiny, passes) -> None:
    module = SailSentenceTransformer(*tiny)
    with torch.inference_mode():
        ours = module(module.preprocess(RAGGED))["sentence_embedding"]
        assert sum(passes) == len(RAGGED)
        with plain_kernels():
            plain = module(module.preprocess(RAGGED))["sentence_embedding"]
        assert sum(passes) == len(RAGGED)
        module(module.preprocess(["equal", "equal"]))
        assert sum(passes) == len(RAGGED)  # there is no padding
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


def test_a_row_beyond_a_sliding_window_is_padded_after_all(passes) -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=40)
    model, processor = build_tiny(text_config=config)
    short, long = processor(["ab", "c"]), processor(["a long text " * 9, "b"])
    with torch.inference_mode():
        for batch, packed in ((short, 1), (long, 1)):
            ways = [model(**batch, unpadded=unpadded).embeddings for unpadded in (False, True)]
            torch.testing.assert_close(ways[1], ways[0], rtol=0, atol=1e-5)
            assert len(passes) == packed
        model.text_tower.set_attn_implementation("packed")  # asked for by name it is the same
        torch.testing.assert_close(model(**long).embeddings, ways[0], rtol=0, atol=1e-5)


def test_a_window_that_only_the_mask_has_is_seen() -> None:
    config = Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_experts_per_tok=1, use_sliding_window=True, sliding_window=16, max_window_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, processor = build_tiny(text_config=config)
    batch = processor(RAGGED)
    with torch.inference_mode():
        ways = [model(**batch, unpadded=unpadded).embeddings for unpadded in (False, True)]
    torch.testing.assert_close(ways[1], ways[0], rtol=0, atol=1e-5)


def test_an_adapter_that_is_switched_off_is_off(passes) -> None:
    torch.manual_seed(0)
    model, processor = build_tiny()
    batch = processor(RAGGED)
    with torch.inference_mode():
        bare = model(**batch, unpadded=True).embeddings
    model.text_tower.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    with torch.inference_mode():
        adapted = model(**batch, unpadded=True).embeddings
        assert not torch.allclose(adapted, bare, atol=1e-3)
        model.text_tower.disable_adapters()
        torch.testing.assert_close(model(**batch, unpadded=True).embeddings, bare, rtol=0, atol=1e-5)


def test_a_backbone_whose_positions_begin_elsewhere_is_padded_and_refused_where_it_is_asked_for(passes) -> None:
    config = XLMRobertaConfig(**SIZES, max_position_embeddings=300, pad_token_id=1)
    model, processor = build_tiny(text_config=config)
    with torch.no_grad():
        model.text_tower.embeddings.position_embeddings.weight.normal_()
    batch = processor(RAGGED)
    with torch.inference_mode():
        ways = [model(**batch, unpadded=unpadded).embeddings for unpadded in (False, True)]
        torch.testing.assert_close(ways[1], ways[0], rtol=0, atol=1e-6)
        assert not passes
        assert len(kernels_sail._TWINS.get(model.text_tower, {})) == 1  # held for its linears, if these are any faster
        model.text_tower.set_attn_implementation("packed")
        with pytest.raises(ValueError, match="'xlm-roberta' backbone gives other numbers"):
            model(**batch)


def test_the_twin_that_packs_is_the_only_one(monkeypatch) -> None:
    monkeypatch.setenv("SAIL_ONEDNN", "1")
    if not kernels_sail.onednn_pays():
        pytest.skip("this build of torch has no oneDNN linears")
    module = SailSentenceTransformer(*build_tiny())
    with torch.inference_mode():
        for texts in (RAGGED, ["equal", "equal"]):
            module(module.preprocess(texts))
            module.model(**module.processor(texts))
    (gains,) = kernels_sail._TWINS[module.model.text_tower]
    assert gains == (False, True, "packed")


def test_another_copy_of_the_file_changes_nothing(passes) -> None:
    model, processor = build_tiny()
    batch = processor(RAGGED)
    with torch.inference_mode():
        before = model(**batch, unpadded=True).embeddings
        spec = spec_from_file_location("modeling_sail.another_packing", packing_sail.__file__)
        other = module_from_spec(spec)
        spec.loader.exec_module(other)  # as the code in a model's folder does, it takes the name in transformers
        assert other._end_to_end is packing_sail._end_to_end and other._mask is not packing_sail._mask
        torch.testing.assert_close(model(**batch, unpadded=True).embeddings, before, rtol=0, atol=0)
    assert len(passes) == 2


def test_one_row_without_a_mask_keeps_its_sliding_window() -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3)
    tower, states = build_tower(config).eval(), torch.randn(1, 12, 64)
    with torch.inference_mode():
        expected = tower(inputs_embeds=states).last_hidden_state
        tower.set_attn_implementation("packed")
        torch.testing.assert_close(tower(inputs_embeds=states).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_attention_weights_need_a_padded_pass() -> None:
    model, processor = build_tiny()
    model.set_attn_implementation("packed")
    with torch.inference_mode():
        assert model(**processor(["one", "and two"]), output_attentions=True).embeddings.isfinite().all()


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum), st.booleans(), st.sampled_from([1, 2, 4]))
def test_each_row_attends_to_itself_alone(sizes, causal, key_heads) -> None:
    total = sum(sizes)
    query, key, value = (torch.randn(1, heads, total, 8) for heads in (4, key_heads, key_heads))
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    ours, _ = packed_attention(nn.Identity(), query, key, value, None, is_causal=causal, bounds=bounds, longest=6)
    row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    allowed = row[:, None] == row
    if causal:
        allowed &= torch.ones(total, total).tril().bool()
    repeated = [states.repeat_interleave(4 // key_heads, dim=1) for states in (key, value)]
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=allowed)
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "refused"), [({"sliding_window": 3}, True), ({"sliding_window": 9}, False), ({"softcap": 5.0}, True)]
)
def test_what_it_lacks_is_refused(asked, refused) -> None:
    states, bounds = torch.randn(1, 2, 9, 4), torch.tensor([0, 5, 9], dtype=torch.int32)
    run = lambda: packed_attention(nn.Identity(), states, states, states, None, bounds=bounds, longest=5, **asked)  # noqa: E731
    if not refused:
        assert run()[0].shape == (1, 9, 2, 4)
        return
    with pytest.raises(ValueError, match="take attn_implementation='sdpa'"):
        run()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20])
@pytest.mark.parametrize("rows", [0, 3])
def test_products_are_attention(monkeypatch, key_heads, scaling, at_once, rows) -> None:
    monkeypatch.setattr(packing_sail, "_SCORES_AT_ONCE", at_once)
    query = torch.randn(rows, 11, 4, 8).transpose(1, 2)
    key, value = (torch.randn(rows, 7, key_heads, 8).transpose(1, 2) for _ in range(2))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(packing_sail._products(query, key, value, scaling), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that attend by products, as on a CPU where that pays."""
    seen = []
    through = packing_sail._products

    def counted(query, *others):
        seen.append(tuple(query.shape))
        return through(query, *others)

    monkeypatch.setattr(packing_sail, "onednn_pays", lambda dtype: True)
    monkeypatch.setattr(packing_sail, "_SCORES", 4 * 7 * 7)
    monkeypatch.setattr(packing_sail, "_products", counted)
    return seen


def attended(states: torch.Tensor, layer: nn.Module | None = None, **options):
    keys = options.pop("keys", states)
    with torch.no_grad():
        return packed_attention(layer or nn.Identity(), states, keys, keys, options.pop("mask", None), **options)[0]


def test_bfloat16_on_a_cpu_attends_by_products_where_it_is_plain_attention(products) -> None:
    states, layer = torch.randn(2, 4, 7, 8), nn.Identity()
    half = states.bfloat16()
    layer.is_causal = False
    near = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(attended(half, layer).float(), attended(states, layer), **near)
    ends = torch.tensor([0, 7, 9, 18], dtype=torch.int32)
    rows = torch.randn(1, 4, 18, 8)
    options = {"bounds": ends, "longest": 9}
    torch.testing.assert_close(attended(rows.bfloat16(), **options).float(), attended(rows, **options), **near)
    assert products == [(2, 4, 7, 8), (1, 4, 7, 8), (1, 4, 9, 8)]  # the row of two tokens has too few scores


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": None},  # a layer that says nothing is causal, as under "sdpa"
        {"dropout": 0.5},
        {"mask": torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()},
        {"position_bias": torch.randn(1, 4, 7, 7).bfloat16()},
        {"keys": torch.randn(1, 4, 7, 8).bfloat16()},  # one row for all
    ],
)
def test_other_attention_is_torchs_own(products, options) -> None:
    states = torch.randn(2, 4, 7, 8).bfloat16()
    options = {"is_causal": False, **options}
    torch.manual_seed(0)
    ours = attended(states, **options)
    torch.manual_seed(0)
    keys, mask = options.pop("keys", states), options.pop("mask", None)
    torch.testing.assert_close(ours, sdpa_attention_forward(nn.Identity(), states, keys, keys, mask, **options)[0])
    assert not products


@pytest.mark.parametrize(("name", "said"), [("onednn_pays", lambda dtype: False), ("traced", lambda: True)])
def test_where_products_do_not_pay_and_in_graphs_attention_is_torchs_own(products, monkeypatch, name, said) -> None:
    states = torch.randn(2, 4, 7, 8).bfloat16()
    attended(states, is_causal=False)
    assert len(products) == 1
    monkeypatch.setattr(packing_sail, name, said)
    attended(states, is_causal=False)
    assert len(products) == 1


@pytest.mark.parametrize(("heads", "key_heads", "shared"), [(6, 3, True), (6, 4, False), (1, 4, False)])
def test_heads_that_do_not_share_keys_evenly_are_left_to_torch(products, heads, key_heads, shared) -> None:
    query, key = (torch.randn(1, count, 16, 8).bfloat16() for count in (heads, key_heads))
    with torch.no_grad():
        assert packing_sail._by_products(query, key, 0.0) is shared


def test_training_and_few_scores_attend_by_torchs_own(products) -> None:
    states = torch.randn(2, 4, 7, 8).bfloat16().requires_grad_()
    packed_attention(nn.Identity(), states, states, states, None, is_causal=False)[0].sum().backward()
    attended(torch.randn(4, 4, 4, 8).bfloat16(), is_causal=False)  # of a row; how many rows there are does not count
    assert not products and states.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_of_cuda_gives_the_rows_numbers(causal) -> None:
    sizes = [5, 130, 1, 64]
    query, key, value = (torch.randn(1, heads, sum(sizes), 64) for heads in (8, 2, 2))
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    expected, _ = packed_attention(nn.Identity(), query, key, value, None, is_causal=causal, bounds=bounds, longest=130)
    half = [states.cuda().bfloat16() for states in (query, key, value)]
    ours, _ = packed_attention(nn.Identity(), *half, None, is_causal=causal, bounds=bounds.cuda(), longest=130)
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=0.05, atol=0.03)
