"""Worker processes that prepare windows for the model; they may die, the job does not.

Unusual: each process has a pipe of its own and one window at a time, so it is known what a process died of. The window
is tried again, then its items one by one; an item that ends its process twice becomes a row with that reason. (An
executor of the standard library waits for ever for the rest of a result whose sender was killed.) A process says when
it is done with an item; one that is silent for too long is killed, and the item that it was at, the second time, is
such a row, too. Results come in the order of the windows, and no more windows are held than there are workers and two.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import torch
from transformers import AutoProcessor
from transformers.utils import logging

from .encode_window import Prepared, Preparer, Window

TRIALS = 2  # ends of a process that an item is forgiven less one: the first may have come from outside
POISON = "item: the process that read it was killed, twice: by its decoder, or for want of memory"
STUCK = "item: reading it did not end within {:g} seconds, twice; if it is only slow, raise --item-seconds"
ITEM_SECONDS = 300.0  # of silence: far more than a sound or video takes
END_SECONDS = 10.0
STARTS = 5  # of a process that ends before it has begun

Wanted = tuple[Window, bool]


class _Stuck(Exception):
    """A process was silent for too long, at item number ``place``."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class _Refused(Exception):
    """A process could not prepare a window, and said why."""


@dataclass(frozen=True)
class PreparerSettings:
    """What a process needs to make its `Preparer`."""

    model: Path
    instruction: str
    token_budget: int

    def make(self) -> Preparer:
        """Load the processor."""
        return Preparer(AutoProcessor.from_pretrained(self.model), self.instruction, self.token_budget)


def default_workers(device: str) -> int:
    """Half of the cores where the model computes on the others, all but one where it has a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // 2 if device == "cpu" else cores - 1))


class Workers:
    """Prepares windows. To be used in a ``with`` block.

    Args:
        settings: what a process needs.
        count: processes; 0 prepares in this one, where nothing can be killed.
        item_seconds: that an item may take.
    """

    def __init__(self, settings: PreparerSettings, count: int, item_seconds: float = ITEM_SECONDS) -> None:
        self.settings = settings
        self.count = count
        self.item_seconds = item_seconds
        self._workers = [_Worker(settings, item_seconds) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        if self._workers:
            _context()
            try:
                forkserver.ensure_running()  # imports meanwhile what the processes need
            except OSError as error:
                raise _no_process(error) from error
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.close()

    def prepared(self, windows: Iterable[Wanted]) -> Iterator[tuple[Window, Prepared | None]]:
        """Windows in order, prepared where they come with True, and None in place of the others' tensors.

        Raises:
            RuntimeError: a window cannot be prepared though its items can, or no process can be started.
        """
        if self.count == 0:
            prepare = self.settings.make()
            yield from ((window, _prepared_here(prepare, window) if wanted else None) for window, wanted in windows)
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
        worker, stuck = self._idle.get(), Counter[int]()
        try:
            while True:
                bad = {place: STUCK.format(self.item_seconds) for place, times in stuck.items() if times >= TRIALS}
                left = window.without(bad)
                try:
                    return _first_answer(worker, left.items) or _without_poison(worker, left)
                except _Stuck as error:
                    stuck[error.place] += 1
                    if stuck[error.place] > TRIALS:  # none of its items is to blame
                        raise _cannot(window, f"took more than {self.item_seconds:g} seconds to be joined") from error
        except _Refused as error:
            raise _cannot(window, str(error)) from error
        finally:
            self._idle.put(worker)


def _prepared_here(prepare: Preparer, window: Window) -> Prepared:
    try:
        return prepare(window.items)
    except MemoryError as error:
        raise RuntimeError(f"memory is short for {len(window.items)} items from {window.names[0]!r} on") from error
    except Exception as error:
        raise _cannot(window, _told(error)) from error


def _without_poison(worker: _Worker, window: Window) -> Prepared:
    """A window that ended its process, with the items that do so by themselves left out."""
    bad = {place: POISON for place, item in enumerate(window.items) if not _alone(worker, item, place)}
    found = _first_answer(worker, window.without(bad).items)
    if found is None:
        raise RuntimeError(
            f"the process that decodes {len(window.items)} items from {window.names[0]!r} on is killed, though not "
            "by one of them alone: most likely memory is short. Run again with fewer --workers."
        )
    return found


def _cannot(window: Window, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{len(window.items)} items from {window.names[0]!r} on cannot be prepared together ({reason}), though each of "
        "them can be read: the model's processor does not fit them, or has a fault."
    )


def _no_process(error: OSError) -> RuntimeError:
    """The machine's fault: no item is to be blamed for it."""
    place = tempfile.gettempdir()
    short = f"set TMPDIR to a shorter path than its {len(place)} characters"
    mend = short if "path too long" in str(error) else "take fewer --workers"
    return RuntimeError(f"a worker process cannot be started ({error}); {mend}, or --workers 0")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _result(window: Window, future: Future[Prepared] | None) -> tuple[Window, Prepared | None]:
    return window, None if future is None else future.result()


def _alone(worker: _Worker, item: Any, place: int) -> Prepared | None:
    try:
        return _first_answer(worker, [item])
    except _Stuck as error:
        raise _Stuck(place) from error


def _first_answer(worker: _Worker, items: list[Any]) -> Prepared | None:
    """What a process makes of items; None where it died of them each time.

    Raises:
        _Stuck: it did not come to an end. _Refused: it says why it cannot.
    """
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

    def __init__(self, settings: PreparerSettings, item_seconds: float) -> None:
        self.settings = settings
        self.item_seconds = item_seconds
        self._process: Any = None
        self._pipe: Any = None
        self._closed = False

    def ask(self, items: list[Any]) -> Prepared:
        """Raises as `_first_answer`; EOFError or OSError where the process died; RuntimeError where none can start."""
        try:
            if self._process is None:
                self._start()
            self._pipe.send(items)
            answer = self._answer()
        except (EOFError, OSError, _Stuck):
            self._end()
            raise
        if isinstance(answer, str):
            raise _Refused(answer)
        return answer

    def _answer(self) -> Prepared | str:
        """What comes after a None for each item that is done."""
        place = 0
        while self._pipe.poll(self.item_seconds):
            answer = self._pipe.recv()
            if answer is not None:
                return answer
            place += 1
        raise _Stuck(place)

    def _start(self) -> None:
        context = _context()
        for _ in range(STARTS):
            if self._closed:
                raise RuntimeError("the job is over")
            try:
                self._pipe, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self.settings), daemon=True)
                process.start()
            except OSError as error:
                raise _no_process(error) from error
            self._process = process
            theirs.close()  # no other may hold that end, or the process's death would not be noticed
            if self._closed:  # since the look above
                self._process.kill()
            try:
                if not self._pipe.poll(max(self.item_seconds, ITEM_SECONDS)):
                    raise TimeoutError
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
        process.join(END_SECONDS)  # not for ever: what waits for a dead disk is not even ended by SIGKILL

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
        pipe.send(_told(error))
        return
    pipe.send("")
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        try:
            answer: Prepared | str = prepare(_reported(items, pipe))
        except MemoryError:  # as if the system had killed us for it
            return
        except Exception as error:
            answer = _told(error)
        pipe.send(answer)


def _reported(items: list[Any], pipe: Connection) -> Iterator[Any]:
    """Items, and a sign of life when the next one is asked for."""
    for item in items:
        yield item
        pipe.send(None)


def _end_with_parent() -> None:
    """A killed parent cannot end us: its pipe, which nothing is ever sent through, ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
