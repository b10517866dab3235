"""Packed attention: the rows of a batch laid end to end, without padding; ``attn_implementation="packed"``.

On CUDA in half precision it is `torch.nn.attention.varlen`, which needs no package beside torch; elsewhere rows of one
length attend at once, with the same numbers. Unusual: only the fusion backbone has ragged rows; the towers of pictures
and sound run as under "sdpa", but for what is faster as plain products (bfloat16 on a CPU).
"""

from __future__ import annotations

from contextvars import ContextVar
from inspect import signature
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .kernels_sail import PACKED, attention_of, for_inference, in_few_sizes, onednn_pays, traced

try:
    from torch.nn.attention.varlen import varlen_attn as _kernel
except ImportError:  # before torch 2.10
    _kernel = None  # type: ignore[assignment]
varlen_attn: Any = _kernel
if varlen_attn is not None and not {"window_size", "enable_gqa"} <= set(signature(varlen_attn).parameters):
    varlen_attn = None  # its first versions had another interface

_NEAR, _NEAR_HALF = 1e-4, 0.05  # how far packed rows may be from padded ones, as a share of the largest number
_PACKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_HALF = (torch.float16, torch.bfloat16)
_BESIDE_A_MASK = ("softcap", "s_aux", "position_bias", "cache")  # these, too, in a pass that is not packed
# Attention as products pays from so many scores of a row on, in parts of so many, which stay in a cache, and up to so
# many a head, the smallest part; found on two cores with AVX-512. How many rows there are does not count: it would
# decide a row's last bits.
_SCORES, _SCORES_AT_ONCE, _SCORES_OF_A_HEAD = 1 << 16, 1 << 20, 1 << 22
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention")  # of configurations: tokens that a layer sees
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")  # what a layer may ask for beside attention itself


def run_backbone(tower: Any, embeds: Tensor, attention_mask: Tensor, unpadded: bool = False, **kwargs: Any) -> Any:
    """A text tower's output; its rows packed where that was asked for, or is faster at the same numbers.

    Args:
        tower: a transformers text model.
        embeds: (B, L, D).
        attention_mask: (B, L), 1 for tokens, 0 for padding.
        unpadded: pack in inference on a CPU, too, if the tower attends by "sdpa" and gives the same numbers packed.
        kwargs: for the tower.

    Raises:
        ValueError: the tower was loaded with ``attn_implementation="packed"`` and gives other numbers then.
    """
    ragged = False
    if unpadded and embeds.device.type == "cpu" and not torch.compiler.is_compiling():
        ragged = not bool(attention_mask.all())
    chosen = tower
    if attention_of(tower) == "sdpa" and (ragged or onednn_pays(embeds.dtype)):
        chosen = for_inference(tower, attention=PACKED)  # for padded rows, too: another twin held the linears once more
    if chosen is tower:
        chosen = for_inference(tower)
    packs = attention_of(chosen) == PACKED and (attention_of(tower) == PACKED or (ragged and _packs(chosen)))
    if packs and _can_pack(chosen, embeds, attention_mask, kwargs):
        try:
            return fuse_packed(chosen, embeds, attention_mask, **kwargs)
        except ValueError:
            if attention_of(tower) == PACKED:
                raise
    return chosen(inputs_embeds=embeds, attention_mask=attention_mask, return_dict=True, **kwargs)


def fuse_packed(tower: Any, embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
    """Run a text tower over the tokens that are none of padding.

    Args:
        tower: a transformers text model with ``attn_implementation="packed"`` that takes ``position_ids``.
        embeds: (B, L, D).
        attention_mask: (B, L), 1 for tokens, 0 for padding; rows may have holes.

    Returns:
        The tower's output with (B, L, D) states, zeros at padding.
    """
    there = attention_mask.bool()  # (B, L)
    lengths = there.sum(dim=1)  # (B,)
    flat, positions = embeds[there], (there.cumsum(dim=1) - 1)[there]  # (T, D), (T,)
    longest = int(lengths.max())
    if embeds.device.type == "cpu" and not torch.is_grad_enabled():
        more = in_few_sizes(len(flat)) - len(flat)  # as one more row, which nothing else sees
        flat, positions = nn.functional.pad(flat, (0, 0, 0, more)), nn.functional.pad(positions, (0, more))
        lengths = nn.functional.pad(lengths, (0, 1), value=more)
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # where each row begins, and the end
    kwargs |= {"bounds": bounds, "longest": longest, "return_dict": True}
    token = _end_to_end.set(True)
    try:
        output = tower(inputs_embeds=flat[None], position_ids=positions[None], **kwargs)
    finally:
        _end_to_end.reset(token)
    output.last_hidden_state = _unpacked(output.last_hidden_state, there)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(_unpacked(states, there) for states in output.hidden_states)
    return output


def _can_pack(tower: Any, embeds: Tensor, attention_mask: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a pass can be packed: without attention weights, in a type that the kernel takes, within any window."""
    if kwargs.get("output_attentions") or not attention_mask.numel():
        return False
    if embeds.device.type == "cuda" and embeds.dtype not in _HALF and not torch.is_autocast_enabled("cuda"):
        return False
    if not tower.training and not _packs(tower, embeds):  # dropout would make any numbers differ
        raise ValueError(
            f"A {tower.config.model_type!r} backbone gives other numbers when its rows are packed; "
            "take attn_implementation='sdpa'."
        )
    windows = [size for name in _WINDOWS if (size := getattr(tower.config, name, None))]
    # Some layers have their window in the mask alone, and packed rows have no mask.
    return not windows or int(attention_mask.sum(dim=1).max()) <= min(windows)


@torch.no_grad()
def _packs(tower: Any, like: Tensor | None = None) -> bool:
    """Whether ragged rows come out of the tower packed as they do padded: tried once, with random ones.

    Short ones, for which attention is torch's own: it is packing that is tried.

    Args:
        tower: with packed attention.
        like: embeddings of the width, type and place that it takes; those of its own by default.
    """
    if tower not in _PACKS:
        like = tower.get_input_embeddings().weight if like is None else like
        rows = torch.randn(2, 7, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
        there = torch.ones(2, 7, dtype=torch.long, device=like.device)
        there[1, 4:] = 0
        with torch.autocast(like.device.type, enabled=False):
            padded = tower(inputs_embeds=rows, attention_mask=there, return_dict=True).last_hidden_state
            try:
                packed = fuse_packed(tower, rows, there).last_hidden_state
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, RuntimeError):  # it takes no positions, or has an attention of its own
                packed = torch.full_like(padded, torch.nan)
        difference = ((padded - packed) * there[..., None]).abs().max() / padded.abs().max().clamp_min(1e-12)
        _PACKS[tower] = bool(difference <= (_NEAR_HALF if rows.dtype in _HALF else _NEAR))
    return _PACKS[tower]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    bounds: Tensor | None = None,
    longest: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of N rows that lie end to end; transformers' interface of attention.

    Args:
        module: the layer; ``module.is_causal`` counts where ``is_causal`` is None.
        query: (1, H, T, E).
        key, value: (1, H_kv, T, E), H a multiple of H_kv.
        attention_mask: read only without ``bounds``, in a pass that is not packed.
        scaling: of the scores; E ** -0.5 by default.
        dropout: of the weights.
        is_causal: whether a token sees what comes after it.
        bounds: (N + 1,) int32, where each row begins, and the end; without it this is "sdpa".
        longest: tokens of the longest row.

    Returns:
        (1, T, H, E), and None in the place of weights.

    Raises:
        ValueError: the layer asks for more than attention, such as a sliding window shorter than a row.
    """
    if bounds is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # as "sdpa" takes it
        alone = attention_mask is None and all(kwargs.get(name) is None for name in _BESIDE_A_MASK)
        if alone and not causal and _by_products(query, key, dropout):
            return _products(query, key, value, scaling).transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    _check(kwargs, longest)
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    if query.is_cuda and query.dtype in _HALF and varlen_attn is not None and not dropout:
        flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # (T, heads, E)
        mixed = varlen_attn(
            *flat,
            *(bounds, bounds, longest, longest),
            scale=scaling,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed[None], None
    return _by_runs(query, key, value, bounds, scaling, dropout, causal), None


def _by_runs(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, dropout: float, causal: bool
) -> Tensor:
    """(1, T, H, E) by torch's own attention; neighbours of one length, as sorted items often are, in one call."""
    runs = [(size, len(list(rows))) for size, rows in groupby(bounds.diff().tolist())]
    tokens = [size * rows for size, rows in runs]
    grouped = query.shape[1] != key.shape[1]
    attend: Any = nn.functional.scaled_dot_product_attention
    mixed = []
    cut = (states[0].split(tokens, dim=1) for states in (query, key, value))
    for (size, rows), *parts in zip(runs, *cut, strict=True):
        if size:
            rowwise = [part.unflatten(1, (rows, size)).transpose(0, 1) for part in parts]  # (rows, heads, size, E)
            if not causal and _by_products(rowwise[0], rowwise[1], dropout):
                found = _products(rowwise[0], rowwise[1], rowwise[2], scaling)
            else:
                found = attend(*rowwise, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped)
            mixed.append(found.transpose(1, 2).flatten(0, 1))  # (rows * size, H, E)
    return torch.cat(mixed)[None]


def _by_products(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether `_products` is the faster attention: inference in bfloat16 on a CPU whose oneDNN has products of it.

    There torch's own attention is no faster in bfloat16 than in float32.

    Args:
        query: (B, H, T, E).
        key: (B, H_kv, S, E).
        dropout: of the weights.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or dropout or torch.is_grad_enabled():
        return False
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1] or traced():  # torch's own repeats a single row
        return False
    head = query.shape[2] * key.shape[2]
    return (
        head * query.shape[1] >= _SCORES
        and head * (query.shape[1] // key.shape[1]) <= _SCORES_OF_A_HEAD
        and onednn_pays(torch.bfloat16)
    )


def _products(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """softmax(scaling * Q Kᵀ) V, without a mask; scores and weights are rounded to the inputs' type.

    Args:
        query: (B, H, T, E).
        key: (B, H_kv, S, E), H a multiple of H_kv.
        value: (B, H_kv, S, F).
        scaling: E ** -0.5 by default.

    Returns:
        (B, H, T, F).
    """
    rows, heads, tokens, width = query.shape
    groups = rows * key.shape[1]
    # Heads that share a key attend as if they were more tokens.
    query = query.reshape(groups, heads // key.shape[1] * tokens, width)
    key, value = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    size = max(1, _SCORES_AT_ONCE // (query.shape[1] * key.shape[2]))
    mixed = []
    for some, keys, values in zip(query.split(size), key.split(size), value.split(size), strict=True):
        scores = torch.baddbmm(some.new_empty(1), some, keys, beta=0, alpha=scale)
        mixed.append(scores.softmax(dim=-1) @ values)
    return torch.cat(mixed).view(rows, heads, tokens, value.shape[-1])


def _check(asked: dict[str, Any], longest: int) -> None:
    for name in _UNKNOWN:
        value = asked.get(name)
        if value is not None and not (name == "sliding_window" and value >= longest):
            raise ValueError(f"A layer asks for {name}, which packed attention lacks; take attn_implementation='sdpa'.")


def _unpacked(states: Tensor, there: Tensor) -> Tensor:
    """(1, T or more, D) -> (B, L, D), zeros where (B, L) ``there`` is False."""
    rows = states.new_zeros(*there.shape, states.shape[-1])
    return rows.masked_scatter(there[..., None], states)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None for rows end to end, whose bounds say all; as for "sdpa" otherwise."""
    return None if _end_to_end.get() else sdpa_mask(*args, **kwargs)


# Another copy of this file may be registered already, that of a model's folder: the last one's mask serves both.
_end_to_end: ContextVar[bool] = getattr(AttentionMaskInterface().get(PACKED), "end_to_end", None) or ContextVar(
    "sail_rows_end_to_end", default=False
)
_mask.end_to_end = _end_to_end  # type: ignore[attr-defined]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _mask)
