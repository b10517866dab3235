"""The Visual Perceiver: any number of visual tokens in, a fixed number of latents out (SAIL-Embedding, section 3.2).

Unusual: the latents and the visual tokens go through plain self-attention together, and only the latents are kept; the
last block computes the latents alone, because nothing reads the others any more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_sail import SailEmbeddingConfig


class PerceiverBlock(GradientCheckpointingLayer):
    """Pre-norm Transformer block: self-attention, then an MLP of four times the width."""

    def __init__(self, config: SailEmbeddingConfig) -> None:
        super().__init__()
        size = config.latent_size
        self.config = config
        self.num_heads = config.perceiver_heads
        self.attention_norm = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, hidden: Tensor, mask: Tensor, num_queries: int) -> Tensor:
        """One block over S tokens of width L; only the first ``num_queries`` tokens are computed and returned.

        Args:
            hidden: (G, S, L).
            mask: (G, 1, 1, S), True where a token may be attended.
            num_queries: Q <= S.

        Returns:
            (G, Q, L).
        """
        batch, length, size = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (G, heads, S, L / heads)
        mixed = self._attend(query[:, :, :num_queries], key, value, mask)
        hidden = hidden[:, :num_queries] + self.out(mixed.transpose(1, 2).reshape(batch, num_queries, size))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if self.config._attn_implementation != "eager":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.float().softmax(dim=-1).to(value.dtype) @ value


class TokenDecoder(nn.Module):
    """(G, D) normalised embeddings of what pictures or sounds hold -> (G, D) input tokens that say it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(embedding)))


class VisualShortcut(nn.Module):
    """Mean visual token to one token of the backbone, beside the perceiver (not in the paper).

    Two readings of the picture are blended in an embedding space, then decoded: an MLP, and a memory of concepts that
    is read by softmax, as attention reads values by keys. The memory can hold what a classifier of the tower knows:
    its weights as keys, the embeddings of its class names as values.
    """

    MEMORY_SHARE = 0.4  # chosen among .25 and .4 on training names that were held out for it

    def __init__(self, config: SailEmbeddingConfig, input_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.up = nn.Linear(input_size, config.shortcut_size)
        self.down = nn.Linear(config.shortcut_size, size)
        self.keys = nn.Linear(input_size, config.shortcut_memory)
        self.values = nn.Linear(config.shortcut_memory, size, bias=False)
        self.decoder = TokenDecoder(size) if config.fusion == "joint" else None  # else no backbone reads a token

    def forward(self, mean: Tensor) -> Tensor:
        """(G, V) mean visual tokens -> (G, D) tokens."""
        embedding = self.embed(mean, mean)
        return embedding if self.decoder is None else self.decoder(embedding)

    def embed(self, read: Tensor, recalled: Tensor) -> Tensor:
        """(G, D), normalised, from what the MLP reads and what the memory recalls: (G, V) mean visual tokens, both."""
        seen = self.down(F.gelu(self.up(read)))
        known = self.values(self.keys(recalled).float().softmax(dim=-1).to(recalled.dtype))
        share = self.MEMORY_SHARE
        return F.normalize((1 - share) * F.normalize(seen, dim=-1) + share * F.normalize(known, dim=-1), dim=-1)


class VisualPerceiver(nn.Module):
    """Resamples the visual tokens of an item to ``num_latents`` tokens of the backbone's width.

    Args:
        config: reads ``num_latents``, ``latent_size``, ``perceiver_depth``, ``perceiver_heads``, ``max_frames``.
        input_size: width V of the vision tower's tokens.
    """

    def __init__(self, config: SailEmbeddingConfig, input_size: int) -> None:
        super().__init__()
        size = config.latent_size
        self.num_latents = config.num_latents
        self.latents = nn.Parameter(torch.empty(config.num_latents, size))
        self.frame_positions = nn.Embedding(config.max_frames, size)
        self.input_norm = nn.LayerNorm(input_size)
        self.input = nn.Linear(input_size, size)
        self.blocks = nn.ModuleList(PerceiverBlock(config) for _ in range(config.perceiver_depth))
        self.output_norm = nn.LayerNorm(size)
        self.output = nn.Linear(size, config.hidden_size)
        self.shortcut = VisualShortcut(config, input_size) if config.shortcut_size else None

    def forward(self, features: Tensor, positions: Tensor, group: Tensor) -> Tensor:
        """Resample N frames that belong to G groups (items, or single frames).

        Args:
            features: (N, T, V), the tower's tokens of each frame.
            positions: (N,), index of the frame within its item, below ``max_frames``.
            group: (N,), rising from 0 to G - 1: the group that each frame belongs to.

        Returns:
            (G, num_latents, D), D the width of the fusion backbone.
        """
        tokens, present = _pad_groups(self.frame_tokens(features, positions), group)
        mean = None if self.shortcut is None else _group_mean(features, group)
        return self.resample(tokens, present, mean)

    def frame_tokens(self, features: Tensor, positions: Tensor) -> Tensor:
        """(..., T, V) tokens of frames and their (...) places -> (..., T, L)."""
        return self.input(self.input_norm(features)) + self.frame_positions(positions)[..., None, :]

    def resample(self, tokens: Tensor, present: Tensor, mean: Tensor | None) -> Tensor:
        """The part of `forward` that no longer asks which frame is whose: frames lie side by side.

        Args:
            tokens: (G, F, T, L), the `frame_tokens` of F frames of each group.
            present: (G, F), True where a frame is real.
            mean: (G, V), the mean visual token of each group; None without a shortcut, which alone reads it.

        Returns:
            (G, num_latents, D).
        """
        seen = present[..., None].expand(-1, -1, tokens.shape[2]).flatten(1)  # (G, F * T)
        latents = self.latents.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        hidden = torch.cat([latents, tokens.flatten(1, 2)], dim=1)  # (G, num_latents + F * T, L)
        mask = F.pad(seen, (self.num_latents, 0), value=True)[:, None, None]
        for block in self.blocks[:-1]:
            hidden = block(hidden, mask, hidden.shape[1])
        hidden = self.blocks[-1](hidden, mask, self.num_latents)  # (G, num_latents, L)
        latents = self.output(self.output_norm(hidden))  # (G, num_latents, D)
        return latents if self.shortcut is None else latents + self.shortcut(mean)[:, None]


def _group_mean(features: Tensor, group: Tensor) -> Tensor:
    """(N, T, V) tokens of N frames -> (G, V), the mean visual token of each group."""
    frames = torch.bincount(group)  # (G,)
    total = features.new_zeros(len(frames), features.shape[-1]).index_add(0, group, features.mean(dim=1))
    return total / frames[:, None].to(total.dtype)


def _pad_groups(tokens: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Lay the frames of each group side by side, padded to the largest group.

    Returns:
        (G, F, T, L) tokens and (G, F) booleans, True where a frame is real.
    """
    frames = torch.bincount(group)  # (G,)
    first = frames.cumsum(0) - frames
    slot = torch.arange(len(group), device=group.device) - first[group]  # place of each frame within its group
    num_groups, most = len(frames), int(frames.max())
    padded = tokens.new_zeros(num_groups, most, *tokens.shape[1:]).index_put((group, slot), tokens)
    return padded, torch.arange(most, device=group.device) < frames[:, None]
