"""Where the time of an item goes: by part of the way from a file to a vector, and by operator within each part.

    python -m modeling_sail.evaluation.benchmarks profile --model build/mini

Unusual: parts are timed by standing in for the methods that are the parts, not by hooks: a module with hooks is not
given its faster twin, and another program would be measured. A part's time is its own, without that of parts inside.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

from ...encode_job import require_folder
from .figures import figure
from .items import KINDS, items_for, write_media
from .models import as_encoder, check_device, encoded, module_of, plainly
from .turns import in_turn, synchronize

# The methods that are the parts: of the processor, and of the model.
PROCESSOR = {
    "load": "load and decode",
    "sequence": "tokenise",
    "_pictures": "pixel values",
    "_windows": "log-mel",
    "pad": "padding",
}
MODEL = {
    "vision_features": "vision tower",
    "_encode_vision": "perceiver",
    "audio_features": "audio tower",
    "_encode_audio": "audio adapter",
    "_fuse": "fusion backbone",
    "_pool": "pooling",
}
REST = "rest"
PARTS = (*PROCESSOR.values(), *MODEL.values(), REST)

TOP = 3  # operators of a part that are named
LEAST = 0.01  # of the whole: smaller parts have no operators named


class Clock:
    """Seconds by part. A part within another one stops the other's time."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time spent inside is this part's."""
        self._turn()
        self._open.append(name)
        with record_function(name):
            yield
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def stood_in(module: Any, clock: Clock) -> Iterator[None]:
    """Within it each method of `PROCESSOR` and `MODEL` tells the clock when it runs."""
    places = [(module.processor, PROCESSOR), (module.model, MODEL)]

    def timed(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            with clock.part(name):
                return method(*given, **named)

        return run

    for owner, names in places:
        for method, name in names.items():
            object.__setattr__(owner, method, timed(getattr(owner, method), name))
    try:
        yield
    finally:
        for owner, names in places:
            for method in names:
                object.__delattr__(owner, method)


def seconds_by_part(module: Any, work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each part of one run; `REST` is what is in none of them."""
    clock = Clock()
    with stood_in(module, clock), clock.part(REST):
        work()
    return {name: clock.seconds[name] for name in PARTS}


def operators_by_part(module: Any, work: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Seconds of torch's operators themselves (without those that they call) in each part, by torch's profiler."""
    clock, found = Clock(), defaultdict[str, Counter[str]](Counter)
    with profile() as profiler, stood_in(module, clock), clock.part(REST):
        work()
    cuda = torch.cuda.is_available() and module.model.device.type == "cuda"
    for event in profiler.events() or ():
        part = _part_of(event)
        if part is not None and event.name not in PARTS:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[part][event.name] += own / 1e6
    return {part: dict(operators) for part, operators in found.items()}


def _part_of(event: Any) -> str | None:
    """The innermost part that an operator ran in."""
    while event is not None:
        if event.name in PARTS:
            return event.name
        event = event.cpu_parent
    return None


def parts_benchmark(
    model: Path, items: int, rounds: int, kinds: Sequence[str] = KINDS, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Figures by kind of items: each part, its share and its operators, with the faster kernels and with plain ones.

    Args:
        model: folder of a model.
        items: of a kind; their pictures and sounds are files.
        rounds: of which each part's median is taken.
        kinds: of `items.KINDS`.
        device: where the model runs.

    Raises:
        ValueError: no model in the folder, no such device, no items.
    """
    require_folder(model)
    check_device(device)
    encoder = as_encoder(model, device)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            given = write_media(items_for(module_of(encoder), items, kind), Path(folder))
            yield from _kind_figures(encoder, given, rounds, f"{kind}, {device}")


def _kind_figures(encoder: Any, given: list[Any], rounds: int, case: str) -> Iterator[dict[str, Any]]:
    module, line = module_of(encoder), partial(figure, "profile", case)
    work: dict[str, Callable[[], Any]] = {"ours": lambda: encoded(encoder, given)}
    work["plain"] = plainly(work["ours"])
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in work}

    def noted(name: str) -> Callable[[], None]:
        return lambda: measured[name].append(seconds_by_part(module, work[name]))

    turns = in_turn({**work, **{f"{name}, parts": noted(name) for name in work}}, rounds)
    # The median round by its whole, so that the parts are of one run and sum to it.
    ours, plain = (_middle(measured[name][1:]) for name in work)
    whole, peer = sum(ours.values()), sum(plain.values())
    yield line("whole", "ms/item", 1e3 * whole / len(given), 1e3 * peer / len(given), "plain kernels")
    for part in PARTS:
        if ours[part] or plain[part]:
            each = (1e3 * found[part] / len(given) for found in (ours, plain))
            yield line(part, "ms/item", *each, "plain kernels")
            yield line(f"{part}, share", "", ours[part] / whole, None, "")
    yield line("timing by part costs, over the whole", "", whole / turns.seconds["ours"], None, "")
    difference = float((turns.results["ours"] - turns.results["plain"]).abs().max())
    yield line("largest difference of vectors", "", difference, None, "plain kernels")
    yield from _operator_figures(line, module, work, ours, len(given))


def _middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    return sorted(rounds, key=lambda parts: sum(parts.values()))[len(rounds) // 2]


def _operator_figures(
    line: Callable[..., Any],
    module: Any,
    work: Mapping[str, Callable[[], Any]],
    seconds: Mapping[str, float],
    count: int,
) -> Iterator[dict[str, Any]]:
    """The operators that take most of each part that counts; the profiler makes all of them somewhat slower."""
    ours, plain = (operators_by_part(module, run) for run in work.values())
    for part in PARTS:
        if seconds[part] < LEAST * sum(seconds.values()):
            continue
        top = sorted(ours.get(part, {}).items(), key=lambda pair: -pair[1])[:TOP]
        for name, found in top:
            peer = plain.get(part, {}).get(name)
            peer = 1e3 * peer / count if peer else None
            yield line(f"{part}: {name}", "ms/item", 1e3 * found / count, peer, "plain kernels" if peer else "")
