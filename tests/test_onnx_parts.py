"""What is traced for ONNX is the model in every variant, and goes through the model's own methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modeling_sail.export_onnx import difference
from modeling_sail.onnx_parts import PARTS, graphs_of
from modeling_sail.onnx_runtime import pad_groups

from .test_export_onnx import shaken

VARIANTS = {
    "joint": {},
    "separate": {"fusion": "separate"},
    "latents per frame": {"latents_per_frame": True},
    "shortcut": {"shortcut_size": 24, "shortcut_memory": 7},
    "shortcut, separate": {"shortcut_size": 24, "shortcut_memory": 7, "fusion": "separate"},
    "prompt not pooled": {"pool_prompt": False},
    "no tanh, causal": {"pool_tanh": False, "causal": True},
    "mean of windows": {"audio_pooling": "mean"},
    "one block": {"perceiver_depth": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_traced_is_the_model_in_every_variant(variant) -> None:
    model, processor = shaken(**VARIANTS[variant])
    with torch.no_grad():
        for part in PARTS:
            for graph in graphs_of(part, model, processor):
                for probe in graph.probes:
                    expected = graph.reference(*probe)
                    assert expected.abs().max() > 1e-3
                    torch.testing.assert_close(graph.module(*probe), expected, atol=2e-5, rtol=1e-5)


def test_graphs_go_through_the_models_own_methods(monkeypatch) -> None:
    """No formula of the perceiver or the audio adapter is written twice: what changes in them changes in the graphs."""
    model, processor = shaken()
    graphs = {graph.name: graph for part in ("vision", "audio") for graph in graphs_of(part, model, processor)}
    for name, owner, method in (
        ("visual_tokens", model.perceiver, "frame_tokens"),
        ("visual_tokens", model.perceiver, "resample"),
        ("audio_tokens", model.audio_adapter, "pool"),
        ("audio_tokens", model.audio_adapter, "token"),
    ):
        graph, real = graphs[name], getattr(owner, method)
        with torch.no_grad(), monkeypatch.context() as patch:
            before = graph.reference(*graph.probes[2])
            patch.setattr(owner, method, lambda *given, real=real: real(*given) ** 2)
            expected, found = graph.reference(*graph.probes[2]), graph.module(*graph.probes[2])
        assert (expected - before).abs().max() > 1e-2
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def test_groups_are_laid_side_by_side() -> None:
    values, present = pad_groups(np.array([1, 2, 3, 4]), np.array([0, 2, 2, 5]))
    assert values.tolist() == [[1, 0], [2, 3], [4, 0]]
    assert present.tolist() == [[True, False], [True, True], [True, False]]


def test_difference_is_absolute_below_one_and_relative_above() -> None:
    assert difference(np.array([0.5]), torch.tensor([0.75])) == 0.25
    assert difference(np.array([50.0, 1]), torch.tensor([100.0, 1])) == 0.5
    assert difference(np.zeros(2), torch.zeros(3)) == float("inf")
