"""The architecture of one SAIL-Embedding model as data: three nested towers, the connectors, the output, the presets.

Room: Item -> Processor -> Batch -> **Model**. Goes to the Hub. Everything that can be wrong in a configuration is
refused here, before a weight exists. The prompts are not here: they belong to the processor.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, ClapAudioConfig, PretrainedConfig

# Segments of a sequence: what each token stands for. 0 is padding, so that a zero-filled row is empty.
PAD, PROMPT, AUDIO, VISION, TEXT = range(5)
MODALITIES = ("audio", "vision", "text")
SEGMENT_OF = {"audio": AUDIO, "vision": VISION, "text": TEXT}

# Older versions of transformers do not know CLAP's audio side by its name.
EXTRA_CONFIGS = {"clap_audio_model": ClapAudioConfig}

AUDIO_POOLINGS = ("mean", "attention", "pooler")
FUSIONS = ("joint", "separate")


class SailEmbeddingConfig(PretrainedConfig):
    """Configuration of `SailEmbeddingModel` (SAIL-Embedding, section 3.2 and 4.1).

    Args:
        text_config: the fusion backbone, any transformers decoder or encoder; needed.
        vision_config: the vision tower, ViT or CNN; None leaves the modality out.
        audio_config: the audio tower (ClapAudio or Whisper); None leaves the modality out.
        num_latents: visual tokens of an item after the Visual Perceiver (16 in the paper).
        latent_size: width of the perceiver (1024 in the paper).
        perceiver_depth: its Transformer blocks (6 in the paper).
        perceiver_heads: attention heads of a block; divides ``latent_size``.
        max_frames: pictures and frames of one item that have a position; more are an error.
        latents_per_frame: True gives every frame its own ``num_latents`` tokens (the paper leaves this open).
        shortcut_size: hidden width of the shortcut from the mean visual token to the backbone, beside the perceiver; 0
            leaves it out, as the paper does. It learns from few samples what the perceiver then refines. Above 0 the
            audio adapter gets a token decoder too.
        shortcut_memory: concepts that the shortcut remembers, for example the classes of the tower's classifier; above
            0 where ``shortcut_size`` is.
        audio_pooling: how the tower's output becomes one vector a window: "mean", "attention" (a learned query),
            or "pooler" (the tower's own ``pooler_output``, as CLAP has it).
        audio_window_seconds: the tower's window; the processor repeats or cuts sound to it.
        matryoshka_dims: rising prefix lengths of the embedding that are trained to stand alone; the last is the whole.
        pool_prompt: False keeps the tokens of the prompt out of the mean.
        pool_tanh: False leaves the tanh before the mean out.
        late_fusion: True builds the gate of section 3.2 between the visual and the fused embedding.
        fusion: "joint" reads all modalities in one sequence (section 3.2); "separate" is a dual tower, as CLIP is: the
            backbone reads text alone, and the embedding is the mean of the modalities' normalised embeddings.
        causal: True lets a decoder see only what came before, as it was pretrained; the paper's fusion sees both ways.
            Encoders ignore it.
        image_token_id: placeholder of a visual token, in the backbone's vocabulary.
        audio_token_id: placeholder of the audio token, in the backbone's vocabulary.
        temperatures: initial temperature of each training dataset (section 3.3.2); learnable, held in the model.
        initializer_range: standard deviation of new linear layers and embeddings.

    Raises:
        ValueError: a value is out of its range; the message names it, what it was and what is needed.
    """

    model_type = "sail_embedding"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "audio_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        num_latents: int = 16,
        latent_size: int = 1024,
        perceiver_depth: int = 6,
        perceiver_heads: int = 16,
        max_frames: int = 64,
        latents_per_frame: bool = False,
        shortcut_size: int = 0,
        shortcut_memory: int = 0,
        audio_pooling: str = "mean",
        audio_window_seconds: float = 10.0,
        matryoshka_dims: list[int] | None = None,
        pool_prompt: bool = True,
        pool_tanh: bool = True,
        late_fusion: bool = True,
        fusion: str = "joint",
        causal: bool = False,
        image_token_id: int | None = None,
        audio_token_id: int | None = None,
        temperatures: dict[str, float] | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        # A config without arguments must exist: transformers compares a config with its defaults when it prints one.
        self.text_config = _sub_config(text_config or {"model_type": "qwen2"}, "text_config")
        self.vision_config = _sub_config(vision_config, "vision_config")
        self.audio_config = _sub_config(audio_config, "audio_config")
        self.num_latents = num_latents
        self.latent_size = latent_size
        self.perceiver_depth = perceiver_depth
        self.perceiver_heads = perceiver_heads
        self.max_frames = max_frames
        self.latents_per_frame = latents_per_frame
        self.shortcut_size = shortcut_size
        self.shortcut_memory = shortcut_memory
        self.audio_pooling = audio_pooling
        self.audio_window_seconds = audio_window_seconds
        self.matryoshka_dims = matryoshka_dims or [self.text_config.hidden_size]
        self.pool_prompt = pool_prompt
        self.pool_tanh = pool_tanh
        self.late_fusion = late_fusion
        self.fusion = fusion
        self.causal = causal
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        self.temperatures = temperatures or {"default": 0.05}
        self.initializer_range = initializer_range
        # The one switch that makes a decoder see both ways; encoders ignore it.
        self.text_config.is_causal = causal
        self.text_config.use_cache = False  # an embedding has no next token to remember keys for
        self._check()
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the fusion backbone, which is the length of the embedding."""
        return self.text_config.hidden_size

    def _check(self) -> None:
        for name in ("num_latents", "latent_size", "perceiver_depth", "perceiver_heads", "max_frames"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require(
            self.latent_size % self.perceiver_heads == 0,
            "perceiver_heads",
            self.perceiver_heads,
            f"a divisor of latent_size={self.latent_size}",
        )
        _require(self.shortcut_size >= 0, "shortcut_size", self.shortcut_size, "an integer >= 0")
        memory = "an integer >= 1 where shortcut_size is above 0, else 0"
        holds = self.shortcut_memory >= 0 and (self.shortcut_memory > 0) == (self.shortcut_size > 0)
        _require(holds, "shortcut_memory", self.shortcut_memory, memory)
        _require(self.audio_pooling in AUDIO_POOLINGS, "audio_pooling", self.audio_pooling, f"one of {AUDIO_POOLINGS}")
        _require(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {FUSIONS}")
        _require(self.audio_window_seconds > 0, "audio_window_seconds", self.audio_window_seconds, "seconds > 0")
        for name, value in self.temperatures.items():
            _require(value > 0, f"temperatures[{name!r}]", value, "a number > 0")
        dims, hidden = self.matryoshka_dims, self.hidden_size
        _require(
            dims == sorted(set(dims)) and 1 <= dims[0] and dims[-1] == hidden,
            "matryoshka_dims",
            dims,
            f"rising prefix lengths that end with the backbone's hidden size {hidden}",
        )


def _sub_config(value: PretrainedConfig | dict[str, Any] | None, name: str) -> Any:
    if value is None or isinstance(value, PretrainedConfig):
        return value
    fields = dict(value)
    if "model_type" not in fields:
        raise ValueError(
            f"{name} has no 'model_type'; name a model type of transformers, for example 'qwen2' or 'vit'."
        )
    model_type = fields.pop("model_type")
    if model_type in EXTRA_CONFIGS:
        return EXTRA_CONFIGS[model_type](**fields)
    return AutoConfig.for_model(model_type, **fields)


def _require(holds: bool, name: str, value: object, needed: str) -> None:
    if not holds:
        raise ValueError(f"SailEmbeddingConfig: {name}={value!r} cannot be; it must be {needed}.")


SailEmbeddingConfig.register_for_auto_class()


# --- presets: what is fixed before any weight, and the towers' sizes where a preset is random or checked on meta ---

_TINY: dict[str, Any] = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "model_type": "vit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "audio_config": {
        "model_type": "whisper",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        # WhisperConfig describes a decoder too; none is built.
        "decoder_layers": 1,
        "vocab_size": 320,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "num_latents": 4,
    "latent_size": 32,
    "perceiver_depth": 2,
    "perceiver_heads": 2,
    "max_frames": 16,
    "audio_pooling": "attention",
    "audio_window_seconds": 1.0,
    "matryoshka_dims": [16, 32, 64],
}

_MINI: dict[str, Any] = {
    "latent_size": 128,
    "perceiver_heads": 4,
    "shortcut_size": 640,
    "shortcut_memory": 1000,  # the classes of ImageNet, which the vision tower's classifier knows
    "audio_pooling": "attention",
    "audio_window_seconds": 5.0,
    "matryoshka_dims": [128, 256, 384],
}

_SMALL: dict[str, Any] = {
    "latent_size": 384,
    "perceiver_heads": 6,
    "audio_pooling": "attention",
    "audio_window_seconds": 5.0,
    "matryoshka_dims": [128, 384, 576],
}

_2B: dict[str, Any] = {
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "audio_config": {"model_type": "clap_audio_model"},
    "audio_pooling": "pooler",
    "audio_window_seconds": 10.0,
    "matryoshka_dims": [128, 768, 1536],
}

PRESETS: dict[str, dict[str, Any]] = {"tiny": _TINY, "mini": _MINI, "small": _SMALL, "2b": _2B}


def preset_config(name: str, **towers: PretrainedConfig) -> SailEmbeddingConfig:
    """The configuration of a preset.

    Args:
        name: "tiny", "mini", "small" or "2b".
        towers: ``text_config``, ``vision_config``, ``audio_config`` of the loaded towers; "mini" and "small" take
            their towers' sizes from the towers themselves, so they need all three.

    Returns:
        A checked configuration. The placeholders' token ids are still None: the tokenizer decides them.

    Raises:
        ValueError: the preset is unknown, or its towers are not given.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; take one of {sorted(PRESETS)}.")
    fields = {**PRESETS[name], **towers}
    if "text_config" not in fields:
        raise ValueError(f"Preset {name!r} takes its sizes from pretrained towers; build it with `sail build`.")
    return SailEmbeddingConfig(**fields)
