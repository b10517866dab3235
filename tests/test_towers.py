"""Conversions keep every number: CTranslate2 and lite0 checkpoints against forwards written out here."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modeling_sail.training import towers
from modeling_sail.training.converters import (
    lite0_config,
    lite0_from_checkpoint,
    parse_ctranslate2,
    whisper_encoder_from_ctranslate2,
)
from modeling_sail.training.towers import lite0_image_processor, load_audio_tower, load_text_tower, load_vision_tower
from PIL import Image
from torch import Tensor
from transformers import EfficientNetConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.trainer_utils import validate_quantization_for_training

# --- CTranslate2 ----------------------------------------------------------------------------------------------------

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def ct2_string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def ct2_file(arrays: dict[str, np.ndarray], aliases: dict[str, str] | None = None, version: int = 6) -> bytes:
    """A model.bin as CTranslate2 writes it."""
    parts = [struct.pack("<I", version), ct2_string("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        parts += [ct2_string(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", CODES[array.dtype.name], array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", len(aliases or {})))
    parts += [ct2_string(name) for pair in (aliases or {}).items() for name in pair]
    return b"".join(parts)


def test_a_file_gives_back_its_arrays_and_aliases() -> None:
    arrays = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a/scalar": np.array(7, dtype=np.int8),
        "b": np.array([1.5, -2.0], dtype=np.float32),
    }
    parsed = parse_ctranslate2(ct2_file(arrays, {"tied": "b"}))
    assert set(parsed) == {*arrays, "tied"}
    for name, array in arrays.items():
        assert parsed[name].dtype == array.dtype and np.array_equal(parsed[name], array)
    assert np.array_equal(parsed["tied"], arrays["b"])


@pytest.mark.parametrize("missing", [1, 5, 20])
def test_a_cut_file_is_refused(missing: int) -> None:
    with pytest.raises(ValueError, match="cut off"):
        parse_ctranslate2(ct2_file({"a": np.zeros(4, np.float32)})[:-missing])


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="version 3"):
        parse_ctranslate2(ct2_file({}, version=3))


def whisper_config() -> WhisperConfig:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    return WhisperConfig(vocab_size=60000, max_source_positions=150, **sizes, **widths)


def as_ctranslate2(encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    """A Whisper encoder in CTranslate2's names, as its converter (WhisperLoader) writes it."""
    state = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    pairs = {"encoder/conv1": "conv1", "encoder/conv2": "conv2"}
    norms = {"encoder/layer_norm": "layer_norm"}
    arrays = {
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "encoder/num_heads": np.array(2, dtype=np.int16),
        "decoder/embeddings/weight": np.zeros((60000, 1), dtype=np.float16),
        "decoder/layer_0/ffn/linear_0/weight": np.zeros((1, 1), dtype=np.float32),
    }
    for index in range(encoder.config.encoder_layers):
        source, target = f"layers.{index}", f"encoder/layer_{index}"
        query, key, value = (f"{source}.self_attn.{letter}_proj" for letter in "qkv")
        weights = [state[f"{name}.weight"] for name in (query, key, value)]
        biases = [state[f"{query}.bias"], np.zeros(16, np.float32), state[f"{value}.bias"]]
        arrays[f"{target}/self_attention/linear_0/weight"] = np.concatenate(weights)
        arrays[f"{target}/self_attention/linear_0/bias"] = np.concatenate(biases)
        pairs[f"{target}/self_attention/linear_1"] = f"{source}.self_attn.out_proj"
        pairs[f"{target}/ffn/linear_0"], pairs[f"{target}/ffn/linear_1"] = f"{source}.fc1", f"{source}.fc2"
        norms[f"{target}/self_attention/layer_norm"] = f"{source}.self_attn_layer_norm"
        norms[f"{target}/ffn/layer_norm"] = f"{source}.final_layer_norm"
    for ours, theirs in pairs.items():
        arrays |= {f"{ours}/{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}
    for ours, theirs in norms.items():
        arrays |= {f"{ours}/gamma": state[f"{theirs}.weight"], f"{ours}/beta": state[f"{theirs}.bias"]}
    return arrays


def random_whisper() -> WhisperEncoder:
    torch.manual_seed(0)
    encoder = WhisperEncoder._from_config(whisper_config()).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3)  # biases and norms too, or a wrong one would not show
    return encoder


def test_a_whisper_encoder_survives_ctranslate2() -> None:
    encoder = random_whisper()
    converted = whisper_encoder_from_ctranslate2(parse_ctranslate2(ct2_file(as_ctranslate2(encoder))))
    mel = torch.randn(2, 8, 300)
    assert not converted.training and converted.config.encoder_ffn_dim == 24
    torch.testing.assert_close(converted(mel).last_hidden_state, encoder(mel).last_hidden_state, rtol=0, atol=0)


def test_quantised_and_foreign_models_are_refused() -> None:
    arrays = as_ctranslate2(random_whisper())
    arrays["encoder/layer_1/ffn/linear_0/weight"] = np.zeros((24, 16), np.int8)
    with pytest.raises(ValueError, match="float16"):
        whisper_encoder_from_ctranslate2(arrays)
    with pytest.raises(ValueError, match="Whisper"):
        whisper_encoder_from_ctranslate2({"encoder/layer_norm/gamma": np.zeros(1, np.float32)})


# --- the audio window -----------------------------------------------------------------------------------------------


@pytest.fixture
def whisper_folder(tmp_path: Path) -> Path:
    random_whisper().save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=8, chunk_length=3).save_pretrained(tmp_path)
    return tmp_path


def test_extractor_and_encoder_agree_on_the_window(whisper_folder: Path) -> None:
    full, _ = load_audio_tower(str(whisper_folder))
    encoder, extractor = load_audio_tower(str(whisper_folder), window_seconds=2.0)
    mel = extractor(np.zeros(16000, np.float32), sampling_rate=16000, return_tensors="pt").input_features
    assert mel.shape == (1, 8, 200) and encoder(mel).last_hidden_state.shape == (1, 100, 16)
    torch.testing.assert_close(encoder.embed_positions.weight, full.embed_positions.weight[:100])


def test_a_shortened_tower_is_saved_and_loaded_as_it_is(whisper_folder: Path, tmp_path: Path) -> None:
    encoder, extractor = load_audio_tower(str(whisper_folder), window_seconds=1)
    encoder.save_pretrained(tmp_path / "short")
    extractor.save_pretrained(tmp_path / "short")
    again, extractor_again = load_audio_tower(str(tmp_path / "short"))
    mel = torch.randn(1, 8, 100)
    torch.testing.assert_close(again(mel).last_hidden_state, encoder(mel).last_hidden_state, rtol=0, atol=0)
    assert extractor_again.n_samples == extractor.n_samples == 16000


@pytest.mark.parametrize("seconds", [0, 2.5, 4, -1])
def test_a_window_that_whisper_cannot_have_is_refused(whisper_folder: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="whole seconds from 1 to 3"):
        load_audio_tower(str(whisper_folder), window_seconds=seconds)


# --- EfficientNet-lite0 ---------------------------------------------------------------------------------------------

# (repeats, kernel, stride, expansion, output channels): efficientnet_lite_pytorch/utils.py, `efficientnet_lite`.
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def same_padded(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """TensorFlow's SAME convolution: what padding cannot be halved goes right and below."""
    size, kernel = x.shape[-1], weight.shape[-1]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    return F.conv2d(F.pad(x, [before, after, before, after]), weight, stride=stride, groups=groups)


def normed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    moments = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
    return F.batch_norm(x, *moments, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-3)


def reference_lite(x: Tensor, state: dict[str, Tensor], stages: list[tuple[int, ...]]) -> Tensor:
    """EfficientNet-lite without its classifier, straight from the checkpoint."""
    x = F.relu6(normed(same_padded(x, state["_conv_stem.weight"], 2), state, "_bn0"))
    index = 0
    for repeats, _, first_stride, expansion, _ in stages:
        for repeat in range(repeats):
            block, stride, inputs = f"_blocks.{index}", first_stride if repeat == 0 else 1, x
            if expansion != 1:
                x = F.relu6(normed(F.conv2d(x, state[f"{block}._expand_conv.weight"]), state, f"{block}._bn0"))
            depthwise = state[f"{block}._depthwise_conv.weight"]
            x = F.relu6(normed(same_padded(x, depthwise, stride, len(depthwise)), state, f"{block}._bn1"))
            x = normed(F.conv2d(x, state[f"{block}._project_conv.weight"]), state, f"{block}._bn2")
            x = x + inputs if stride == 1 and x.shape == inputs.shape else x
            index += 1
    return F.relu6(normed(F.conv2d(x, state["_conv_head.weight"]), state, "_bn1"))


def random_checkpoint(stages: list[tuple[int, ...]], stem: int, head: int) -> dict[str, Tensor]:
    """A checkpoint in the names of efficientnet_lite_pytorch, with batch norms that do something."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) * 0.3
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.randn(width) * 0.1, torch.rand(width) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem", stem, 3, 3, 3)
    norm("_bn0", stem)
    width, index = stem, 0
    for repeats, kernel, _, expansion, out in stages:
        for _ in range(repeats):
            block, inner = f"_blocks.{index}", width * expansion
            if expansion != 1:
                conv(f"{block}._expand_conv", inner, width, 1, 1)
                norm(f"{block}._bn0", inner)
            conv(f"{block}._depthwise_conv", inner, 1, kernel, kernel)
            norm(f"{block}._bn1", inner)
            conv(f"{block}._project_conv", out, inner, 1, 1)
            norm(f"{block}._bn2", out)
            width, index = out, index + 1
    conv("_conv_head", head, width, 1, 1)
    norm("_bn1", head)
    return state | {"_fc.weight": torch.zeros(1000, head), "_fc.bias": torch.zeros(1000)}


def narrow_config() -> EfficientNetConfig:
    """lite0's config at half its width. At a quarter, stem and first stage would be equally wide, and only
    efficientnet_lite_pytorch would then add a residual between them; at lite0's own width neither does.
    """
    config = lite0_config()
    config.width_coefficient, config.hidden_dim = 0.5, 640
    return config


NARROW = [(*stage[:4], width) for stage, width in zip(STAGES, (8, 16, 24, 40, 56, 96, 160), strict=True)]


def test_lite0_computes_what_its_checkpoint_means() -> None:
    state = random_checkpoint(NARROW, stem=16, head=640)
    model, x = lite0_from_checkpoint(state, narrow_config()), torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        ours, expected = model(x).last_hidden_state, reference_lite(x, state, NARROW)
    assert ours.shape == (2, 640, 3, 3) and expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_open_gates_get_no_gradient() -> None:
    model = lite0_from_checkpoint(random_checkpoint(NARROW, stem=16, head=640), narrow_config())
    model(torch.randn(1, 3, 64, 64)).last_hidden_state.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["embeddings.convolution.weight"].abs().max() > 0
    gates = [gradient for name, gradient in gradients.items() if ".squeeze_excite." in name]
    assert gates and all(gradient.abs().max() == 0 for gradient in gates)


def test_a_checkpoint_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="not an EfficientNet-lite checkpoint"):
        lite0_from_checkpoint(random_checkpoint(NARROW, stem=16, head=640))


def test_pictures_reach_lite0_as_it_was_trained() -> None:
    image = Image.new("RGB", (300, 200), (127, 255, 0))
    pixels = lite0_image_processor()(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([0.0, 1.0, -127 / 128]), rtol=0, atol=1e-6)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_text_tower, load_vision_tower, load_audio_tower])
def test_a_pinned_tower_of_another_kind_is_refused(load) -> None:
    other = "whisper-base" if load is not load_audio_tower else "efficientnet-lite0"
    with pytest.raises(ValueError, match="pinned"):
        load(other)


def test_smollm2_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        load_text_tower("smollm2-135m")


def test_every_pinned_tower_has_a_licence() -> None:
    assert set(towers.tower_licences()) == set(towers.PINNED) and all(towers.tower_licences().values())


# --- real weights ---------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_the_real_lite0_equals_the_reference_and_knows_a_zebra() -> None:
    from modeling_sail.training.data import load_tuxpaint

    model, processor = load_vision_tower("efficientnet-lite0")
    path = next(row["image"] for row in load_tuxpaint() if row["names"]["en"] == "A zebra.")
    picture = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    pixels = processor(canvas.convert("RGB"), return_tensors="pt").pixel_values
    x = torch.cat([pixels, torch.randn(1, 3, 224, 224)])
    with torch.inference_mode():
        features = model(x).last_hidden_state
        expected = reference_lite(x, towers.lite0_checkpoint(), STAGES)
    assert features.shape == (2, 1280, 7, 7)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-3)
    weight, bias = towers.load_lite0_classifier()
    best = int((weight @ features[0].mean((1, 2)) + bias).argmax())
    assert towers.imagenet_class_names()[best] == "zebra"


@pytest.mark.network
@pytest.mark.parametrize(("name", "width", "layers"), [("whisper-base", 512, 6), ("whisper-tiny.en", 384, 4)])
def test_the_real_whispers_load(name: str, width: int, layers: int) -> None:
    encoder, extractor = load_audio_tower(name, window_seconds=5)
    sound = np.random.default_rng(0).standard_normal((2, 48000)).astype(np.float32)
    mel = extractor(list(sound), sampling_rate=16000, return_tensors="pt").input_features
    with torch.inference_mode():
        hidden = encoder(mel).last_hidden_state
    assert hidden.shape == (2, 250, width) and encoder.config.encoder_layers == layers and hidden.isfinite().all()
    assert encoder.config.decoder_start_token_id is not None


@pytest.mark.network
def test_the_real_minilm_finds_the_paraphrase() -> None:
    model, tokenizer = load_text_tower("all-minilm-l6-v2")
    batch = tokenizer(
        ["a man is eating food", "someone has a meal", "the sky is blue"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)  # (3, 384)
    assert pooled[0] @ pooled[1] > 0.4 > pooled[0] @ pooled[2]


@pytest.mark.network
def test_smollm2_can_be_trained_in_full() -> None:
    """It is read from a quantised file; transformers trains nothing that its configuration calls quantised."""
    model, _ = load_text_tower("smollm2-135m")
    validate_quantization_for_training(model)
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
