"""Hashes of weights and of models: what tells two checkpoints apart wherever work is kept and taken up again.

Unusual: the hash of a folder is of tensors by name, read one by one, not of files: splitting the weights otherwise
changes nothing, and a model of any size is hashed without being built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# What decides a vector besides the weights. Cards, traces, codebooks of semantic IDs and copies of the code do not.
SETTINGS = (
    *("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "tokenizer.model"),
)
_INCIDENTAL = ("transformers_version", "auto_map", "_name_or_path")  # of a saved configuration: who wrote it, and where


def hash_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Feed names and bytes of tensors, in the order that they come, to a hash of hashlib."""
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous().view(-1)
        digest.update(name.encode())
        digest.update(whole.view(torch.uint8).numpy().data)


def model_hash(folder: Path) -> str:
    """sha256 over a saved model: all its tensors in the order of their names, its configuration and its processor.

    Raises:
        ValueError: the folder holds no weights in safetensors.
    """
    digest = hashlib.sha256()
    hash_tensors(digest, _saved_tensors(folder))
    for path in sorted({path for pattern in SETTINGS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0" + _decisive(path))
    return digest.hexdigest()


def _saved_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("model*.safetensors"))]
        owner = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        if not owner:
            raise ValueError(f"{folder} holds no weights (model*.safetensors); build the model again.")
        for name in sorted(owner):
            yield name, owner[name].get_tensor(name)


def _decisive(path: Path) -> bytes:
    """A settings file's content; of a JSON object without what only says who wrote it."""
    content = path.read_bytes()
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return content
    settings = json.loads(content)
    return json.dumps({key: settings[key] for key in sorted(settings) if key not in _INCIDENTAL}).encode()
