"""Does `torch.compile` pay? Each tower by the model's own kernels, as it is written, and compiled.

    python -m modeling_sail.evaluation.benchmarks compile --model build/mini

The shapes are fixed, which is the best case for a compiler: ragged items compile anew or run as dynamic shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...encode_job import require_folder
from ...kernels_sail import run_tower
from ...packing_sail import run_backbone
from .figures import figure
from .items import items_for
from .models import as_encoder, check_device, module_of
from .turns import in_turn, seconds_of

COMPILED = "torch.compile"
FIELD = "last_hidden_state"


def compile_benchmark(
    model: Path, items: int, rounds: int, device: str = "cpu", dtypes: Sequence[str] = ("float32",)
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a pass of each tower over full items, seconds of the compiled tower's first call, differences.

    Args:
        model: folder of a model.
        items: of a pass, each with a picture, a sound and a title.
        rounds: that are counted.
        device: where the model runs.
        dtypes: names of torch's types.

    Raises:
        ValueError: no model in the folder, no such device, no items, nothing that compiles here.
    """
    require_folder(model)
    check_device(device)
    if items < 1:
        raise ValueError(f"--items {items}: at least one is needed.")
    for name in dtypes:
        module = module_of(as_encoder(model, device, getattr(torch, name)))
        for tower, (network, ours, plain) in _passes(module, items).items():
            line = partial(figure, "compile", f"{tower}, {items} items, {name}, {device}")
            yield from _tower_figures(line, network, ours, plain, rounds)


def _passes(module: Any, items: int) -> dict[str, tuple[Any, Callable[[], Tensor], Callable[[Any], Tensor]]]:
    """By tower that the model has: the network, a pass with our kernels, and one of any such network as it is."""
    model = module.model
    loaded, _ = module.processor.load(items_for(module, items, "omni-full"))
    batch = module.processor.collate(loaded).to(model.device)
    found: dict[str, Any] = {}
    for name, key in (("vision tower", "pixel_values"), ("audio tower", "input_features")):
        if key in batch:
            tower, values = getattr(model, name.replace(" ", "_")), batch[key].to(model.dtype)
            found[name] = (tower, partial(run_tower, tower, values, FIELD), lambda net, given=values: net(given)[FIELD])
    mask, width = batch["attention_mask"], model.text_tower.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(*mask.shape, width, device=model.device, dtype=model.dtype)
    given = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(mask)}
    found["fusion backbone"] = (
        model.text_tower,
        lambda: run_backbone(model.text_tower, *given.values(), unpadded=True)[FIELD],
        lambda net: net(**given)[FIELD],
    )
    return found


@torch.no_grad()
def _tower_figures(
    line: Callable[..., Any], network: Any, ours: Callable[[], Tensor], plain: Callable[[Any], Tensor], rounds: int
) -> Iterator[dict[str, Any]]:
    compiled = torch.compile(copy.deepcopy(network))
    try:
        first = seconds_of(lambda: plain(compiled))
    except RuntimeError as error:  # dynamo's and inductor's errors are of this kind
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile failed ({said}); on a CPU it needs a C++ compiler such as g++.") from error
    sides = {"ours": ours, "as written": lambda: plain(network), COMPILED: lambda: plain(compiled)}
    turns = in_turn(sides, rounds)
    for peer in ("as written", COMPILED):
        yield line("one pass", "ms", 1e3 * turns.seconds["ours"], 1e3 * turns.seconds[peer], peer)
    yield line("first call", "s", first, None, COMPILED)
    exact = turns.results["as written"]
    for side in ("ours", COMPILED):
        difference = (turns.results[side] - exact).abs().max() / exact.abs().max()
        yield line(f"{side}: largest difference, of the largest number", "", float(difference), None, "")
    yield line("spread of the rounds, over the median", "", turns.spread, None, "")
