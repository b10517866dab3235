"""Dataset-driven pattern matching (SAIL-Embedding, section 3.3.4): which parts of two items are contrasted.

A pattern is two letters and a C: ITC contrasts the query's pictures with the target's text. To add a kind of part, add
a letter; to add a pattern, add an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The letter of a part, and which of the model's embeddings stands for it. Pictures and video frames share a tower.
PARTS = {"I": "vision", "V": "vision", "A": "audio", "T": "text", "O": "fused"}
LETTERS = tuple(PARTS)

# ITC, IIC, VTC, VVC, TTC, OOC of the paper, those with sound, and every other: any part to any part.
PATTERNS = {f"{query}{target}C": (query, target) for query in LETTERS for target in LETTERS}


def check_pattern(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: there is no such pattern.
    """
    if name not in PATTERNS:
        letters = "I picture, V video, A sound, T text, O the whole item"
        raise ValueError(f"There is no pattern {name!r}; one is two letters and C, as in ITC ({letters}).")
    return name


def valid_rows(name: str, query_parts: Tensor, target_parts: Tensor) -> Tensor:
    """(B,) booleans: the rows whose query and target have what the pattern contrasts.

    Args:
        name: of a pattern.
        query_parts, target_parts: (B, 5) booleans in the order of ``LETTERS``.
    """
    query, target = (LETTERS.index(letter) for letter in PATTERNS[name])
    return query_parts[:, query] & target_parts[:, target]


def parts_of(has_pictures: bool, has_frames: bool, has_audio: bool, has_text: bool) -> Tensor:
    """(5,) booleans in the order of ``LETTERS``. An item with frames is a video, whatever cover picture it has."""
    return torch.tensor([has_pictures and not has_frames, has_frames, has_audio, has_text, True])
