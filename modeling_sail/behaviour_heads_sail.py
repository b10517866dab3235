"""Heads that behaviour is learned through (SAIL-Embedding, section 3.3.5): a sequence of items to one vector, ID
embeddings into the space of items.

Unusual: they are no part of the model's own weights, so an item's embedding needs none of them; they lie beside it in
the Hub folder, for those who want a user's vector or compare items with a recommender's IDs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

FILE_NAME = "behaviour_heads.safetensors"
SEQUENCE_ENCODERS = ("mean", "transformer")
MAX_LENGTH = 64


def mean_of_sequence(items: Tensor, mask: Tensor) -> Tensor:
    """The mean of the normalised item embeddings (section 3.3.5, the default sequence model).

    Args:
        items: (B, L, D), of any length each; what is masked out may hold anything finite.
        mask: (B, L) booleans, True for items.

    Returns:
        (B, D), in float32, not normalised; zeros for an empty sequence.
    """
    unit = nn.functional.normalize(items.float(), dim=-1) * mask[..., None]
    return unit.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, D)


class SequenceTransformer(nn.Module):
    """A special token before the items, a few Transformer layers over both (section 3.3.5: three).

    Unusual: what the token becomes is added to the mean, through a matrix that begins as zero. Training so starts from
    mean pooling, which a few thousand sequences would not teach a Transformer.

    Args:
        width: D.
        num_layers: of the Transformer.
        num_heads: must divide D.
        max_length: positions that are told apart, counted from the newest item; those before share the last one.
    """

    def __init__(self, width: int, num_layers: int = 3, num_heads: int = 4, max_length: int = MAX_LENGTH) -> None:
        super().__init__()
        self.special = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Embedding(max_length, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) items, oldest first, and (B, L) booleans to (B, D), as `mean_of_sequence`."""
        unit = nn.functional.normalize(items.float(), dim=-1) * mask[..., None]
        age = mask.flip(1).cumsum(dim=1).flip(1) - 1  # (B, L): 0 for the newest item
        places = self.positions(age.clamp(0, self.positions.num_embeddings - 1))
        # A vector of length 1 has components of 1 / sqrt(D): brought to the size that layers expect.
        tokens = unit * unit.shape[-1] ** 0.5 + places
        special = self.special.expand(len(items), 1, -1)
        tokens = torch.cat([special, tokens.to(special.dtype)], dim=1)  # (B, 1 + L, D)
        absent = torch.cat([mask.new_zeros(len(mask), 1), ~mask], dim=1)
        read = self.layers(tokens, src_key_padding_mask=absent)[:, 0]
        return mean_of_sequence(items, mask) + self.output(read).float()


class BehaviourHeads(nn.Module):
    """A sequence encoder, and a projection for each table of ID embeddings.

    Args:
        width: D, of the item embeddings.
        sequence: "mean" (no parameters) or "transformer".
        tables: dimensions of the ID embeddings, by the table's name.

    Raises:
        ValueError: an unknown sequence encoder.
    """

    def __init__(self, width: int, sequence: str = "mean", tables: dict[str, int] | None = None) -> None:
        super().__init__()
        if sequence not in SEQUENCE_ENCODERS:
            raise ValueError(f"sequence={sequence!r} is not one of {', '.join(SEQUENCE_ENCODERS)}.")
        self.width, self.tables = width, dict(tables or {})
        self.sequence = SequenceTransformer(width, num_heads=_heads_of(width)) if sequence == "transformer" else None
        projections = [nn.Linear(dim, width) for dim in self.tables.values()]
        for projection in projections:
            # Orthogonal: cosines between ID embeddings are the same in the space of items, where training begins.
            nn.init.orthogonal_(projection.weight)
            nn.init.zeros_(projection.bias)
        # By place, not by name: a table's name may hold dots, which a module's must not.
        self.projections = nn.ModuleList(projections)

    def encode_sequence(self, items: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) item embeddings, oldest first, and (B, L) booleans to (B, D)."""
        return mean_of_sequence(items, mask) if self.sequence is None else self.sequence(items, mask)

    def project(self, name: str, vectors: Tensor) -> Tensor:
        """(N, E) embeddings of a table to (N, D), comparable with items.

        Raises:
            ValueError: no such table, or vectors of another length.
        """
        if name not in self.tables:
            raise ValueError(f"There is no projection for the table {name!r}; there are {sorted(self.tables)}.")
        if vectors.shape[-1] != self.tables[name]:
            raise ValueError(
                f"Table {name!r} has vectors of {vectors.shape[-1]} dims; its projection takes {self.tables[name]}."
            )
        projection: Any = self.projections[list(self.tables).index(name)]
        unit = nn.functional.normalize(vectors.float(), dim=-1)
        return projection(unit.to(projection.weight.dtype)).float()  # weights may be kept in bfloat16

    def take_over(self, other: BehaviourHeads) -> list[str]:
        """Copy the parts of other heads that are of the same kind; returns their names."""
        taken = []
        if self.sequence is not None and other.sequence is not None and self.width == other.width:
            self.sequence.load_state_dict(other.sequence.state_dict())
            taken.append("sequence")
        for name, dim in self.tables.items():
            if other.tables.get(name) == dim and self.width == other.width:
                theirs = other.projections[list(other.tables).index(name)].state_dict()
                self.projections[list(self.tables).index(name)].load_state_dict(theirs)
                taken.append(name)
        return taken

    def joined(self, before: BehaviourHeads) -> BehaviourHeads:
        """These heads, and what only the ones before them have."""
        sequence = "mean" if self.sequence is None and before.sequence is None else "transformer"
        heads = BehaviourHeads(self.width, sequence, {**before.tables, **self.tables})
        heads.take_over(before)
        heads.take_over(self)
        return heads

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``behaviour_heads.safetensors`` into a folder, beside a model's own files; whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sequence = "mean" if self.sequence is None else "transformer"
        settings = {"width": self.width, "sequence": sequence, "tables": self.tables}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors = tensors or {"none": torch.zeros(0)}
        partial = folder / f"{FILE_NAME}.partial"
        save_file(tensors, partial, metadata={"behaviour_heads": json.dumps(settings)})
        os.replace(partial, folder / FILE_NAME)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> BehaviourHeads:
        """Read them from a local folder or a Hub repository.

        Args:
            name: the folder, or the Hub id.
            options: of ``transformers.utils.cached_file``.

        Raises:
            OSError: there are none. ValueError: the file is of another kind.
        """
        path = cached_file(str(name), FILE_NAME, **options)
        with safe_open(path, framework="pt") as file:
            known = file.metadata() or {}
            if "behaviour_heads" not in known:
                raise ValueError(
                    f"{path} holds no behaviour heads; a stage of `sail train` with sequences writes them."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys() if key != "none"}  # noqa: SIM118  no mapping
        heads = cls(**json.loads(known["behaviour_heads"]))
        heads.load_state_dict(tensors)
        return heads


def _heads_of(width: int) -> int:
    """The most attention heads of at least 32 channels that divide the width."""
    return next(count for count in range(max(1, width // 32), 0, -1) if width % count == 0)
