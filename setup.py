"""Packaging: one import name, `modeling_sail`; training/, evaluation/ and model_cards/ are its sub-packages.

Unusual: a wheel that installed a top-level `training` would be overwritten by the next wheel that does, so the three
folders are mapped below `modeling_sail`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "modeling_sail/__init__.py").read_text(encoding="utf-8"))[1]

MAPPED = ("training", "evaluation", "model_cards")
PACKAGES = ["modeling_sail"]
for folder in MAPPED:
    PACKAGES += [f"modeling_sail.{folder}", *(f"modeling_sail.{folder}.{name}" for name in find_packages(folder))]

TRAIN = ["accelerate>=1.1", "datasets>=3.0", "peft>=0.14", "POT>=0.9.1", "resvg-py>=0.3"]
RECOMMEND = ["gensim>=4.3", "implicit>=0.7", "lightgbm>=4.0", "scikit-learn>=1.3", "scipy>=1.10", "threadpoolctl>=3.0"]
EVAL = ["accelerate>=1.1", "mteb>=2.0", "resvg-py>=0.3"]
ONNX = ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5", "torch>=2.9"]  # torch: its exporter before is another
RAY = ["ray[data]>=2.40"]
INDEX = ["lancedb>=0.20"]
TEST = ["hypothesis>=6", "mypy>=1.8", "parameterized>=0.9", "pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6"]
TEST += ["setuptools>=68", "wheel>=0.40"]

setup(
    name="sail-embedding",
    version=VERSION,
    description="Omni-modal item embeddings for retrieval and recommendation: an open SAIL-Embedding",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={f"modeling_sail.{folder}": folder for folder in MAPPED},
    package_data={
        "modeling_sail.training": ["weights/*/*", "recipes/*"],
        "modeling_sail.model_cards": ["template.md", "facts.yaml"],
    },
    install_requires=[
        "av>=12",
        "faiss-cpu>=1.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyarrow>=14",
        "safetensors>=0.4.3",
        "sentence-transformers>=6.0",
        "soundfile>=0.12",
        "soxr>=0.3",
        "tokenizers>=0.20",
        "torch>=2.5",
        "tqdm>=4.60",
        # 5.2 is the first version whose masks follow `is_causal=False`; 5.0 and 5.1 stay causal where there is padding.
        "transformers>=5.2",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "recommend": [*TRAIN, *RECOMMEND],  # teachers of behaviour, and the ranker that measures what they bring
        "gguf": ["gguf>=0.10", "accelerate>=1.1"],  # the pinned package of SmolLM2 holds a GGUF file
        "onnx": ONNX,
        "ray": RAY,  # `sail encode --engine ray`
        "index": INDEX,  # the README's vector database; `sail index` itself needs FAISS only
        "test": sorted({*TRAIN, *EVAL, *RECOMMEND, *ONNX, *RAY, *INDEX, *TEST}),
    },
    entry_points={"console_scripts": ["sail = modeling_sail.cli:main"]},
)
