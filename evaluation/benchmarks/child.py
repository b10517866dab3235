"""One measurement in a process of its own: seconds, and how far memory rose above what was there before.

Unusual: a child's peak is reset through /proc just before the work, so inputs and imports are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# glibc that keeps what it was given: without it, large temporaries cost page faults and little else is measured.
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc's default": {},
    "glibc keeps its memory": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}

# glibc that hands freed memory back at once: slower, but the peak is then what was in use, without its fragments.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def run_child(module: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a benchmark's module prints as its last line, run as ``python -m module '<settings as JSON>'``.

    Raises:
        RuntimeError: the child failed; with the end of what it said.
    """
    command = [sys.executable, "-m", module, json.dumps(dict(settings))]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {dict(settings)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measured(work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of each round, and bytes of memory above the start at its peak."""
    before = _reset_peak()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds, "extra_bytes": _peak() - before}


def _reset_peak() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; these benchmarks need Linux.")
