"""SailEmbeddingModel: towers -> tokens -> fusion -> one embedding an item (SAIL-Embedding, section 3.2).

Top to bottom: the output, the parts, the model. Unusual: pictures and sounds of a batch's items are flat lists with
an owner each, so an item has any number of them and a missing modality costs nothing; single-modality embeddings re-use
the towers' tokens of the same pass, in sequences of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, ClapAudioModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_sail import AUDIO, MODALITIES, PAD, PROMPT, SEGMENT_OF, TEXT, VISION, SailEmbeddingConfig
from .kernels_sail import for_inference, run_tower
from .packing_sail import run_backbone
from .perceiver_sail import TokenDecoder, VisualPerceiver

# Two towers that AutoModel cannot build alone: Whisper maps to the whole model, CLAP's audio side to nothing.
TOWER_CLASSES: dict[str, Any] = {"whisper": WhisperEncoder, "clap_audio_model": ClapAudioModel}


@dataclass
class SailOutput(ModelOutput):
    """What the model returns. B items, L tokens, D the backbone's width.

    Attributes:
        embeddings: (B, D), MeanPool(tanh(F(T))), not normalised: cut to a Matryoshka length first, then normalise.
            With ``fusion="separate"`` the mean of the modalities' normalised embeddings.
        modality_mask: (B, 3) booleans, whether the item has audio, vision, text (the order of ``MODALITIES``).
        last_hidden_state: (B, L, D), the backbone's output before tanh and mean; with ``fusion="separate"`` of prompt
            and text alone, as long as the longest of them.
        vision_embeddings, text_embeddings, audio_embeddings: (B, D), encoded without the other modalities; zeros where
            ``modality_mask`` is False. Only with ``output_modality_embeddings=True``.
        late_fusion_embeddings: (B, D), the gated sum with the visual embedding. Only with ``output_late_fusion=True``.
        hidden_states, attentions: of the backbone's fused pass, on request.
    """

    embeddings: Tensor | None = None
    modality_mask: Tensor | None = None
    last_hidden_state: Tensor | None = None
    vision_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    audio_embeddings: Tensor | None = None
    late_fusion_embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# --- parts ----------------------------------------------------------------------------------------------------------


class AudioAdapter(nn.Module):
    """Windows of sound to one token an item: pool each window, mean of the item's windows, project (section 3.2)."""

    def __init__(self, config: SailEmbeddingConfig, input_size: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads if input_size % num_heads == 0 else 1
        self.score = nn.Linear(input_size, self.num_heads) if config.audio_pooling == "attention" else None
        self.norm = nn.LayerNorm(input_size)
        self.up = nn.Linear(input_size, 2 * config.hidden_size)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size)
        decodes = config.shortcut_size > 0 and config.fusion == "joint"
        self.decoder = TokenDecoder(config.hidden_size) if decodes else None

    def forward(self, features: Tensor, group: Tensor) -> Tensor:
        """(M, T, A) features of M windows and (M,) rising item indices below G -> (G, D) tokens."""
        return self.token(self._group_mean(features, group))

    def project(self, features: Tensor, group: Tensor) -> Tensor:
        """As `forward`, but without the decoder: (G, D)."""
        return self._projected(self._group_mean(features, group))

    def token(self, mean: Tensor) -> Tensor:
        """(G, A), the mean of each item's pooled windows -> (G, D) tokens."""
        projected = self._projected(mean)
        return projected if self.decoder is None else self.decoder(nn.functional.normalize(projected, dim=-1))

    def _projected(self, mean: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(mean))))

    def _group_mean(self, features: Tensor, group: Tensor) -> Tensor:
        pooled = self.pool(features)  # (M, A)
        windows = torch.bincount(group)  # (G,)
        total = pooled.new_zeros(len(windows), pooled.shape[1]).index_add(0, group, pooled)
        return total / windows[:, None].to(total.dtype)  # (G, A)

    def pool(self, features: Tensor) -> Tensor:
        """(M, T, A) features of M windows -> (M, A)."""
        if self.score is None:
            return features.mean(dim=1)
        weights = self.score(features).float().softmax(dim=1).to(features.dtype)  # (M, T, heads)
        heads = features.unflatten(-1, (self.num_heads, -1))  # (M, T, heads, A / heads)
        return (weights[..., None] * heads).sum(dim=1).flatten(1)


class Temperatures(nn.Module):
    """One learnable temperature for each training dataset (section 3.3.2): in the model, so that every rank and every
    checkpoint has it. As a logarithm, so that it stays above zero.
    """

    def __init__(self, config: SailEmbeddingConfig) -> None:
        super().__init__()
        self.known = config.temperatures
        self.names = list(config.temperatures)
        self.log = nn.Parameter(torch.tensor(list(config.temperatures.values())).log())

    def forward(self, name: str) -> Tensor:
        """The scalar temperature of a dataset, in float32."""
        if name not in self.names:
            raise ValueError(f"No temperature for dataset {name!r}; the configuration has {self.names}.")
        whole = getattr(self.log, "full_tensor", None)  # where ranks share the parameters out
        log = self.log if whole is None else whole()
        return log[self.names.index(name)].float().exp()

    def add(self, initial: dict[str, float]) -> None:
        """Give datasets that have no temperature yet their initial one; what was learned for the others stays."""
        new = {name: value for name, value in initial.items() if name not in self.names}
        self.names += list(new)
        self.known.update(new)  # the configuration's own mapping, so that a saved model has them too
        values = torch.tensor(list(new.values()), dtype=self.log.dtype, device=self.log.device).log()
        self.log = nn.Parameter(torch.cat([self.log.detach(), values]))


def build_tower(config: PretrainedConfig) -> PreTrainedModel:
    """A randomly initialised tower for a transformers configuration, without the pooling head that nothing reads."""
    builder = TOWER_CLASSES.get(config.model_type)
    tower = AutoModel.from_config(config) if builder is None else builder._from_config(config)
    pooler = getattr(tower, "pooler", None)
    # Parameters that no output depends on would stall distributed training, which waits for every gradient.
    if isinstance(pooler, nn.Module) and next(pooler.parameters(), None) is not None:
        tower.pooler = None
    return tower


def tower_width(config: PretrainedConfig) -> int:
    """Number of channels of a tower's ``last_hidden_state``, whatever its family calls it."""
    for name in ("hidden_dim", "hidden_size", "d_model"):  # EfficientNet's hidden_dim is its last map
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    if getattr(config, "hidden_sizes", None):
        return config.hidden_sizes[-1]
    raise ValueError(f"Cannot tell the width of a {config.model_type!r} tower; it needs hidden_size or hidden_sizes.")


def as_tokens(hidden: Tensor) -> Tensor:
    """(N, T, C) as it is; a map (N, C, H, W) becomes (N, H * W, C)."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


# --- the model ------------------------------------------------------------------------------------------------------


class SailEmbeddingPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family: initialisation, attention kernels, splitting, checkpointing."""

    config_class = SailEmbeddingConfig
    base_model_prefix = "sail"
    main_input_name = "input_ids"
    input_modalities = ["image", "audio", "text"]
    # A training may keep heads beside the model in its checkpoints (behaviour_heads_sail.py).
    _keys_to_ignore_on_load_unexpected = [r"^heads\."]
    supports_gradient_checkpointing = True
    _no_split_modules = ["PerceiverBlock", "AudioAdapter"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that missing weights are initialised whole.

        For custom code transformers passes over modules without parameters of their own, and Whisper's encoder is one:
        its sinusoids would stay random. The rule guards against code that writes weights without
        ``transformers.initialization``; this family has none.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisualPerceiver):
            init.normal_(module.latents, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Temperatures):
            init.copy_(module.log, torch.tensor(list(self.config.temperatures.values())).log())


class SailEmbeddingModel(SailEmbeddingPreTrainedModel):
    """One vector for any item or query (SAIL-Embedding, section 3.2, Fig. 4).

    >>> model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    >>> batch = processor([{"title": "a red kangaroo", "image": "kangaroo.png"}], task="i2i", side="target")
    >>> model(**batch).embeddings.shape
    torch.Size([1, 384])
    """

    def __init__(self, config: SailEmbeddingConfig) -> None:
        super().__init__(config)
        self.text_tower = build_tower(config.text_config)
        # Some kernels ask the layer, not the mask, whether it is causal (section 3.2: bidirectional fusion).
        layers: list[Any] = [module for module in self.text_tower.modules() if getattr(module, "is_causal", False)]
        for layer in layers:
            layer.is_causal = config.causal
        if config.causal and not layers:
            raise ValueError(f"causal=True needs a decoder; {config.text_config.model_type!r} sees both ways.")
        self.vision_tower = self.perceiver = self.audio_tower = self.audio_adapter = self.late_fusion_gate = None
        if config.vision_config is not None:
            self.vision_tower = build_tower(config.vision_config)
            self.perceiver = VisualPerceiver(config, tower_width(config.vision_config))
            if config.late_fusion:
                self.late_fusion_gate = nn.Linear(2 * config.hidden_size, config.hidden_size)
        if config.audio_config is not None:
            self.audio_tower = build_tower(config.audio_config)
            self.audio_adapter = AudioAdapter(config, tower_width(config.audio_config))
        self.temperatures = Temperatures(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_tower.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_tower.set_input_embeddings(value)

    def train(self, mode: bool = True) -> SailEmbeddingModel:
        """As in torch, with two exceptions.

        A tower that is wholly frozen stays in eval mode, so that it has no dropout; and batch norms keep the statistics
        that they were published with, so that an item's vector never depends on its batch.
        """
        super().train(mode)
        for tower in (self.text_tower, self.vision_tower, self.audio_tower):
            if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    # -- one item in, one vector out ---------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        frame_positions: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_owner: Tensor | None = None,
        image_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_modality_embeddings: bool = False,
        output_late_fusion: bool = False,
        use_all_parts: bool = False,
        unpadded: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SailOutput:
        """Embed B items of L tokens with N pictures and frames and M windows of sound in all.

        Args:
            input_ids: (B, L) tokens with the placeholders of pictures and sound; or ``inputs_embeds`` (B, L, D).
            attention_mask: (B, L), 1 for tokens, 0 for padding.
            modality_ids: (B, L), 0 padding, 1 prompt, 2 audio, 3 vision, 4 text; told from the placeholders if absent.
            pixel_values: (N, 3, H, W), every picture and frame; or ``image_features`` (N, T, V), the vision tower's
                tokens where they are cached.
            image_owner: (N,), the row that each picture belongs to; may be absent where each row with pictures has one.
            frame_positions: (N,), index of the picture within its item; 0, 1, ... in order if absent.
            input_features: (M, ...), windows as the audio tower takes them; or ``audio_features`` (M, T, A).
            audio_owner: (M,), the row that each window belongs to; may be absent like ``image_owner``.
            output_modality_embeddings: also ``vision_embeddings``, ``text_embeddings``, ``audio_embeddings``.
            output_late_fusion: also ``late_fusion_embeddings``.
            use_all_parts: let every part of the model take part in the gradient, those that this batch does not need
                with a blank input and times zero: ranks wait for each other's gradients of every part.
            unpadded: on a CPU, in inference, run the backbone without its padding: the same embeddings
                sooner, and zeros in ``last_hidden_state`` at padding; elsewhere ``attn_implementation="packed"`` does.
            output_hidden_states, output_attentions: of the backbone, as in transformers.

        Raises:
            ValueError: neither or both of ids and embeddings; a tower that the model lacks; owners, placeholders and
                pictures that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids (B, L) and inputs_embeds (B, L, D).")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        segments = self._segments(input_ids, embeds, attention_mask, modality_ids)  # (B, L)

        if image_features is None and pixel_values is not None:
            image_features = self.vision_features(pixel_values)  # (N, T, V)
        if image_features is not None:
            image_owner = _checked_owners(image_owner, len(image_features), segments == VISION, "image_owner")
            latents = self._encode_vision(image_features, image_owner, frame_positions)  # (G, K, D)
            embeds = _fill(embeds, segments == VISION, latents, "pictures")
        if audio_features is None and input_features is not None:
            audio_features = self.audio_features(input_features)  # (M, T, A)
        if audio_features is not None:
            audio_owner = _checked_owners(audio_owner, len(audio_features), segments == AUDIO, "audio_owner")
            sound = self._encode_audio(audio_features, audio_owner)  # (G, D)
            embeds = _fill(embeds, segments == AUDIO, sound, "sounds")

        flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        flags = {name: flag for name, flag in flags.items() if flag is not None}
        fused, embeddings, alone = self._read(embeds, segments, unpadded=unpadded, **flags, **kwargs)
        output = SailOutput(
            embeddings=embeddings,
            modality_mask=torch.stack([(segments == SEGMENT_OF[name]).any(dim=1) for name in MODALITIES], dim=1),
            last_hidden_state=fused.last_hidden_state,
            hidden_states=getattr(fused, "hidden_states", None),
            attentions=getattr(fused, "attentions", None),
        )
        if output_modality_embeddings:
            for place, name in enumerate(MODALITIES):
                output[f"{name}_embeddings"] = (
                    self._embed_alone(embeds, segments, SEGMENT_OF[name], embeddings) if alone is None else alone[place]
                )
        if output_late_fusion:
            output["late_fusion_embeddings"] = self._late_fusion(embeds, segments, embeddings)
        if use_all_parts:  # last, so that it moves no random number of what counts
            output["embeddings"] = embeddings + self._unused_parts(image_features, audio_features, output_late_fusion)
        return output

    def _unused_parts(self, image_features: Tensor | None, audio_features: Tensor | None, gate_used: bool) -> Tensor:
        """Zero, with a gradient of zero for every part that a batch without pictures, sound or gate leaves out."""
        total = self.temperatures.log.sum()
        one = torch.zeros(1, dtype=torch.long, device=total.device)
        if self.vision_tower is not None and _trains(self.vision_tower) and image_features is None:
            size = getattr(self.config.vision_config, "image_size", 32)
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            channels = getattr(self.config.vision_config, "num_channels", 3)
            image_features = self.vision_features(total.new_zeros(1, channels, height, width))
            total = total + self._encode_vision(image_features, one, None).sum()
        elif self.perceiver is not None and image_features is None:
            blank = total.new_zeros(1, 1, tower_width(self.config.vision_config))
            total = total + self._encode_vision(blank, one, None).sum()
        if self.audio_tower is not None and _trains(self.audio_tower) and audio_features is None:
            audio_features = self.audio_features(_blank_window(self.config.audio_config).to(total.device))
            total = total + self._encode_audio(audio_features, one).sum()
        elif self.audio_adapter is not None and audio_features is None:
            blank = total.new_zeros(1, 1, tower_width(self.config.audio_config))
            total = total + self._encode_audio(blank, one).sum()
        if self.late_fusion_gate is not None and not gate_used:
            gate = self.late_fusion_gate
            total = total + gate(torch.zeros(1, gate.in_features, dtype=gate.weight.dtype, device=total.device)).sum()
        return 0.0 * total.float()

    # -- towers ------------------------------------------------------------------------------------------------------

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) pictures -> (N, T, V) tokens of the vision tower: `forward` takes them as ``image_features``."""
        if self.vision_tower is None:
            raise ValueError("There are pictures, but this model has no vision tower (vision_config is None).")
        return as_tokens(run_tower(self.vision_tower, pixel_values, "last_hidden_state"))

    def audio_features(self, input_features: Tensor) -> Tensor:
        """(M, ...) windows -> (M, T, A) tokens of the audio tower: `forward` takes them as ``audio_features``."""
        if self.audio_tower is None:
            raise ValueError("There is sound, but this model has no audio tower (audio_config is None).")
        if self.config.audio_pooling == "pooler":
            return run_tower(self.audio_tower, input_features, "pooler_output")[:, None]
        return as_tokens(run_tower(self.audio_tower, input_features, "last_hidden_state"))

    def _encode_vision(self, features: Tensor, owner: Tensor, positions: Tensor | None) -> Tensor:
        """(N, T, V) tokens of N frames with (N,) rising owners -> (G, K, D) visual tokens of G items."""
        if self.perceiver is None:
            raise ValueError("There are picture features, but this model has no perceiver (vision_config is None).")
        group = _ranks(owner)  # (N,)
        positions = _places(group) if positions is None else positions
        limit = self.config.max_frames
        if positions.numel() and int(positions.max()) >= limit:
            most = int(positions.max()) + 1
            raise ValueError(f"An item has {most} pictures and frames; max_frames={limit}. Sample fewer.")
        if self.config.latents_per_frame:  # every frame its own group, in the order of the owners: rows fill in order
            group = torch.arange(len(group), device=group.device)
        return for_inference(self.perceiver)(features.to(self.perceiver.latents.dtype), positions, group)

    def _encode_audio(self, features: Tensor, owner: Tensor) -> Tensor:
        """(M, T, A) tokens of M windows with (M,) rising owners -> (G, D), one token for each of G items."""
        if self.audio_adapter is None:
            raise ValueError("There are sound features, but this model has no audio adapter (audio_config is None).")
        kind = self.audio_adapter.norm.weight.dtype  # not a linear's: where linears are quantised, `weight` is a method
        return for_inference(self.audio_adapter)(features.to(kind), _ranks(owner))

    # -- fusion ------------------------------------------------------------------------------------------------------

    def _fuse(self, embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        return run_backbone(self.text_tower, embeds, attention_mask, **kwargs)

    def _pool(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """MeanPool(tanh(F(T))) over all tokens of the item (section 3.2); in float32, whatever the backbone's type."""
        hidden = hidden.float()
        if self.config.pool_tanh:
            hidden = hidden.tanh()
        counted = segments != PAD if self.config.pool_prompt else (segments != PAD) & (segments != PROMPT)
        weights = counted.to(hidden.dtype)[..., None]  # (B, L, 1)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)  # (B, D)

    def _embed_alone(self, embeds: Tensor, segments: Tensor, segment: int, fused: Tensor) -> Tensor:
        """Embed each item from its prompt and one modality; what is left out is cut from the sequence, not masked.

        So the vector equals that of the same item with the other modalities absent; an item that has no other is done.
        """
        has = (segments == segment).any(dim=1)
        kept = (segments == PROMPT) | (segments == segment)
        more = (~kept & (segments != PAD)).any(dim=1)
        alone = torch.where((has & ~more)[:, None], fused, 0.0)  # (B, D)
        rows = (has & more).nonzero()[:, 0]
        if not len(rows):
            return alone
        tokens, short = _cut_to(embeds[rows], segments[rows], kept[rows])
        return alone.index_copy(0, rows, self._pool(self._fuse(tokens, (short != PAD).long()).last_hidden_state, short))

    def _read(self, embeds: Tensor, segments: Tensor, **kwargs: Any) -> tuple[Any, Tensor, list[Tensor] | None]:
        """The backbone's output, the (B, D) embeddings, and where towers are separate those of each modality."""
        if self.config.fusion == "separate":
            read, alone = self._separate(embeds, segments, **kwargs)
            return read, _mean_of_units(alone), alone
        fused = self._fuse(embeds, (segments != PAD).long(), **kwargs)
        return fused, self._pool(fused.last_hidden_state, segments), None

    def _separate(self, embeds: Tensor, segments: Tensor, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """A dual tower: the backbone's output for prompt and text, and the (B, D) embeddings by modality.

        Zeros where an item lacks the modality; an item of neither picture nor sound is its text, if only the prompt.
        """
        tokens, short = _cut_to(embeds, segments, (segments == PROMPT) | (segments == TEXT))
        read = self._fuse(tokens, (short != PAD).long(), **kwargs)
        media = [_segment_mean(embeds, segments, SEGMENT_OF[name]) for name in MODALITIES[:-1]]
        other = ((segments == AUDIO) | (segments == VISION)).any(dim=1)
        told = (segments == TEXT).any(dim=1) | ~other
        return read, [*media, torch.where(told[:, None], self._pool(read.last_hidden_state, short), 0.0)]

    def _late_fusion(self, embeds: Tensor, segments: Tensor, fused: Tensor) -> Tensor:
        """n_hat = g * v + (1 - g) * n_m with g = sigmoid(W [v, n_m] + b) (section 3.2); n_m where nothing is seen.

        v is the mean of the item's projected perceiver latents, which are the visual tokens of ``embeds``.
        """
        if self.late_fusion_gate is None:
            raise ValueError("output_late_fusion needs a vision tower and late_fusion=True in the configuration.")
        visual = _segment_mean(embeds, segments, VISION)  # (B, D)
        both = torch.cat([visual.to(embeds.dtype), fused.to(embeds.dtype)], dim=-1)
        gate = self.late_fusion_gate(both).float().sigmoid() * (segments == VISION).any(dim=1, keepdim=True)
        return gate * visual + (1 - gate) * fused

    # -- how the flat lists and the rows fit together ----------------------------------------------------------------

    def _segments(
        self, input_ids: Tensor | None, embeds: Tensor, attention_mask: Tensor | None, modality_ids: Tensor | None
    ) -> Tensor:
        """(B, L) segment of each token, from ``modality_ids`` or else from the placeholders."""
        if modality_ids is None:
            modality_ids = torch.full(embeds.shape[:2], TEXT, device=embeds.device)
            for token_id, segment in ((self.config.image_token_id, VISION), (self.config.audio_token_id, AUDIO)):
                if token_id is not None:
                    modality_ids = modality_ids.masked_fill(self._is_token(token_id, input_ids, embeds), segment)
        if attention_mask is not None:
            modality_ids = modality_ids.masked_fill(attention_mask == 0, PAD)
        return modality_ids

    def _is_token(self, token_id: int, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        if input_ids is not None:
            return input_ids == token_id
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=embeds.device))
        return (embeds == placeholder.to(embeds.dtype)).all(dim=-1)

    # -- one modality, as transformers' multimodal models have it ----------------------------------------------------

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_owner: Tensor | None = None,
        frame_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of items from their pictures; without owners every picture is an item of its own.

        Returns:
            ``last_hidden_state`` (N, T, V), the tower's tokens, and ``pooler_output`` (G, num_latents, D), what the
            fusion backbone reads.
        """
        if self.vision_tower is None:
            raise ValueError("This model has no vision tower (vision_config is None).")
        output = _call_tower(self.vision_tower, pixel_values, output_hidden_states, output_attentions, kwargs)
        features = as_tokens(output.last_hidden_state)
        owner = torch.arange(len(features), device=features.device) if image_owner is None else image_owner
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self._encode_vision(features, owner, frame_positions),
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: Tensor,
        audio_owner: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Audio tokens of items from their windows; without owners every window is an item of its own.

        Returns:
            ``last_hidden_state`` (M, T, A), the tower's tokens, and ``pooler_output`` (G, 1, D).
        """
        if self.audio_tower is None:
            raise ValueError("This model has no audio tower (audio_config is None).")
        output = _call_tower(self.audio_tower, input_features, output_hidden_states, output_attentions, kwargs)
        tokens = as_tokens(output.last_hidden_state)
        features = output.pooler_output[:, None] if self.config.audio_pooling == "pooler" else tokens
        owner = torch.arange(len(features), device=features.device) if audio_owner is None else audio_owner
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=self._encode_audio(features, owner)[:, None],
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Text alone through the fusion backbone: ``last_hidden_state`` (B, L, D), ``pooler_output`` (B, D)."""
        output = self.forward(
            input_ids,
            attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,  # the configuration may ask for tuples
            **kwargs,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=output.embeddings,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


# --- towers and owners ---------------------------------------------------------------------------------------------


def _checked_owners(owner: Tensor | None, count: int, placeholders: Tensor, name: str) -> Tensor:
    """(N,) row of each entry, told from the (B, L) placeholders where each row has one entry and no owner is given."""
    rows = placeholders.any(dim=1).nonzero()[:, 0]
    if owner is None:
        if len(rows) != count:
            raise ValueError(f"{count} pictures or windows for {len(rows)} rows that have one: give {name}.")
        return rows
    if len(owner) != count or bool((owner.diff() < 0).any()):
        raise ValueError(f"{name} must hold one row index for each of the {count} entries, in rising order.")
    if not torch.equal(owner.unique_consecutive(), rows):
        named = owner.unique_consecutive().tolist()
        raise ValueError(f"{name} names rows {named}, but rows {rows.tolist()} have placeholders.")
    return owner


def _ranks(owner: Tensor) -> Tensor:
    """(N,) rising row indices -> (N,) group indices 0 .. G - 1 without gaps."""
    return torch.unique_consecutive(owner, return_inverse=True)[1]


def _places(group: Tensor) -> Tensor:
    """(N,) rising group indices -> (N,) place of each entry within its group."""
    counts = torch.bincount(group)
    return torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]


def _fill(embeds: Tensor, where: Tensor, tokens: Tensor, what: str) -> Tensor:
    """Put (G, K, D) or (G, D) tokens in the places of (B, L) ``where``, row by row."""
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if int(where.sum()) != len(tokens):
        raise ValueError(
            f"The rows have {int(where.sum())} placeholders for {what}, but their {what} make {len(tokens)} tokens; "
            "processor and model must come from the same folder."
        )
    return embeds.masked_scatter(where[..., None], tokens.to(embeds.dtype))


def _cut_to(embeds: Tensor, segments: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, D) tokens and their (B, L) segments, cut to those that are ``kept``, in their order: (B, L'), padded."""
    length = max(int(kept.sum(dim=1).max()), 1)
    order = (~kept).long().argsort(dim=1, stable=True)[:, :length]  # (B, L')
    short = torch.where(kept, segments, PAD).gather(1, order)
    return embeds[torch.arange(len(embeds), device=embeds.device)[:, None], order], short  # (B, L', D)


def _segment_mean(embeds: Tensor, segments: Tensor, segment: int) -> Tensor:
    """(B, D) in float32, the mean of a segment's (B, L, D) tokens; zeros where a row has none."""
    there = (segments == segment).to(embeds.dtype)[..., None]  # (B, L, 1)
    return ((embeds * there).sum(dim=1) / there.sum(dim=1).clamp_min(1)).float()


def _mean_of_units(parts: list[Tensor]) -> Tensor:
    """(B, D), the mean of those (B, D) parts that are there, each of length 1; a part of zeros is not."""
    there = torch.stack([(part != 0).any(dim=1) for part in parts]).sum(dim=0)  # (B,)
    total = torch.stack([nn.functional.normalize(part, dim=-1) for part in parts]).sum(dim=0)
    return total / there.clamp_min(1)[:, None]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _blank_window(config: PretrainedConfig) -> Tensor:
    """One window of silence as the audio tower takes it: Whisper's mels by time, CLAP's time by mels."""
    if config.model_type == "clap_audio_model":
        return torch.zeros(1, 1, config.spec_size**2 // config.num_mel_bins, config.num_mel_bins)
    return torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)


def _call_tower(
    tower: Any, values: Tensor, hidden_states: bool | None, attentions: bool | None, kwargs: dict[str, Any]
) -> Any:
    flags = {"output_hidden_states": hidden_states, "output_attentions": attentions}
    return tower(values, return_dict=True, **{name: flag for name, flag in flags.items() if flag is not None}, **kwargs)


SailEmbeddingModel.register_for_auto_class("AutoModel")
