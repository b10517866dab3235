"""The parts of a model as graphs that ONNX can hold, each with the inputs that it is traced and compared on.

Unusual: which picture belongs to which item is not worked out in a graph (counting is data-dependent, and exporters
refuse it) but before it: pictures and windows arrive padded to the item that has most, with a mask. The comparison is
with the model's own way through, never with the module that was traced. Not uploaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .configuration_sail import AUDIO, PAD, PROMPT, TEXT, VISION
from .modeling_sail import _mean_of_units, _segment_mean, as_tokens

PARTS = ("text", "vision", "audio", "fusion")

# (items, tokens), and pictures or windows of each item: the first of each is traced, all are compared. None of the
# traced sizes is 0 or 1, which the exporter would take for constants.
SIZES = ((2, 11), (1, 1), (3, 40), (7, 5))
GROUPS = ([3, 2], [1], [2, 1, 3], [1, 1, 4, 1, 2, 1, 1])


@dataclass(frozen=True)
class Graph:
    """One ONNX file to be: what is traced, how its inputs are named, and what it must equal.

    Attributes:
        name: of the file, without ``.onnx``.
        module: what is traced.
        inputs: name of each input, and the names of its axes that vary: ``{"input_ids": {0: "items"}}``.
        output: name of the one output.
        reference: the model's own way from the same inputs to the same output.
        probes: inputs of several sizes; the first is traced, all are compared.
    """

    name: str
    module: nn.Module
    inputs: dict[str, dict[int, str]]
    output: str
    reference: Callable[..., Tensor]
    probes: Sequence[tuple[Tensor, ...]]


def graphs_of(part: str, model: Any, processor: Any) -> Iterator[Graph]:
    """The graphs of a part of `PARTS`; every probe is from a fixed seed.

    Args:
        part: "text", "vision", "audio" or "fusion".
        model: a `SailEmbeddingModel` in float32 and eval mode.
        processor: its processor, which knows how large pictures and windows are.
    """
    random = torch.Generator().manual_seed(0)
    makers: dict[str, Callable[..., Iterator[Graph]]] = {
        "text": _text,
        "vision": _vision,
        "audio": _audio,
        "fusion": _fusion,
    }
    yield from makers[part](model, processor, random)


# --- what is traced -------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Pictures or windows to the tower's tokens, or to its pooled output as one token."""

    def __init__(self, tower: nn.Module, pooled: bool = False) -> None:
        super().__init__()
        self.tower = tower
        self.pooled = pooled

    def forward(self, values: Tensor) -> Tensor:
        """(N, 3, H, W) or (M, ...) -> (N, T, V) or (M, T, A)."""
        output = self.tower(values)
        return output["pooler_output"][:, None] if self.pooled else as_tokens(output["last_hidden_state"])


class VisualTokens(nn.Module):
    """`VisualPerceiver` on frames that are padded to the item with most of them."""

    def __init__(self, perceiver: Any) -> None:
        super().__init__()
        self.perceiver = perceiver

    def forward(self, features: Tensor, positions: Tensor, present: Tensor) -> Tensor:
        """(G, F, T, V) tokens of F frames, (G, F) places in their item, (G, F) booleans -> (G, K, D)."""
        tokens = self.perceiver.frame_tokens(features, positions)  # (G, F, T, L)
        mean = None if self.perceiver.shortcut is None else _masked_mean(features.mean(dim=2), present)
        return self.perceiver.resample(tokens, present, mean)


class AudioToken(nn.Module):
    """`AudioAdapter` on windows that are padded to the item with most of them."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """(G, W, T, A) tokens of W windows and (G, W) booleans -> (G, D)."""
        pooled = self.adapter.pool(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # (G, W, A)
        return self.adapter.token(_masked_mean(pooled, present))


class Backbone(nn.Module):
    """Tokens and segments to embeddings, for both kinds of fusion."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.text_tower
        self.pool = model._pool
        self.separate = model.config.fusion == "separate"

    def read(self, embeds: Tensor, segments: Tensor) -> Tensor:
        """(B, L, D) tokens and (B, L) segments -> (B, D), not normalised."""
        if not self.separate:
            return self.pool(self._hidden(embeds, segments), segments)
        tokens, short = _packed(embeds, segments, (segments == PROMPT) | (segments == TEXT))
        media = [_segment_mean(embeds, segments, segment) for segment in (AUDIO, VISION)]
        other = ((segments == AUDIO) | (segments == VISION)).any(dim=1)
        told = (segments == TEXT).any(dim=1) | ~other
        text = torch.where(told[:, None], self.pool(self._hidden(tokens, short), short), 0.0)
        return _mean_of_units([*media, text])

    def _hidden(self, embeds: Tensor, segments: Tensor) -> Tensor:
        return self.tower(inputs_embeds=embeds, attention_mask=(segments != PAD).long())["last_hidden_state"]


class Fusion(Backbone):
    """Ids, segments and the tokens of pictures and sounds to embeddings."""

    def forward(self, input_ids: Tensor, modality_ids: Tensor, media_tokens: Tensor) -> Tensor:
        """(B, L) ids, (B, L) segments, (P, D) tokens in the order of their P placeholders -> (B, D)."""
        embeds = self.tower.get_input_embeddings()(input_ids)
        return self.read(_filled(embeds, modality_ids, media_tokens), modality_ids)


class TextOnly(Backbone):
    """Ids and mask to embeddings: for items that are only text."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, modality_ids: Tensor | None = None) -> Tensor:
        """(B, L) ids, (B, L) 1 for tokens and 0 for padding -> (B, D); segments where prompts are not pooled."""
        segments = torch.full_like(input_ids, TEXT) if modality_ids is None else modality_ids
        embeds = self.tower.get_input_embeddings()(input_ids)
        return self.read(embeds, segments.masked_fill(attention_mask == 0, PAD))


def _masked_mean(values: Tensor, present: Tensor) -> Tensor:
    """(G, F, V) values and (G, F) booleans -> (G, V)."""
    weights = present.to(values.dtype)[..., None]
    return (values * weights).sum(dim=1) / weights.sum(dim=1)


def _filled(embeds: Tensor, segments: Tensor, media: Tensor) -> Tensor:
    """(B, L, D) with (P, D) media in the places of pictures and sounds, row by row; P may be 0."""
    where = ((segments == VISION) | (segments == AUDIO)).flatten()
    place = torch.where(where, where.long().cumsum(0), 0).view_as(segments)  # 0 for text, else 1 + row of media
    table = torch.cat([media.new_zeros(1, media.shape[1]), media])  # so that there is a row to look up without media
    return torch.where((place > 0)[..., None], table[place], embeds)


def _packed(embeds: Tensor, segments: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Move the kept tokens of each row to its front, in their order; the length stays."""
    length = embeds.shape[1]
    order = ((~kept).long() * length + torch.arange(length)).argsort(dim=1)  # keys differ: any sort keeps the order
    short = torch.where(kept, segments, PAD).gather(1, order)
    return embeds.gather(1, order[..., None].expand_as(embeds)), short


# --- the parts: inputs, probes, references --------------------------------------------------------------------------


def _text(model: Any, processor: Any, random: torch.Generator) -> Iterator[Graph]:
    names = ["input_ids", "attention_mask"]
    if not model.config.pool_prompt:  # then the mean must know which tokens are the prompt
        names.append("modality_ids")
    probes = [_sequences(model, items, tokens, random)[: len(names)] for items, tokens in SIZES]
    axes = {0: "items", 1: "tokens"}

    def reference(*given: Tensor) -> Tensor:
        return model(**dict(zip(names, given, strict=True))).embeddings

    yield Graph("text", TextOnly(model), dict.fromkeys(names, axes), "embeddings", reference, probes)


def _fusion(model: Any, processor: Any, random: torch.Generator) -> Iterator[Graph]:
    probes = []
    for items, tokens in SIZES:
        ids, _, segments = _sequences(model, items, tokens, random)
        media = min(tokens // 2, 5)
        segments[0, 1 : 1 + media] = torch.tensor([AUDIO, *[VISION] * 4])[:media]
        probes.append((ids, segments, torch.randn(media, model.config.hidden_size, generator=random)))

    def reference(input_ids: Tensor, modality_ids: Tensor, media_tokens: Tensor) -> Tensor:
        embeds = model.get_input_embeddings()(input_ids)
        where = (modality_ids == VISION) | (modality_ids == AUDIO)
        embeds = embeds.masked_scatter(where[..., None], media_tokens)
        return model(inputs_embeds=embeds, modality_ids=modality_ids).embeddings

    axes = {0: "items", 1: "tokens"}
    inputs = {"input_ids": axes, "modality_ids": axes, "media_tokens": {0: "placeholders"}}
    yield Graph("fusion", Fusion(model), inputs, "embeddings", reference, probes)


def _vision(model: Any, processor: Any, random: torch.Generator) -> Iterator[Graph]:
    pixels = torch.cat([_picture(processor, seed) for seed in range(7)])
    probes: list[tuple[Tensor, ...]] = [(pixels[:size],) for size in (2, 1, 3, 7)]
    inputs = {"pixel_values": {0: "pictures"}}
    yield Graph("vision", Tower(model.vision_tower), inputs, "image_features", model.vision_features, probes)

    def reference(features: Tensor, positions: Tensor, present: Tensor) -> Tensor:
        return model.perceiver(features[present], positions[present], present.nonzero()[:, 0])

    tokens = model.vision_features(pixels)
    probes = [_grouped(tokens, counts, random, model.config.max_frames) for counts in GROUPS]
    axes = {0: "groups", 1: "frames"}
    inputs = {"image_features": axes, "frame_positions": axes, "present": axes}
    yield Graph("visual_tokens", VisualTokens(model.perceiver), inputs, "visual_tokens", reference, probes)


def _audio(model: Any, processor: Any, random: torch.Generator) -> Iterator[Graph]:
    size = round(processor.audio_window_seconds * processor.feature_extractor.sampling_rate)
    noise = np.random.default_rng(0).normal(0, 0.1, (7, size)).astype(np.float32)
    windows = processor._audio_features(list(noise))
    probes: list[tuple[Tensor, ...]] = [(windows[:size],) for size in (2, 1, 3, 7)]
    pooled = model.config.audio_pooling == "pooler"
    tower = Tower(model.audio_tower, pooled)
    yield Graph("audio", tower, {"input_features": {0: "windows"}}, "audio_features", model.audio_features, probes)

    def reference(features: Tensor, present: Tensor) -> Tensor:
        return model.audio_adapter(features[present], present.nonzero()[:, 0])

    tokens = model.audio_features(windows)
    grouped = [_grouped(tokens, counts, random, 1) for counts in GROUPS]
    axes = {0: "groups", 1: "windows"}
    inputs = {"audio_features": axes, "present": axes}
    probes = [(features, present) for features, _, present in grouped]
    yield Graph("audio_tokens", AudioToken(model.audio_adapter), inputs, "audio_tokens", reference, probes)


def _sequences(model: Any, items: int, tokens: int, random: torch.Generator) -> tuple[Tensor, ...]:
    """(B, L) ids without placeholders, mask and segments: rows of several lengths, prompts around text."""
    special = (model.config.image_token_id, model.config.audio_token_id)
    vocabulary = model.get_input_embeddings().num_embeddings
    free = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in special])
    ids = free[torch.randint(len(free), (items, tokens), generator=random)]
    lengths = torch.tensor([max(1, tokens - row) for row in range(items)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    segments = torch.full_like(ids, TEXT)
    if tokens > 6:
        segments[:, :1], segments[:, 6:8] = PROMPT, PROMPT
    return ids, mask, segments.masked_fill(mask == 0, PAD)


def _picture(processor: Any, seed: int) -> Tensor:
    """(1, 3, H, W) as the model takes it, from a picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return processor._pictures([[Image.fromarray(noise)]])["pixel_values"]


def _grouped(tokens: Tensor, counts: list[int], random: torch.Generator, limit: int) -> tuple[Tensor, ...]:
    """(G, F, T, V) features, (G, F) positions below ``limit`` and (G, F) booleans: G groups of so many frames each."""
    present = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    chosen = torch.randint(len(tokens), present.shape, generator=random)
    features = tokens[chosen].masked_fill(~present[..., None, None], 0.0)
    return features, (torch.arange(max(counts)) % limit).expand_as(present).contiguous(), present
