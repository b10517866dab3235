"""Hashes of weights and of models: what tells two checkpoints apart wherever work is kept and taken up again.

Unusual: the hash of a folder is of tensors by name, read one by one, not of files: splitting the weights otherwise
changes nothing, and a model of any size is hashed without being built. Files that would not be loaded do not count.
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

# What decides a vector besides the weights. Cards, traces, codebooks of semantic IDs and copies of the code do not.
SETTINGS = (
    *("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "tokenizer.model"),
    "adapter_config.json",
)
ADAPTER = "adapter_model.safetensors"  # PEFT's: loaded where it lies beside the weights
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
        ValueError: the folder holds no weights in safetensors, or an index of shards that is broken or short of one.
    """
    digest = hashlib.sha256()
    hash_tensors(digest, _saved_tensors(folder))
    for path in sorted({path for pattern in SETTINGS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0" + _decisive(path))
    return digest.hexdigest()


def _saved_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in _loaded_files(folder)]
        owner = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        for name in sorted(owner):
            yield name, owner[name].get_tensor(name)


def _loaded_files(folder: Path) -> list[Path]:
    """The weights that `from_pretrained` takes: the whole file, or else the shards that the index names; an adapter."""
    adapter = [path for path in (folder / ADAPTER,) if path.is_file()]
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole, *adapter]
    if not index.is_file():
        raise ValueError(
            f"{folder} holds no weights ({whole.name}, or {index.name} and shards); build the model again."
        )
    try:
        shards = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}); copy or build the model again.") from error
    if missing := [path.name for path in shards if not path.is_file()]:
        raise ValueError(f"{index} names {', '.join(missing)}, not in the folder; copy or build the model again.")
    return [*shards, *adapter]


def _decisive(path: Path) -> bytes:
    """A settings file's content; of a JSON object without what only says who wrote it."""
    content = path.read_bytes()
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return content
    settings = json.loads(content)
    return json.dumps({key: settings[key] for key in sorted(settings) if key not in _INCIDENTAL}).encode()
