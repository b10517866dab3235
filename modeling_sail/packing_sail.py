"""Packed attention: the rows of a batch laid end to end, without padding; ``attn_implementation="packed"``.

On CUDA in half precision it is `torch.nn.attention.varlen`, which needs no package beside torch; elsewhere each row
attends by itself, with the same numbers. Unusual: only the fusion backbone has ragged rows; the towers of pictures and
sound run as under "sdpa".
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn as _kernel
except ImportError:  # before torch 2.10
    _kernel = None  # type: ignore[assignment]
varlen_attn: Any = _kernel
if varlen_attn is not None and not {"window_size", "enable_gqa"} <= set(signature(varlen_attn).parameters):
    varlen_attn = None  # its first versions had another interface

PACKED = "packed"
_HALF = (torch.float16, torch.bfloat16)
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")  # what a layer may ask for beside attention itself


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
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (B + 1,)
    positions = (there.cumsum(dim=1) - 1)[there]  # (T,)
    output = tower(
        inputs_embeds=embeds[there][None],
        position_ids=positions[None],
        bounds=bounds,
        longest=int(lengths.max()),
        return_dict=True,
        **kwargs,
    )
    output.last_hidden_state = _unpacked(output.last_hidden_state, there)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(_unpacked(states, there) for states in output.hidden_states)
    return output


def can_pack(tower: Any, embeds: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a pass is to be packed: asked for, without attention weights, and in a type that the kernel takes."""
    if getattr(tower.config, "_attn_implementation", None) != PACKED or kwargs.get("output_attentions"):
        return False
    return embeds.device.type != "cuda" or embeds.dtype in _HALF or torch.is_autocast_enabled("cuda")


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
    return _row_by_row(query, key, value, bounds, scaling, dropout, causal).transpose(1, 2), None


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, dropout: float, causal: bool
) -> Tensor:
    """(1, H, T, E); each row by torch's own attention."""
    sizes = bounds.diff().tolist()
    rows = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    attend: Any = nn.functional.scaled_dot_product_attention
    mixed = [
        attend(*row, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped)
        for row in rows
        if row[0].shape[2]
    ]
    return torch.cat(mixed, dim=2)


def _check(asked: dict[str, Any], longest: int) -> None:
    for name in _UNKNOWN:
        value = asked.get(name)
        if value is not None and not (name == "sliding_window" and value >= longest):
            raise ValueError(f"A layer asks for {name}, which packed attention lacks; take attn_implementation='sdpa'.")


def _unpacked(states: Tensor, there: Tensor) -> Tensor:
    """(1, T, D) -> (B, L, D), zeros where (B, L) ``there`` is False."""
    rows = states.new_zeros(*there.shape, states.shape[-1])
    return rows.masked_scatter(there[..., None], states)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None for rows end to end, whose bounds say all; as for "sdpa" otherwise."""
    batch = kwargs.get("batch_size", args[0] if args else None)
    return None if batch == 1 and kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _mask)
