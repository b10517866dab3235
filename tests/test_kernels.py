"""Faster kernels give the model's own numbers, change nothing of it, and follow its weights."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, EfficientNetConfig, WhisperConfig

from modeling_sail import kernels_sail, packing_sail
from modeling_sail.kernels_sail import (
    PackedLinear,
    for_inference,
    in_few_sizes,
    onednn_pays,
    plain_kernels,
    run_tower,
    small_caches,
)
from modeling_sail.modeling_sail import build_tower

from .conftest import seven_items


@pytest.fixture
def packed(monkeypatch):
    monkeypatch.setenv("SAIL_ONEDNN", "1")
    if not onednn_pays():
        pytest.skip("this build of torch has no oneDNN linears")


@pytest.fixture
def vision() -> nn.Module:
    """EfficientNet with statistics and scales that a forgotten batch norm would show."""
    torch.manual_seed(0)
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
    config = EfficientNetConfig(image_size=32, **sizes)
    tower = build_tower(config).eval()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return tower


def whisper() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    return build_tower(WhisperConfig(**sizes, num_mel_bins=16, max_source_positions=20)).eval()


def both(tower: nn.Module, values: Tensor, field: str = "last_hidden_state") -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        fast = run_tower(tower, values, field)
        with plain_kernels():
            return fast, run_tower(tower, values, field)


def twin_of(module: nn.Module) -> nn.Module | None:
    return next((twin for _, twin in kernels_sail._TWINS.get(module, {}).values()), None)


@pytest.mark.parametrize("pictures", [1, 3, 8, 19])
def test_folded_batch_norms_give_the_towers_numbers(vision, pictures) -> None:
    fast, plain = both(vision, torch.randn(pictures, 3, 32, 32))
    assert twin_of(vision) is not None and not any(
        isinstance(part, nn.BatchNorm2d) for part in twin_of(vision).modules()
    )
    assert plain.std() > 1e-2
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("size", [32, 33])
def test_depthwise_convolutions_pad_for_themselves(vision, size) -> None:
    fast, plain = both(vision, torch.randn(2, 3, size, size))
    blocks = [block.depthwise_conv for block in twin_of(vision).encoder.blocks]
    strided = [block for block in blocks if block.depthwise_conv.stride == (2, 2)]
    assert strided and all(isinstance(block.depthwise_conv_pad, nn.Identity) for block in strided)
    assert isinstance(twin_of(vision).embeddings.padding, nn.ZeroPad2d)  # a dense kernel would pay for its zeros
    assert all(block.depthwise_conv.kernel_size[0] in (4, 6) for block in strided)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_gates_that_are_always_open_are_left_out_and_others_stay(vision) -> None:
    gates = [block.squeeze_excite for block in vision.encoder.blocks]
    with torch.no_grad():
        for gate in gates[1:]:
            gate.expand.weight.zero_()
            gate.expand.bias.fill_(100.0)
    fast, plain = both(vision, torch.randn(3, 3, 32, 32))
    kinds = [type(block.squeeze_excite) for block in twin_of(vision).encoder.blocks]
    assert kinds == [type(gates[0])] + [nn.Identity] * (len(gates) - 1)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_packed_linears_give_the_towers_numbers(packed) -> None:
    tower = whisper()
    fast, plain = both(tower, torch.randn(9, 16, 40))
    assert any(isinstance(part, PackedLinear) for part in twin_of(tower).modules())
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_linears_in_bfloat16_are_packed_too(packed) -> None:
    tower = whisper().to(torch.bfloat16)
    fast, plain = both(tower, torch.randn(9, 16, 40))
    linears = [part for part in twin_of(tower).modules() if isinstance(part, PackedLinear)]
    assert linears and all(linear.weight.dtype == torch.bfloat16 for linear in linears)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, plain, rtol=0.02, atol=0.02)
    with torch.no_grad():
        mixed = torch.randn(3, linears[0].in_features)
        with pytest.raises(RuntimeError, match="dtype"):
            linears[0](mixed)  # as the linear itself


@pytest.fixture
def own_attention(monkeypatch) -> None:
    """The package's own is what "packed" names: the code of a model's folder may have taken the name."""
    AttentionInterface.register("packed", packing_sail.packed_attention)
    monkeypatch.setattr(packing_sail, "_SCORES", 2 * 20 * 20)


def test_a_tower_in_bfloat16_attends_by_products(packed, own_attention, monkeypatch) -> None:
    seen = []
    through = packing_sail._products
    monkeypatch.setattr(
        packing_sail, "_products", lambda query, *rest: (seen.append(len(query)), through(query, *rest))[1]
    )
    tower = whisper()
    values = torch.randn(9, 16, 40)
    both(tower, values)
    assert not seen  # in float32 torch's own is as fast
    with torch.no_grad():
        exact = tower(values).last_hidden_state
    fast, plain = both(tower.to(torch.bfloat16), values)
    assert seen == [1, 1, 8, 8, 1, 1]  # what is compared, then the batches, in each of two layers
    assert tower.config._attn_implementation == "sdpa" and twin_of(tower) is not None
    off = lambda found: float((found.float() - exact).norm() / exact.norm())  # noqa: E731
    assert off(fast) < 2 * off(plain) < 0.05


def test_what_is_compared_does_not_depend_on_the_first_item(packed, own_attention, monkeypatch) -> None:
    seen = []
    through = packing_sail._products
    monkeypatch.setattr(packing_sail, "_products", lambda query, *rest: (seen.append(query), through(query, *rest))[1])
    for values in (torch.zeros(1, 16, 40), torch.ones(1, 16, 40)):
        tower = whisper().to(torch.bfloat16)
        torch.manual_seed(int(values.sum()))  # whatever was drawn before
        both(tower, values)
    half = len(seen) // 2  # of each tower first what is compared, then the item
    assert torch.equal(seen[0], seen[half]) and not torch.equal(seen[half - 2], seen[-2])


def test_a_tower_whose_other_attention_gives_other_numbers_keeps_its_own(packed, own_attention, monkeypatch) -> None:
    monkeypatch.setattr(packing_sail, "_products", lambda query, key, value, scaling: 100 * value)
    tower = whisper().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="moves its output by .* of its norm"):
        fast, plain = both(tower, torch.randn(3, 16, 40))
    torch.testing.assert_close(fast, plain, rtol=0.02, atol=0.02)
    assert any(isinstance(part, PackedLinear) for part in twin_of(tower).modules())  # what else is faster stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pictures_are_no_numbers(vision, packed, dtype) -> None:
    fast, plain = both(vision.to(dtype), torch.zeros(0, 3, 32, 32))
    assert fast.shape == plain.shape and not len(fast)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_takes_the_shapes_of_a_linear(packed, shape, bias) -> None:
    linear, hidden = nn.Linear(24, 5, bias=bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(hidden), linear(hidden), rtol=1e-5, atol=1e-6)


def test_a_model_embeds_the_same_with_and_without(tiny, packed) -> None:
    model, processor = tiny
    batch = processor(seven_items())
    with torch.no_grad():
        fast = model.eval()(**batch).embeddings
        with plain_kernels():
            plain = model(**batch).embeddings
    assert all(twin_of(part) is not None for part in (model.text_tower, model.perceiver, model.audio_adapter))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)


def test_a_model_in_bfloat16_embeds_nearly_the_same_with_and_without(tiny, packed) -> None:
    model, processor = copy.deepcopy(tiny[0]).eval(), tiny[1]
    batch = processor(seven_items())
    with torch.no_grad():
        exact = model(**batch).embeddings
        model.to(torch.bfloat16)
        fast = model(**batch, unpadded=True).embeddings
        with plain_kernels():
            plain = model(**batch).embeddings
    assert all(twin_of(part) is not None for part in (model.text_tower, model.perceiver, model.audio_adapter))
    assert fast.dtype == plain.dtype
    near = nn.functional.cosine_similarity
    assert near(fast.float(), exact).min() > 0.995 and near(plain.float(), exact).min() > 0.995


def test_a_twin_follows_the_weights(vision, packed) -> None:
    values = torch.randn(2, 3, 32, 32)
    before, _ = both(vision, values)
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.mul_(1.1)
    fast, plain = both(vision, values)
    assert not torch.allclose(fast, before, rtol=1e-3)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    vision.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in vision.state_dict().items()})
    fast, plain = both(vision, values)
    torch.testing.assert_close(fast, plain)


def test_a_twin_follows_weights_that_are_written_through_data(vision, packed) -> None:
    values = torch.randn(2, 3, 32, 32)
    both(vision, values)
    for tensor in vision.parameters():
        tensor.data.mul_(1.1)  # torch does not count it
    fast, plain = both(vision, values)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_follows_a_write_that_leaves_the_first_numbers_alone(packed, dtype) -> None:
    tower, values = whisper().to(dtype), torch.randn(3, 16, 40)
    before, _ = both(tower, values)
    for linear in (part for part in tower.modules() if isinstance(part, nn.Linear)):
        linear.weight.data[1:] *= -4
    fast, plain = both(tower, values)
    near = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(fast, plain, rtol=near, atol=near)
    assert (fast - before).abs().max() > 0.1


def test_ragged_calls_come_down_to_few_sizes(packed, monkeypatch) -> None:
    sizes = {in_few_sizes(rows) for rows in range(5000)}
    assert len(sizes) < 160 and all(rows <= in_few_sizes(rows) <= rows * 1.07 + 1 for rows in range(5000))
    assert [in_few_sizes(rows) for rows in (0, 1, 31, 32, 33, 64, 65, 2047, 2048)] == [
        0,
        1,
        31,
        32,
        34,
        64,
        68,
        2048,
        2048,
    ]
    seen = []
    product = PackedLinear._product
    monkeypatch.setattr(PackedLinear, "_product", lambda self, hidden: seen.append(hidden) or product(self, hidden))
    linear, hidden = nn.Linear(24, 5), torch.randn(3, 11, 24)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear, ragged=True)(hidden), linear(hidden), rtol=1e-5, atol=1e-6)
        PackedLinear(linear)(hidden)
    assert [rows.numel() // 24 for rows in seen] == [34, 33]


MADE = """
import torch
from contextlib import nullcontext
from modeling_sail.kernels_sail import PackedLinear, small_caches
with torch.no_grad(), {within}:
    linear = PackedLinear(torch.nn.Linear(8, 8))
    for _ in range(2):
        for rows in range(1, 101):
            linear(torch.zeros(rows, 8))
"""


@pytest.mark.parametrize(("within", "again"), [("small_caches()", True), ("nullcontext()", False)])
def test_in_small_caches_less_is_kept(packed, within, again) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    run = [sys.executable, "-c", MADE.format(within=within)]
    said = subprocess.run(run, env={**environment, "ONEDNN_VERBOSE": "2"}, capture_output=True, text=True, check=True)
    made = sum("create:cache_miss" in line for line in said.stdout.splitlines())
    assert made >= 200 if again else 100 <= made < 120  # one for each number of rows, and the weight's own


def test_small_caches_leave_the_environment_as_it_was(monkeypatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    with small_caches():
        assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "9")  # its other name
    with small_caches():
        assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ


def test_a_twin_follows_the_attention_that_is_chosen_and_weights_that_are_no_numbers(packed) -> None:
    tower = build_tower(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with torch.no_grad():
        assert for_inference(tower.eval()).config._attn_implementation != "eager"
        tower.set_attn_implementation("eager")
        twin = for_inference(tower)
        assert twin is not tower and twin.config._attn_implementation == "eager"
        next(tower.parameters()).fill_(float("nan"))
        assert for_inference(tower) is for_inference(tower)  # not made anew each time


def test_a_twin_changes_nothing_of_its_module(vision) -> None:
    before = copy.deepcopy(vision.state_dict())
    strides = {name: tensor.stride() for name, tensor in vision.state_dict().items()}
    both(vision, torch.randn(2, 3, 32, 32))
    after = vision.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].stride() == strides[name] for name in before)
    assert not vision.training and all(parameter.requires_grad for parameter in vision.parameters())


def test_training_gradients_and_other_types_have_no_twin(vision) -> None:
    values = torch.randn(2, 3, 32, 32)
    run_tower(vision, values, "last_hidden_state").sum().backward()
    assert all(parameter.grad is not None for parameter in vision.parameters())
    with torch.no_grad():
        assert for_inference(vision.train(), values[:1], "last_hidden_state") is vision
        for other in (torch.float16, torch.float64):
            vision.eval().to(other)
            assert for_inference(vision, values[:1], "last_hidden_state") is vision


def test_batch_norms_in_bfloat16_are_folded_in_float32(vision, packed) -> None:
    values = torch.randn(9, 3, 32, 32)
    exact, _ = both(vision, values)
    half = copy.deepcopy(vision).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    fast, plain = both(half, values)
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in twin_of(half).parameters()} == {torch.float32}
    assert (fast - exact).abs().mean() < (plain - exact).abs().mean(), "nearer to float32 than its own type"
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(1.25)
    assert not torch.allclose(both(half, values)[0], fast, rtol=1e-2), "the copy follows the weights"


def test_who_watches_a_layer_sees_it_run(vision) -> None:
    both(vision, torch.randn(1, 3, 32, 32))  # a twin is there already
    seen = []
    layer = next(part for part in vision.modules() if isinstance(part, nn.BatchNorm2d))
    handle = layer.register_forward_hook(lambda *_: seen.append(True))
    both(vision, torch.randn(1, 3, 32, 32))
    assert seen
    handle.remove()
    with torch.no_grad():
        assert for_inference(vision, torch.randn(1, 3, 32, 32), "last_hidden_state") is not vision


def test_a_fold_that_gives_other_numbers_is_dropped_with_a_warning() -> None:
    class Odd(nn.Module):
        """Its norm is named after a convolution, but runs before it."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            nn.init.uniform_(self.norm.running_mean, 1, 2)

        def forward(self, values: Tensor) -> SimpleNamespace | dict[str, Tensor]:
            return {"last_hidden_state": self.convolution(self.norm(values))}

    odd, values = Odd().eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="moves its output"):
        fast, plain = both(odd, values)
    assert torch.equal(fast, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        both(odd, values)


def test_a_twin_does_not_keep_its_module_alive(packed) -> None:
    tower = build_tower(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with torch.no_grad():
        assert for_inference(tower.eval()) is not tower
    watched = weakref.ref(tower)
    del tower
    gc.collect()
    assert watched() is None


def test_large_weights_are_not_kept_twice(packed, monkeypatch) -> None:
    monkeypatch.setattr(kernels_sail, "MAX_PACKED_BYTES", 100)
    tower = whisper()
    with torch.no_grad():
        assert for_inference(tower) is tower


def test_the_machine_decides_and_the_environment_may_say_otherwise(monkeypatch) -> None:
    monkeypatch.setattr(kernels_sail, "_onednn_works", lambda dtype: True)
    for amd, capability, pays in ((True, "AVX512", True), (True, "AVX2", False), (False, "AVX512", False)):
        monkeypatch.delenv("SAIL_ONEDNN", raising=False)
        monkeypatch.setattr(kernels_sail, "_amd", lambda amd=amd: amd)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert onednn_pays() is pays
        for value in "01":
            monkeypatch.setenv("SAIL_ONEDNN", value)
            assert onednn_pays() is (value == "1")
    monkeypatch.setattr(kernels_sail, "_onednn_works", lambda dtype: False)
    assert not onednn_pays()  # asked for, but this torch has none
