"""The benchmark of `torch.compile`, with a compiler that needs no C++: each tower's lines and what cannot be."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from modeling_sail.evaluation.benchmarks import compiled
from modeling_sail.evaluation.benchmarks.compiled import COMPILED, compile_benchmark


def test_each_tower_is_beside_itself_as_written_and_compiled(tiny_folder, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    lines = list(compile_benchmark(tiny_folder, 2, 1))
    cases = {line["case"] for line in lines}
    assert cases == {f"{name}, 2 items, float32, cpu" for name in ("vision tower", "audio tower", "fusion backbone")}
    for case in cases:
        found = {(line["figure"], line["peer_name"]): line for line in lines if line["case"] == case}
        for peer in ("as written", COMPILED):
            assert found["one pass", peer]["ours"] > 0 and found["one pass", peer]["peer"] > 0
        assert found["first call", COMPILED]["ours"] > 0
        for side in ("ours", COMPILED):
            assert found[f"{side}: largest difference, of the largest number", ""]["ours"] < 1e-4


def test_what_cannot_be_compiled_or_is_no_model_is_one_line(tiny_folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        list(compile_benchmark(tmp_path, 2, 1))
    with pytest.raises(ValueError, match="--items 0"):
        list(compile_benchmark(tiny_folder, 0, 1))

    def broken(network):
        def run(*given, **named):
            raise RuntimeError("no C++ compiler\nand much more")

        return run

    monkeypatch.setattr(compiled.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"torch.compile failed \(no C\+\+ compiler\); on a CPU it needs"):
        list(compile_benchmark(tiny_folder, 2, 1))
