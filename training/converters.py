"""Foreign checkpoints to standard transformers modules: CTranslate2 to Whisper's encoder, lite0 to EfficientNet.

Room: training; used by towers. Pure functions of bytes and state dicts. Unusual: EfficientNet's squeeze-excite gates,
which lite0 does not have, are held at exactly 1 by their bias, so that no class of our own is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# sigmoid(100) is exactly 1 in every float type, and so flat there that training cannot move it.
OPEN_GATE = 100.0

# CTranslate2's DataType; bfloat16 (5) has no numpy type and none of our packages has it.
CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

# --- CTranslate2 ----------------------------------------------------------------------------------------------------


class _Reader:
    """Little-endian fields one after another; says where a file ends too early."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.offset = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        end = self.offset + size
        if end > len(self.data):
            raise ValueError(
                f"CTranslate2 file ends at byte {len(self.data)}, {end - len(self.data)} too early: cut off?"
            )
        part, self.offset = self.data[self.offset : end], end
        return part

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        """Length with the final zero, then the characters."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()


def parse_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 ``model.bin``, versions 4 to 6 (ctranslate2/specs/model_spec.py, ``_serialize``).

    Layout: version, spec name, revision, count, then per variable: name, rank, dims, dtype, bytes; then aliases.

    Args:
        data: the whole file.

    Returns:
        Read-only arrays, views of ``data``; an alias is the same array under a second name.

    Raises:
        ValueError: another version, an unknown dtype, or a file that is cut off.
    """
    reader = _Reader(data)
    version = reader.number("I")
    if not 4 <= version <= 6:
        raise ValueError(f"CTranslate2 format version {version}; 4 to 6 can be read. Is this a CTranslate2 model.bin?")
    reader.string()  # name of the spec
    reader.number("I")  # its revision
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        variables[name] = _read_array(reader, name)
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        variables[alias] = variables[name]
    return variables


def _read_array(reader: _Reader, name: str) -> np.ndarray:
    shape = [reader.number("I") for _ in range(reader.number("B"))]
    code, size = reader.number("B"), reader.number("I")
    if code not in CT2_DTYPES:
        raise ValueError(f"{name} has CTranslate2 dtype {code}; {sorted(CT2_DTYPES)} can be read.")
    return np.frombuffer(reader.take(size), dtype=CT2_DTYPES[code]).reshape(shape)


# --- Whisper --------------------------------------------------------------------------------------------------------


def whisper_encoder_from_ctranslate2(variables: Mapping[str, np.ndarray]) -> WhisperEncoder:
    """The encoder of a Whisper model in CTranslate2's names, as transformers' `WhisperEncoder`, float32.

    Raises:
        ValueError: weights are quantised to integers, or tensors are missing.
    """
    try:
        state = whisper_encoder_state(variables)
        width, num_mels = variables["encoder/conv1/weight"].shape[:2]
        hidden = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
        heads = int(variables["encoder/num_heads"])
        vocabulary = variables["decoder/embeddings/weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"The CTranslate2 model lacks {error}; is it a Whisper model?") from error
    num_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=num_mels,
        d_model=width,
        encoder_layers=num_layers,
        decoder_layers=num_layers,  # no decoder is built; the configuration should still be Whisper's own
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        max_source_positions=len(state["embed_positions.weight"]),
    )
    encoder = WhisperEncoder._from_config(config)
    encoder.load_state_dict(state)
    return encoder.eval()


def whisper_encoder_state(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Names and shapes of transformers for the encoder; CTranslate2 keeps q, k and v in one matrix.

    Raises:
        KeyError: a tensor is missing. ValueError: it is quantised.
    """
    state = {
        "embed_positions.weight": _float(variables, "encoder/position_encodings/encodings"),
        **_pair(variables, "encoder/conv1", "conv1"),
        **_pair(variables, "encoder/conv2", "conv2"),
        **_norm(variables, "encoder/layer_norm", "layer_norm"),
    }
    num_layers = sum(name.startswith("encoder/layer_") and name.endswith("/ffn/linear_0/weight") for name in variables)
    for index in range(num_layers):
        source, target = f"encoder/layer_{index}", f"layers.{index}"
        weight = _float(variables, f"{source}/self_attention/linear_0/weight")  # (3 D, D)
        bias = _float(variables, f"{source}/self_attention/linear_0/bias")  # (3 D,), zero for the keys
        for name, part, shift in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            state[f"{target}.self_attn.{name}_proj.weight"] = part.contiguous()
            if name != "k":  # Whisper's keys have no bias: it would shift all scores of a query alike
                state[f"{target}.self_attn.{name}_proj.bias"] = shift.contiguous()
        state |= _pair(variables, f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
        state |= _norm(variables, f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
        state |= _pair(variables, f"{source}/ffn/linear_0", f"{target}.fc1")
        state |= _pair(variables, f"{source}/ffn/linear_1", f"{target}.fc2")
        state |= _norm(variables, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    return state


def _float(variables: Mapping[str, np.ndarray], name: str) -> Tensor:
    array = variables[name]
    if array.dtype.kind != "f":
        raise ValueError(
            f"{name} is {array.dtype}: quantised CTranslate2 models are not supported, take a float16 one."
        )
    return torch.from_numpy(array.astype(np.float32))


def _pair(variables: Mapping[str, np.ndarray], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.{part}": _float(variables, f"{source}/{part}") for part in ("weight", "bias")}


def _norm(variables: Mapping[str, np.ndarray], source: str, target: str) -> dict[str, Tensor]:
    names = {"weight": "gamma", "bias": "beta"}
    return {f"{target}.{ours}": _float(variables, f"{source}/{theirs}") for ours, theirs in names.items()}


# --- EfficientNet-lite0 ---------------------------------------------------------------------------------------------


def lite0_config() -> EfficientNetConfig:
    """EfficientNet-lite0: B0 with relu6 and no squeeze-excite; here the gates are as narrow as can be, and open."""
    return EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        squeeze_expansion_ratio=0.01,
        dropout_rate=0.2,
    )


def lite0_from_checkpoint(
    checkpoint: Mapping[str, Tensor], config: EfficientNetConfig | None = None
) -> EfficientNetModel:
    """The trunk of an EfficientNet-lite checkpoint in the names of efficientnet_lite_pytorch, as `EfficientNetModel`.

    Args:
        checkpoint: its state dict; the classifier (``_fc``) is left out.
        config: `lite0_config` by default.

    Returns:
        Eval mode, float32; ``last_hidden_state`` is (B, 1280, 7, 7) for (B, 3, 224, 224).

    Raises:
        ValueError: the checkpoint has other tensors than the configuration asks for.
    """
    model = EfficientNetModel(config or lite0_config())
    state = {_lite0_name(name): tensor for name, tensor in checkpoint.items() if not name.startswith("_fc.")}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(tensor, OPEN_GATE if name.endswith("expand.bias") else 0.0)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"This is not an EfficientNet-lite checkpoint of this size: {error}") from error
    return model.eval()


def _lite0_name(name: str) -> str:
    """``_blocks.3._bn1.weight`` -> ``encoder.blocks.3.depthwise_conv.depthwise_norm.weight``."""
    top = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    block = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    parts = name.split(".")
    if parts[0] == "_blocks":
        return ".".join(["encoder.blocks", parts[1], block.get(parts[2], parts[2]), *parts[3:]])
    return ".".join([top.get(parts[0], parts[0]), *parts[1:]])
