"""`sail build`: a preset becomes a folder in Hub format: towers, connectors, tokenizer, processor, code.

Room: before the model. Unusual: `mini` ships only what training changed; its towers come from pinned packages, and
every hash is checked before a file is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, WhisperFeatureExtractor

from ..configuration_sail import SailEmbeddingConfig, preset_config
from ..fingerprints import hash_tensors
from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from .towers import load_audio_tower, load_text_tower, load_vision_tower, pil_image_processor

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"

# Which pretrained towers a preset stands on: a pinned package of ours, a Hub id or a local folder (see towers.py).
TOWERS = {
    "mini": {"text": "all-minilm-l6-v2", "vision": "efficientnet-lite0", "audio": "whisper-base"},
    "small": {"text": "smollm2-135m", "vision": "efficientnet-lite0", "audio": "whisper-base"},
    "2b": {
        "text": "Qwen/Qwen2.5-1.5B",
        "vision": "openai/clip-vit-large-patch14",
        "audio": "laion/clap-htsat-unfused",
    },
}

# Unused tokens of the known vocabularies that can stand for a picture and a sound; others get two new tokens.
IMAGE_TOKENS = ("<|image_pad|>", "<image>", "[unused1]", "<gh_stars>")
AUDIO_TOKENS = ("<|audio_pad|>", "<audio>", "[unused2]", "<|video_pad|>", "<issue_start>")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    preset: str, out: str | Path, *, towers: dict[str, str] | None = None, seed: int = 0
) -> tuple[SailEmbeddingModel, SailEmbeddingProcessor]:
    """Put a preset together and save it.

    Args:
        preset: "tiny" (random, for tests), "mini" (trained), "small" and "2b" (pretrained towers, new connectors).
        out: folder to write.
        towers: other towers, ``{"text" | "vision" | "audio": Hub id, folder or pinned name}``.
        seed: of every new weight.

    Returns:
        The model in eval mode and its processor, as saved.

    Raises:
        ValueError: an unknown preset or tower, or trained weights for other towers. RuntimeError: a hash differs.
    """
    torch.manual_seed(seed)
    model, processor = build_tiny() if preset == "tiny" else assemble(preset, towers)
    trained = WEIGHTS / preset
    if trained.is_dir() and not towers:
        apply_trained(model, trained)
    elif preset not in ("tiny", "mini"):
        logger.warning("The connectors of %r are new: train them before you trust its embeddings.", preset)
    save(model, processor, out)
    return model, processor


def save(model: SailEmbeddingModel, processor: SailEmbeddingProcessor, out: str | Path) -> None:
    """Write the Hub folder: weights, configuration, processor, code, and the files of sentence-transformers."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)


# --- from pretrained towers -----------------------------------------------------------------------------------------


def assemble(preset: str, towers: dict[str, str] | None = None) -> tuple[SailEmbeddingModel, SailEmbeddingProcessor]:
    """Pretrained towers with new connectors, and the processor that fits them.

    Raises:
        ValueError: the preset is unknown, or a tower is given for another modality than text, vision, audio.
    """
    window = preset_config_window(preset)
    names = {**TOWERS.get(preset, {}), **(towers or {})}
    if set(names) != {"text", "vision", "audio"}:
        raise ValueError(f"A model needs towers for text, vision and audio; got {sorted(names)} for preset {preset!r}.")
    text, tokenizer = load_text_tower(names["text"])
    vision, image_processor = load_vision_tower(names["vision"])
    audio, extractor = load_audio_tower(names["audio"], window_seconds=window)
    for tower, one in (("text", text), ("vision", vision), ("audio", audio)):
        one.config._name_or_path = _said_name(names[tower])
    overrides = {"text_config": text.config, "vision_config": vision.config, "audio_config": audio.config}
    if preset == "2b" and not towers:
        overrides["matryoshka_dims"] = [128, 768, text.config.hidden_size]
    config = preset_config(preset, **overrides)
    processor = make_processor(config, tokenizer, image_processor, extractor)
    model = SailEmbeddingModel(config)
    _take_weights(model.text_tower, text)
    _take_weights(model.vision_tower, vision)
    _take_weights(model.audio_tower, audio)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.text_tower.resize_token_embeddings(len(tokenizer))
    return model.eval(), processor


def _said_name(name: str) -> str:
    """What a saved configuration says of a tower: its pinned name or Hub id; of a folder its name, not its path."""
    return Path(name).name if Path(name).is_dir() else name


def preset_config_window(preset: str) -> float:
    """Seconds of the audio window of a preset, known before its towers are."""
    from ..configuration_sail import PRESETS

    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; take one of {sorted(PRESETS)}.")
    return float(PRESETS[preset]["audio_window_seconds"])


def make_processor(
    config: SailEmbeddingConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    feature_extractor: Any,
    **options: Any,
) -> SailEmbeddingProcessor:
    """The processor of a configuration; writes the placeholders' token ids into the configuration."""
    image_token = _placeholder(tokenizer, IMAGE_TOKENS)
    audio_token = _placeholder(tokenizer, AUDIO_TOKENS)
    towers = {"vision": config.vision_config, "audio": config.audio_config}
    options.setdefault("max_tokens", min(512, getattr(config.text_config, "max_position_embeddings", 512)))
    processor = SailEmbeddingProcessor(
        image_processor,
        feature_extractor,
        tokenizer,
        modalities=[name for name, tower in towers.items() if tower is not None],
        num_latents=config.num_latents,
        latents_per_frame=config.latents_per_frame,
        image_token=image_token,
        audio_token=audio_token,
        audio_window_seconds=config.audio_window_seconds,
        max_frames=config.max_frames,
        **options,
    )
    config.image_token_id = processor.image_token_id
    config.audio_token_id = processor.audio_token_id
    return processor


def _placeholder(tokenizer: PreTrainedTokenizerBase, candidates: Sequence[str]) -> str:
    vocabulary = tokenizer.get_vocab()
    for token in candidates:
        if token in vocabulary:
            return token
    tokenizer.add_tokens([candidates[0]], special_tokens=True)
    return candidates[0]


def _take_weights(tower: PreTrainedModel, source: PreTrainedModel) -> None:
    """Copy a pretrained tower's weights; only a pooling head that the model left out may remain unused."""
    missing, unused = tower.load_state_dict(source.state_dict(), strict=False)
    left = [name for name in unused if not name.startswith("pooler.")]
    if missing or left:
        raise ValueError(f"{type(source).__name__} does not fit: missing {missing[:5]}, unused {left[:5]}.")


# --- what training changed ------------------------------------------------------------------------------------------


def apply_trained(model: SailEmbeddingModel, folder: Path) -> None:
    """Load the tensors that training changed onto an assembled model.

    Args:
        model: as `assemble` gives it; its towers are hashed and compared with those that were trained on.
        folder: ``manifest.json`` (hashes, recipe, seed) beside ``trained.safetensors``.

    Raises:
        RuntimeError: a file or a tower is not the one that the manifest names.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = hashlib.sha256((folder / "trained.safetensors").read_bytes()).hexdigest()
    _same_hash("trained.safetensors", found, manifest["sha256"])
    for name, expected in manifest["towers"].items():
        _same_hash(name, weights_hash(getattr(model, name)), expected)
    changed = load_file(folder / "trained.safetensors")
    state = model.state_dict()
    unknown = sorted(set(changed) - set(state))
    if unknown:
        raise RuntimeError(f"{folder} holds tensors that the model does not have: {unknown[:5]}.")
    with torch.no_grad():
        for name, tensor in changed.items():
            state[name].copy_(tensor)


def weights_hash(tower: PreTrainedModel) -> str:
    """sha256 over a tower's float32 tensors in the order of their names."""
    digest = hashlib.sha256()
    hash_tensors(digest, sorted(tower.state_dict().items()))
    return digest.hexdigest()


def _same_hash(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise RuntimeError(
            f"{name} has sha256 {found}, but {expected} was trained with. Delete the cached package and build again."
        )


# --- tiny: random, no download --------------------------------------------------------------------------------------


def build_tiny(**options: Any) -> tuple[SailEmbeddingModel, SailEmbeddingProcessor]:
    """A random model of under 2M parameters with all three modalities, and a byte-level tokenizer with a chat template.

    Args:
        options: fields of `SailEmbeddingConfig` that differ from the preset, for tests.
    """
    config = preset_config("tiny", **options)
    image_processor = pil_image_processor("ViTImageProcessor", size={"height": 32, "width": 32})
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    processor = make_processor(config, tiny_tokenizer(), image_processor, extractor, max_tokens=256, frames_per_video=4)
    return SailEmbeddingModel(config).eval(), processor


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML as chat template, 264 tokens in all: every text has its ids, nothing is unknown."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|audio_pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=specials[1:],
    )
    fast.chat_template = CHATML
    return fast


def load_built(folder: str | Path) -> tuple[SailEmbeddingModel, SailEmbeddingProcessor]:
    """Load a folder that `build` or ``save_pretrained`` wrote, with the installed code."""
    model = SailEmbeddingModel.from_pretrained(folder).eval()
    return model, SailEmbeddingProcessor.from_pretrained(folder)
