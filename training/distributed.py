"""Many ranks as one: gather with gradient, for ranks that hold different numbers of rows.

Unusual: `gather` pads to the longest rank and cuts the padding again, so that a rank whose batch lost a row, or has
no picture at all, still meets the others in every collective.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def world_size() -> int:
    """Ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def wait() -> None:
    """Until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def leave(failed: bool = False) -> None:
    """Destroy the process group; call it when nothing holds a trainer any more (an exception under way does).

    A trainer lies in cycles and holds the group (DistributedDataParallel does). Freed by the interpreter's end alone,
    gloo's threads would free tensors when Python is gone: now and then that aborts a process whose work is all done.

    Args:
        failed: this rank ends by an error. NCCL's group is left to the end of the process then: to destroy it is to
            wait for ranks that do not know yet.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if failed and "nccl" in dist.get_backend():
        return
    # A group waits for its threads, and these for Python's lock as they free their last tensors. The collection below
    # holds that lock throughout, a handle on a backend gives it away as it ends: it must be the last to hold one.
    group = dist.group.WORLD
    backends = [group._get_backend(kind) for kind in group._device_types]
    dist.destroy_process_group()
    gc.collect()
    del group
    del backends


def counts_of(count: int, device: torch.device) -> list[int]:
    """What each rank gives as ``count``, in the order of the ranks; every rank must call it."""
    if world_size() == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count], dtype=torch.long, device=device))
    return torch.cat(counts).tolist()


def gather(values: Tensor, counts: list[int], differentiable: bool = True) -> Tensor:
    """(b, ...) of every rank to (sum b, ...), in the order of the ranks, with gradient where ``values`` has one.

    Args:
        values: this rank's rows.
        counts: rows of each rank, from `counts_of`.
        differentiable: whether the ranks meet in the backward too. They must agree on it: a rank whose own rows need no
            gradient, as it has no such row, still has to hand on the others'.

    Returns:
        The same on every rank. Its gradient is the sum over the ranks' losses.
    """
    if world_size() == 1:
        return values
    longest = max(counts)
    padding = values.new_zeros(longest - len(values), *values.shape[1:])
    padded = torch.cat([values, padding]).contiguous()
    if differentiable and torch.is_grad_enabled():
        parts = all_gather(padded if padded.requires_grad else padded.requires_grad_())
    else:
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def largest(value: int, device: torch.device) -> int:
    """The largest of what the ranks give."""
    return max(counts_of(value, device))


def mean_over_ranks(values: Tensor) -> Tensor:
    """The ranks' mean of a tensor without gradient."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()
