"""Encoding items: ours beside the fixed-batch path of the same model, beside other models and the machine's own peak.

    python -m modeling_sail.evaluation.benchmarks encode --model build/mini --bfloat16

Items are in memory before the clock starts; what is timed is all that a side does with them. Vectors are compared with
those of the fixed batches: a faster wrong answer is no answer. All sides of a kind run in turn in one process; each
setting of the allocator, and each kind, has a process of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ... import packing_sail
from ...encode_job import require_folder
from ...processing_sail import layout_of
from .child import ALLOCATORS, run_child
from .figures import figure
from .items import KINDS, items_for
from .models import FIXED, ONE_PASS, as_encoder, embed, encoded, fixed_batches, module_of, plainly
from .peak import flops_of, linear_seconds, matrix_peak
from .peers import CLIP_AND_CLAP, GEMMA, at_rate, clip_and_clap, embedding_gemma
from .turns import in_turn, seconds_of

SLOW_ITEMS = 2  # of a peer that takes tens of seconds for each
UNIT = "items/s"
ENCODE = "SentenceTransformer.encode"
PASSES = "passes cut by tokens over all items"
PADDED = f"{ENCODE}, rows padded"
PEERS = {
    ENCODE: f"SentenceTransformer.encode, one pass a batch of {FIXED}, plain kernels",
    PASSES: f"fixed batches of {FIXED}, as they come, plain kernels",
}


def encode_benchmark(
    model: Path,
    items: int,
    rounds: int,
    allocators: Mapping[str, Mapping[str, str]] = ALLOCATORS,
    kinds: Sequence[str] = KINDS,
    bfloat16: bool = False,
    peers: bool = True,
    slow_peers: bool = False,
) -> Iterator[dict[str, Any]]:
    """Figures of first use, of items/s by kind, and of the linear layers' share of the matrix-product peak.

    Args:
        model: folder of a model.
        items: of a kind.
        rounds: that are counted.
        allocators: environments by name; all is measured in each.
        kinds: of `items.KINDS`.
        bfloat16: also ours in bfloat16.
        peers, slow_peers: beside CLIP + CLAP, and beside EmbeddingGemma 2, where items are full.

    Raises:
        ValueError: no model in the folder, no items.
    """
    require_folder(model)
    if items < 1:
        raise ValueError(f"--items {items}: at least one is needed.")
    common = {"model": str(model), "items": items, "rounds": rounds, "bfloat16": bfloat16}
    for allocator, environment in allocators.items():
        child = partial(run_child, __spec__.name, environment=environment)
        yield from first_figures(model, child, allocator)
        for kind in kinds:
            more = {"kind": kind, "peers": peers, "slow_peers": slow_peers}
            yield from _named(child({"task": "kind", **common, **more})["figures"], allocator)
        if "text" in kinds:
            yield from _named(child({"task": "peak", **common})["figures"], allocator)


def _named(figures: list[dict[str, Any]], allocator: str) -> Iterator[dict[str, Any]]:
    for one in figures:
        yield one | {"case": f"{one['case']}, allocator: {allocator}"}


# --- first use ------------------------------------------------------------------------------------------------------


def first_figures(model: Path, child: Callable[..., Any], allocator: str) -> Iterator[dict[str, Any]]:
    """Seconds of loading, and of the first query after it, in new processes with either kernels."""
    ours, plain = (child({"task": "first", "model": str(model), "plain": plain}) for plain in (False, True))
    for name, key in (("loading", "loading"), ("first query after loading", "query")):
        yield figure("encode", f"first use, allocator: {allocator}", name, "s", ours[key], plain[key], "plain kernels")


def first_use(model: str, plain: bool) -> dict[str, float]:
    """In a process of its own."""
    begun = time.perf_counter()
    encoder = as_encoder(Path(model))
    loading = time.perf_counter() - begun
    query = partial(encoded, encoder, ["one short query"])
    return {"loading": loading, "query": seconds_of(plainly(query) if plain else query)}


# --- items a second -------------------------------------------------------------------------------------------------


def kind_figures(
    model: str, items: int, rounds: int, kind: str, bfloat16: bool = False, peers: bool = True, slow_peers: bool = False
) -> Iterator[dict[str, Any]]:
    """All sides of one kind of items, in this process."""
    encoder = as_encoder(Path(model))
    given = items_for(module_of(encoder), items, kind)
    sides = own_sides(encoder, given)
    if bfloat16:
        half = own_sides(as_encoder(Path(model), dtype=torch.bfloat16), given)
        sides |= {f"bfloat16, {name}": side for name, side in half.items()}
    sides[PADDED] = padded(sides[ENCODE])
    others: dict[str, Callable[[list[Any]], Tensor]] = {}
    if kind == "omni-full" and all(field in given[0] for field in ("image", "audio")):
        others = {CLIP_AND_CLAP: clip_and_clap()} if peers else {}
    sides |= {name: partial(run, at_rate(given)) for name, run in others.items()}
    turns = in_turn(sides, rounds)
    speed = {name: items / seconds for name, seconds in turns.seconds.items()}
    line = partial(figure, "encode", kind)
    for ours, peer in PEERS.items():
        yield line(f"{ours}, float32", UNIT, speed[ours], speed[peer], peer)
        difference = float((turns.results[ours] - turns.results[peer]).abs().max())
        yield line(f"{ours}: largest difference of vectors", "", difference, None, peer)
    yield line(f"{ENCODE}, float32", UNIT, speed[ENCODE], speed[PADDED], PADDED)
    difference = float((turns.results[PADDED] - turns.results[ENCODE]).abs().max())
    yield line(f"{ENCODE}: largest difference of vectors", "", difference, None, PADDED)
    for name in others:
        yield line(f"{ENCODE}, float32", UNIT, speed[ENCODE], speed[name], name)
    yield from _whole_figures(line, module_of(encoder), given, speed[ENCODE])
    if bfloat16:
        yield from _half_figures(line, speed, turns.results)
    yield line("spread of the rounds, over the median", "", turns.spread, None, "")
    if slow_peers and kind == "omni-full":
        yield from _slow_figures(line, given, speed, bfloat16)


def own_sides(encoder: Any, given: list[Any]) -> dict[str, Callable[[], Tensor]]:
    """The same model by our ways and by their peers'."""
    module = module_of(encoder)
    loaded, _ = module.processor.load(given)
    return {
        ENCODE: lambda: encoded(encoder, given),
        PEERS[ENCODE]: plainly(lambda: encoded(encoder, given, batch_size=FIXED, token_budget=ONE_PASS)),
        PASSES: lambda: embed(module, loaded, module.processor.batches(loaded)),
        PEERS[PASSES]: plainly(lambda: embed(module, loaded, fixed_batches(module, loaded))),
    }


def _whole_figures(line: Callable[..., Any], module: Any, given: list[Any], speed: float) -> Iterator[dict[str, Any]]:
    """What an item takes, and how near all of it comes to the machine's peak: what is out of reach is seen here."""
    loaded, _ = module.processor.load(given)
    work = partial(embed, module, loaded, list(module.processor.batches(loaded)))
    each = flops_of(work, module.model.text_tower)["all"] / len(loaded) / 1e9
    peak = max(matrix_peak(torch.float32).values())
    yield line("operations", "GFLOP/item", each, None, "")
    yield line(f"all operations of {ENCODE}, float32", "GFLOP/s", each * speed, peak, "matrix-product peak")


def padded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work with the backbone's rows padded, all other kernels as they are."""

    def run() -> Any:
        with patch.object(packing_sail, "_packs", lambda *_: False):
            return work()

    return run


def _half_figures(line: Callable[..., Any], speed: Mapping[str, float], vectors: Mapping[str, Tensor]) -> Iterator[Any]:
    """bfloat16 beside float32 and bfloat16 in fixed batches, and how far it is from float32."""
    for ours, fixed in PEERS.items():
        for peer in (fixed, f"bfloat16, {fixed}"):
            yield line(f"{ours}, bfloat16", UNIT, speed[f"bfloat16, {ours}"], speed[peer], peer)
    exact = vectors[ENCODE]
    for name in (ENCODE, PEERS[ENCODE]):
        half = vectors[f"bfloat16, {name}"]
        cosine = (half * exact).sum(dim=1)
        said = "bfloat16" if name == ENCODE else "bfloat16, plain kernels"
        yield line(f"{said}: lowest cosine with float32", "", float(cosine.min()), None, "")
        yield line(f"{said}: mean cosine with float32", "", float(cosine.mean()), None, "")
        yield line(f"{said}: farthest from float32", "", float((half - exact).abs().max()), None, "")


def _slow_figures(
    line: Callable[..., Any], given: list[Any], speed: Mapping[str, float], bfloat16: bool
) -> Iterator[dict[str, Any]]:
    """Beside what takes too long for all items: as many as `SLOW_ITEMS`, after one that is not counted."""
    few = given[:SLOW_ITEMS]
    types = {"float32": ENCODE} | ({"bfloat16": f"bfloat16, {ENCODE}"} if bfloat16 else {})
    for name, ours in types.items():
        run = embedding_gemma(getattr(torch, name))
        run(few[:1])
        peer = len(few) / seconds_of(partial(run, few))
        yield line(f"{ENCODE}, {name}", UNIT, speed[ours], peer, f"{GEMMA}, {name}")


# --- beside the machine ---------------------------------------------------------------------------------------------


def peak_figures(model: str, items: int, rounds: int, bfloat16: bool = False) -> Iterator[dict[str, Any]]:
    """GFLOP/s of the machine, of the linear layers in a pass over texts, and of the pass as a whole."""
    for dtype in (torch.float32, torch.bfloat16)[: 1 + bfloat16]:
        name = str(dtype).removeprefix("torch.")
        peaks = matrix_peak(dtype)
        peak = max(peaks.values())
        for library, found in peaks.items():
            yield figure("encode", f"the machine, {name}", "matrix-product peak", "GFLOP/s", peak, found, library)
        module = module_of(as_encoder(Path(model), dtype=dtype))
        loaded, _ = module.processor.load(items_for(module, items, "text"))
        batches = list(module.processor.batches(loaded))
        work = partial(embed, module, loaded, batches)
        tokens = sum(len(module.processor.sequence(layout_of(item))[0]) for item in loaded)
        total = sum(batch["attention_mask"].numel() for _, batch in batches)
        yield figure("encode", f"text, {name}", "tokens that are no padding, share", "", tokens / total, None, "")
        flops = {
            "ours": flops_of(work, module.model.text_tower)["linears"] / 1e9,
            "plain kernels": flops_of(work)["linears"] / 1e9,
        }
        turns = in_turn({"ours": work, "plain kernels": plainly(work)}, rounds)
        for side, seconds in turns.seconds.items():
            inside = linear_seconds(work, plain=side != "ours")
            case = f"text, {name}, {side}"
            yield figure(
                "encode", case, "linear layers alone", "GFLOP/s", flops[side] / inside, peak, "matrix-product peak"
            )
            yield figure(
                "encode", case, "linear layers in all", "GFLOP/s", flops[side] / seconds, peak, "matrix-product peak"
            )


def _figures(**settings: Any) -> dict[str, Any]:
    task = {"kind": kind_figures, "peak": peak_figures}[settings.pop("task")]
    return {"figures": list(task(**settings))}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    task = asked.pop("task")
    print(json.dumps(first_use(**asked) if task == "first" else _figures(task=task, **asked)))
