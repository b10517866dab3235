"""The sentence-transformers module: ``SentenceTransformer(folder, trust_remote_code=True).encode(items)``.

Unusual: it is one module, not a chain, because pooling and norm belong to the model; and what sentence-transformers
hands over as one batch is cut again by tokens, so that a few long items do not pad many short ones.
"""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoModel, AutoProcessor

SHOWN = 10  # of the bad items that an error names
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxdict = 12


class SailSentenceTransformer(InputModule):
    """Items to L2-normalised embeddings.

    ``encode`` takes dicts, strings and PIL images in any mix, ``prompt_name="q2i_query"`` and its kin, and beside the
    arguments of sentence-transformers: ``errors="skip"`` (a bad item's row is NaN, the others are unchanged),
    ``allow_urls``, ``use_video_audio``, ``token_budget`` (padded tokens of one pass; by default 2048 on a CPU,
    16,384 elsewhere). ``batch_size`` is the window in which items are sorted by length and cut into passes.

    Args:
        model: a `SailEmbeddingModel`.
        processor: its `SailEmbeddingProcessor`.
    """

    save_in_root = True
    forward_kwargs = {"errors", "allow_urls", "use_video_audio", "token_budget"}

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model = model
        self.processor = processor

    @property
    def modalities(self) -> list[Any]:
        """What `SentenceTransformer.supports` answers with; "message" stands for any mixture."""
        names = {"vision": ["image", "video"], "audio": ["audio"]}
        return ["text", *(name for has in self.processor.modalities for name in names[has]), "message"]

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.processor.tokenizer = value

    @property
    def max_seq_length(self) -> int:
        return self.processor.max_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.processor.max_tokens = value

    def get_embedding_dimension(self) -> int:
        return self.model.config.hidden_size

    def preprocess(
        self,
        inputs: list[Any],
        prompt: str | None = None,
        errors: str = "raise",
        allow_urls: bool = False,
        use_video_audio: bool = True,
        token_budget: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Items to features: the tensors of one batch in training, passes cut by tokens otherwise."""
        instruction, items = prompt or "", [_as_item(value) for value in inputs]
        try:
            loaded, statuses = self.processor.load(
                items, errors, allow_urls=allow_urls, use_video_audio=use_video_audio, instruction=instruction
            )
        except ValueError as error:
            # An `ItemsError`, told by what it has: of which module it is depends on where the parts came from.
            if isinstance(getattr(error, "errors", None), list):
                error.add_note(_which(error, items))
            raise
        if torch.is_grad_enabled() and len(loaded) == len(inputs):
            return dict(self.processor.collate(loaded, instruction))
        if token_budget is None:
            token_budget = self.processor.default_token_budget(self.model.device.type)
        passes = list(self.processor.batches(loaded, instruction, token_budget))
        return {"passes": passes, "rows": [item.index for item in loaded], "statuses": statuses}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding`` (B, D), normalised; NaN in the row of an item that could not be read."""
        if "passes" not in features:
            features["sentence_embedding"] = self._embed(features)
            return features
        size = (len(features["statuses"]), self.get_embedding_dimension())
        result = torch.full(size, torch.nan, device=self.model.device)
        for places, batch in features["passes"]:
            batch = batch.to(self.model.device, non_blocking=True)
            result[[features["rows"][place] for place in places]] = self._embed(batch)
        features["sentence_embedding"] = result
        return features

    def _embed(self, batch: dict[str, Tensor]) -> Tensor:
        wanted = {name: batch[name] for name in self.processor.model_input_names if name in batch}
        return torch.nn.functional.normalize(self.model(**wanted, unpadded=True).embeddings, dim=-1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SailSentenceTransformer:
        source = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        model = AutoModel.from_pretrained(model_name_or_path, **source, **(config_kwargs or {}), **(model_kwargs or {}))
        return cls(model, AutoProcessor.from_pretrained(model_name_or_path, **source, **(processor_kwargs or {})))


def _which(error: Any, items: list[Any]) -> str:
    """What the bad items are, since their numbers tell little here."""
    shown = "; ".join(f"{bad.index} is {_SHORT.repr(_without_bytes(items[bad.index]))}" for bad in error.errors[:SHOWN])
    return f"The numbers are places in a batch, of items that sentence-transformers sorted by length: {shown}"


def _without_bytes(item: Any) -> Any:
    """The item with the size in place of what would be written out whole to be shown."""
    if isinstance(item, dict):
        return {name: _without_bytes(value) for name, value in item.items()}
    return f"{len(item)} bytes" if isinstance(item, (bytes, bytearray)) else item


def _as_item(value: Any) -> Any:
    """sentence-transformers' own form of a bare sound, ``{"array", "sampling_rate"}``, is an item with a sound."""
    return {"audio": value} if isinstance(value, dict) and set(value) == {"array", "sampling_rate"} else value
