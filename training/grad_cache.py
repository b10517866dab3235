"""Cached gradients: a contrastive batch larger than memory, in micro-batches (GradCache, arXiv 2101.06983).

The batch is encoded without gradients, the loss gives the gradient of every embedding, and each micro-batch is encoded
again to take it on. Unusual: micro-batches are cut by tokens over length-sorted items, so there is little padding, and
an item takes its own pictures and sounds along, so modalities may be mixed in any way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Padded tokens of a pass where nothing else bounds it: large enough to be efficient, small enough for a cache.
PASS_TOKENS = 2048

# A picture or window costs its tower about as much as this many tokens cost the backbone.
MEDIA_TOKENS = 64

# Which rows of a flat tensor belong to which item.
OWNED = {
    "image_owner": ("pixel_values", "image_features", "frame_positions"),
    "audio_owner": ("input_features", "audio_features"),
}


def micro_batches(items: Mapping[str, Tensor], token_budget: int) -> list[Tensor]:
    """Places of items, the longest first, cut so that no micro-batch costs more than the budget.

    The cost is rows times the longest row, and `MEDIA_TOKENS` for every picture and window. One item above the budget
    is a micro-batch of its own.

    Args:
        items: the model's keyword arguments for M items.
        token_budget: padded tokens of a micro-batch.

    Raises:
        ValueError: the budget is not above 0.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} must be a number of tokens above 0.")
    lengths = items["attention_mask"].sum(dim=1).cpu()
    media = torch.zeros_like(lengths)
    for owner in OWNED:
        if owner in items:
            media += torch.bincount(items[owner].cpu(), minlength=len(lengths)) * MEDIA_TOKENS
    cuts: list[list[int]] = []
    longest = extra = 0
    for place in lengths.argsort(descending=True, stable=True).tolist():
        length, more = int(lengths[place]), int(media[place])
        if not cuts or (len(cuts[-1]) + 1) * longest + extra + more > token_budget:
            cuts.append([])
            longest, extra = length, 0
        cuts[-1].append(place)
        extra += more
    return [torch.tensor(cut) for cut in cuts]


def select(items: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    """The model's keyword arguments for some of the items: padding cut to the longest, media taken along.

    Args:
        items: keyword arguments for M items, padded at the end.
        places: (m,) which ones, in the order wanted.
    """
    owned = {name for names in OWNED.values() for name in names} | set(OWNED)
    places = places.to(items["attention_mask"].device)
    length = int(items["attention_mask"][places].sum(dim=1).max()) if len(places) else 0
    part = {name: value[places, :length] for name, value in items.items() if name not in owned}
    for owner_name, names in OWNED.items():
        if owner_name not in items:
            continue
        owner = items[owner_name]
        new_row = torch.full((len(items["attention_mask"]),), -1, device=owner.device)
        new_row[places] = torch.arange(len(places), device=owner.device)
        rows = new_row[owner]
        order = rows.argsort(stable=True)  # owners must rise; within an item pictures keep their order
        order = order[rows[order] >= 0]
        if len(order):
            part[owner_name] = rows[order]
            part |= {name: items[name][order] for name in names if name in items}
    return part


class Replay:
    """Random states before each micro-batch, so that the second pass drops the same units as the first.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: list[tuple[Tensor, Tensor | None]] = []

    def record(self) -> None:
        """Remember the state before a micro-batch of the first pass."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self.states.append((torch.get_rng_state(), cuda))

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        """Run inside with the state of a micro-batch; the state from before comes back."""
        devices: Sequence[torch.device] = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            cpu, cuda = self.states[index]
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            yield
