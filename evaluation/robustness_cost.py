"""One representation's cost, as `robustness.cost_of` runs it: a process of its own, so that its peak is its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ..encode_job import load_module
from .benchmarks.child import measured
from .robustness import COST_ITEMS, encode_items, held_out_rows, items_of

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    module = load_module(Path(settings["model"]))
    items = list(items_of(held_out_rows()[:COST_ITEMS]).values())
    work = encode_items(module, items, settings["parts"])
    with torch.inference_mode():
        work()  # the first pass loads what is loaded once
        print(json.dumps({**measured(work, 3), "items": len(items)}))
