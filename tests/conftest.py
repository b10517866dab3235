"""What tests share: the tiny model, one item for each of the seven modality subsets, a catalogue of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from modeling_sail.training.build import build, build_tiny
from PIL import Image

from modeling_sail import index_build, index_recall
from modeling_sail.modeling_sail import SailEmbeddingModel
from modeling_sail.processing_sail import SailEmbeddingProcessor

from .vectors import clustered, write

torch.set_num_threads(1)
# The same examples in every run, however busy the machine is: a failure is of the change, not of the draw.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def picture(seed: int, size: tuple[int, int] = (40, 52)) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def sound(seed: int, seconds: float = 0.7, hz: int = 8000) -> tuple[np.ndarray, int]:
    """A sound of noise."""
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * hz)).astype(np.float32), hz


def seven_items() -> list[dict[str, Any]]:
    """Text, vision, audio, the three pairs, and all; ragged on purpose."""
    return [
        {"title": "a red kangaroo", "tags": ["animal", "australia"]},
        {"images": [picture(1), picture(2, (30, 90))]},
        {"audio": sound(3, 2.3)},
        {"title": "owl", "image": picture(4)},
        {"ocr": "a longer text " * 8, "audio": sound(5)},
        {"image": picture(6), "audio": sound(7, 1.0, 44_100)},
        {"text": "all", "asr": "hello", "images": [picture(8)] * 3, "audio": sound(9, 0.1)},
    ]


@pytest.fixture(scope="session")
def tiny() -> tuple[SailEmbeddingModel, SailEmbeddingProcessor]:
    """The tiny preset with fixed weights."""
    torch.manual_seed(0)
    return build_tiny()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset as `sail build` writes it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    build("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """3,000 vectors, and the file of embeddings that holds them."""
    vectors = clustered(3000)
    return write(tmp_path_factory.mktemp("embeddings") / "x.parquet", vectors), vectors


@pytest.fixture
def quick_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer held queries, and fewer rows for product codes: 256 centroids need no more to be some."""
    monkeypatch.setattr(index_recall, "QUERIES", 100)
    monkeypatch.setattr(index_build, "CODE_ROWS", 512)
