"""A stand-in for torchcodec, with which `datasets` decodes sounds and videos: mteb's mock tasks then run without it.

Unusual: only what datasets and mteb's mock tasks call is here; a torchcodec that is installed and loads is left alone.
"""

from __future__ import annotations

import importlib
import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import datasets
import numpy as np
import pytest
import soundfile
import torch


class AudioEncoder:
    """Samples (S,) or (C, S) to a WAV file."""

    def __init__(self, samples: torch.Tensor, *, sample_rate: int) -> None:
        self.samples, self.sample_rate = samples, sample_rate

    def to_file_like(self, file: io.BytesIO, format: str = "wav", num_channels: int | None = None) -> None:
        soundfile.write(file, self.samples.numpy().T, self.sample_rate, format=format, subtype="FLOAT")


class AudioDecoder:
    """A sound of a path or bytes; all samples are (C, S)."""

    def __init__(self, source: str | bytes, **settings: Any) -> None:
        self.source, self.metadata = source, SimpleNamespace(path=None)

    def get_all_samples(self) -> SimpleNamespace:
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        data, rate = soundfile.read(source, dtype="float32", always_2d=True)
        return SimpleNamespace(data=torch.from_numpy(data.T.copy()), sample_rate=rate)

    def get_samples_played_in_range(self, start: float, end: float) -> SimpleNamespace:
        return self.get_all_samples()


class VideoDecoder:
    """A video of a path or bytes; frames are (T, C, H, W) uint8."""

    def __init__(self, source: str | bytes, **settings: Any) -> None:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        self.frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        self.metadata = SimpleNamespace(num_frames=len(frames), path=None)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=self.frames[indices])


def ensure_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where torchcodec is missing, or cannot load for want of ffmpeg."""
    try:
        importlib.import_module("torchcodec.decoders")
        return
    except (ImportError, OSError, RuntimeError):
        pass
    parts = {"decoders": (AudioDecoder, VideoDecoder), "encoders": (AudioEncoder,)}
    package = ModuleType("torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    for name, classes in parts.items():
        module = ModuleType(f"torchcodec.{name}")
        for one in classes:
            setattr(module, one.__name__, one)
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, f"torchcodec.{name}", module)
    monkeypatch.delitem(sys.modules, "datasets.features._torchcodec", raising=False)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", True)
