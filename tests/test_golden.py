"""Golden vectors of `tiny`: the same on every supported version of transformers, from items to embeddings.

Weights are drawn by the names that checkpoints have on disk, so they do not depend on how a version initialises or
names its modules. Made with transformers 5.23.0 by ``python -m tests.test_golden``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from modeling_sail.training.build import build
from safetensors.numpy import load_file, save_file

from modeling_sail.modeling_sail import SailEmbeddingModel
from modeling_sail.processing_sail import SailEmbeddingProcessor

from .conftest import seven_items

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that depends on its name alone; scales of norms lie around 1."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    values = 0.1 * generator.standard_normal(shape)
    return (values + ("norm" in name and name.endswith("weight"))).astype(np.float32)


def vectors(folder: Path) -> dict[str, list[list[float]]]:
    """First numbers of the embeddings of the seven items, by kind."""
    build("tiny", folder)
    path = folder / "model.safetensors"
    save_file({name: drawn(name, tensor.shape) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    model = SailEmbeddingModel.from_pretrained(folder).eval()
    processor = SailEmbeddingProcessor.from_pretrained(folder)
    with torch.inference_mode():
        batch = processor(seven_items(), task="i2i", side="target")
        output = model(**batch, output_modality_embeddings=True, output_late_fusion=True)
    kinds = ("embeddings", "vision_embeddings", "text_embeddings", "audio_embeddings", "late_fusion_embeddings")
    return {kind: output[kind][:, :8].tolist() for kind in kinds}


def test_golden_vectors_of_tiny(tmp_path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = vectors(tmp_path)
    assert found.keys() == golden.keys()
    for kind, expected in golden.items():
        np.testing.assert_allclose(found[kind], expected, atol=2e-5, err_msg=kind)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        GOLDEN.write_text(json.dumps(vectors(Path(place))) + "\n", encoding="utf-8")
