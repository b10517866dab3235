"""Trainer subclasses: they only connect a model, a batch and a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from .losses import matryoshka_nce


class ContrastiveTrainer(Trainer):
    """In-batch NCE at the Matryoshka dims, query to target and back (SAIL-Embedding, section 3.3.2).

    A batch is a dict: ``query`` and ``target``, each the keyword arguments of the model for B rows; ``target_ids``
    (B,), equal where two rows have the same target; ``dataset``, the name whose temperature counts.
    """

    def get_train_dataloader(self) -> DataLoader:
        """One element of the dataset is one whole batch, so that a batch can come from one dataset alone."""
        return DataLoader(self.train_dataset, batch_size=None, num_workers=self.args.dataloader_num_workers)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        query = model(**inputs["query"]).embeddings
        target = model(**inputs["target"]).embeddings
        bare = self.accelerator.unwrap_model(model)
        options = {
            "dims": bare.config.matryoshka_dims,
            "temperature": bare.temperatures(inputs["dataset"]),
            "target_ids": inputs["target_ids"],
        }
        loss = (matryoshka_nce(query, target, **options) + matryoshka_nce(target, query, **options)) / 2
        return (loss, {"query": query, "target": target}) if return_outputs else loss
