"""Worker processes that prepare windows for the model; they may die, the job does not.

Unusual: each process has a pipe of its own and one window at a time, so it is known what a process died of. The window
is tried again, then its items one by one; an item that ends its process twice becomes a row with that reason. (An
executor of the standard library waits for ever for the rest of a result whose sender was killed.) Results come in the
order of the windows, and no more windows are held than there are workers and two.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from .encode_window import Prepared, Preparer, Window

TRIALS = 2  # ends of a process that an item is forgiven less one: the first may have come from outside
POISON = "item: the process that read it was killed, twice: by its decoder, or for want of memory"
STARTS = 5  # of a process that ends before it has begun

Wanted = tuple[Window, bool]


@dataclass(frozen=True)
class PreparerSettings:
    """What a process needs to make its `Preparer`."""

    model: Path
    instruction: str
    token_budget: int

    def make(self) -> Preparer:
        """Load the processor."""
        processor, config = AutoProcessor.from_pretrained(self.model), AutoConfig.from_pretrained(self.model)
        return Preparer(processor, self.instruction, self.token_budget, config.max_frames)


def default_workers(device: str) -> int:
    """Half of the cores where the model computes on the others, all but one where it has a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // 2 if device == "cpu" else cores - 1))


class Workers:
    """Prepares windows, with ``count`` processes or, with 0, in this one. To be used in a ``with`` block."""

    def __init__(self, settings: PreparerSettings, count: int) -> None:
        if count < 0:
            raise ValueError(f"workers={count} must not be below 0; 0 decodes in the main process.")
        self.settings = settings
        self.count = count
        self._workers = [_Worker(settings) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        if self._workers:
            _context()
            forkserver.ensure_running()  # imports meanwhile what the processes need
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.close()

    def prepared(self, windows: Iterable[Wanted]) -> Iterator[tuple[Window, Prepared | None]]:
        """Windows in order, prepared where they come with True, and None in place of the others' tensors."""
        if self.count == 0:
            prepare = self.settings.make()
            yield from ((window, prepare(window.items) if wanted else None) for window, wanted in windows)
            return
        waiting: deque[tuple[Window, Future[Prepared] | None]] = deque()
        threads = ThreadPoolExecutor(self.count)  # they only wait for the processes
        try:
            for window, wanted in windows:
                waiting.append((window, threads.submit(self._prepare, window) if wanted else None))
                if len(waiting) > self.count + 1:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, window: Window) -> Prepared:
        worker = self._idle.get()
        try:
            return _first_answer(worker, window.items) or self._without_poison(worker, window)
        finally:
            self._idle.put(worker)

    def _without_poison(self, worker: _Worker, window: Window) -> Prepared:
        """A window that ended its process, with the items that do so by themselves left out."""
        bad = {place: POISON for place, item in enumerate(window.items) if not _first_answer(worker, [item])}
        found = _first_answer(worker, window.without(bad).items)
        if found is None:
            raise RuntimeError(
                f"the process that decodes {len(window.items)} items from {window.names[0]!r} on is killed, though not "
                "by one of them alone: most likely memory is short. Run again with fewer --workers."
            )
        return found


def _result(window: Window, future: Future[Prepared] | None) -> tuple[Window, Prepared | None]:
    return window, None if future is None else future.result()


def _first_answer(worker: _Worker, items: list[Any]) -> Prepared | None:
    """What a process makes of items; None where it died of them each time."""
    for _ in range(TRIALS):
        try:
            return worker.ask(items)
        except (EOFError, OSError):
            continue
    return None


def _context() -> Any:
    """Of processes that are copies of one that has imported what they need: they start at once and share its memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Worker:
    """A process that is started when it is first asked, and again after it died."""

    def __init__(self, settings: PreparerSettings) -> None:
        self.settings = settings
        self._process: Any = None
        self._pipe: Any = None
        self._closed = False

    def ask(self, items: list[Any]) -> Prepared:
        """Raises EOFError or OSError where the process died of it; RuntimeError where none can be started."""
        try:
            if self._process is None:
                self._start()
            self._pipe.send(items)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._end()
            raise

    def _start(self) -> None:
        context = _context()
        for _ in range(STARTS):
            if self._closed:
                raise RuntimeError("the job is over")
            try:
                self._pipe, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self.settings), daemon=True)
                process.start()
            except OSError as error:  # the machine's fault: no item is to be blamed for it
                raise RuntimeError(
                    f"a worker process cannot be started ({error}); take fewer --workers, or 0"
                ) from error
            self._process = process
            theirs.close()  # no other may hold that end, or the process's death would not be noticed
            if self._closed:  # since the look above
                self._process.kill()
            try:
                reason = self._pipe.recv()
            except (EOFError, OSError):
                self._end()
                continue
            if reason:
                raise RuntimeError(f"a worker process cannot begin: {reason}")
            return
        raise RuntimeError(f"a worker process was killed {STARTS} times before it began; run again with --workers 0")

    def _end(self) -> None:
        process, self._process = self._process, None
        self._pipe.close()
        process.kill()
        process.join()

    def close(self) -> None:
        """End the process, whatever it is doing; the thread that waits for it sees its pipe's end."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()


# --- in a worker process --------------------------------------------------------------------------------------------


def _serve(pipe: Connection, settings: PreparerSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C reaches all; the main process ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        prepare = settings.make()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send("")
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        pipe.send(prepare(items))


def _end_with_parent() -> None:
    """A killed parent cannot end us: its pipe, which nothing is ever sent through, ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
