"""Trainer subclasses: they only connect a model, a batch and an objective.

Unusual: with a token budget the step caches gradients (grad_cache.py), so that the contrastive batch may be larger than
memory; batches come ready from `SpecializedBatches`, which every rank reads for itself.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..behaviour_heads_sail import BehaviourHeads
from .distributed import largest, mean_over_ranks, rank, world_size
from .grad_cache import PASS_TOKENS, Replay, micro_batches, select
from .objective import ALONE, Objective, Step

logger = logging.getLogger(__name__)

# Rows that cannot be read: this many are always borne, and then this share of what was asked for.
ALWAYS_BORNE = 10
MAX_BAD_SHARE = 0.05

# A batch from which no term can be computed is passed over; so many in a row of a dataset are a mistake in the recipe.
MOST_WITHOUT_TERMS = 10


class ContrastiveTrainer(Trainer):
    """Contrastive training with every objective of section 3.3, on one process or many ranks.

    Args:
        model: a `SailEmbeddingModel` with a temperature for each dataset.
        args: as in transformers; ``max_steps`` must be set.
        train_dataset: `SpecializedBatches`.
        objective: the terms and their weights; NCE-MRL by default.
        token_budget: cache gradients in micro-batches of so many padded tokens; None encodes the batch at once.
        peft_config: trains adapters instead of the weights; the connectors stay trainable through
            ``modules_to_save``.
        max_bad_share: share of rows that may be unreadable before the run stops.
        learning_rates: of parameters whose name matches a pattern (``text_tower.*``), the first that does; the others
            have the arguments' own.
        kwargs: of ``Trainer``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective | None = None,
        token_budget: int | None = None,
        peft_config: Any = None,
        max_bad_share: float = MAX_BAD_SHARE,
        learning_rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.max_steps < 1:
            raise ValueError(f"max_steps={args.max_steps}: batches have no end, so the number of steps must be given.")
        args.remove_unused_columns = False  # batches are nested; there is no column to remove
        args.ignore_data_skip = True  # a step's batch is made directly, not skipped to
        args.ddp_find_unused_parameters = False  # `use_all_parts` leaves none unused
        args.ddp_broadcast_buffers = False  # no buffer changes in training
        if args.n_gpu > 1:  # DataParallel would split rows from their pictures
            logger.warning("%d GPUs, one process: one GPU is used. Start one process each with torchrun.", args.n_gpu)
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)
        self.objective = objective or Objective()
        self.token_budget = token_budget
        self.max_bad_share = max_bad_share
        self.learning_rates = dict(learning_rates or {})
        self.add_callback(_StartWhereItStopped(self))
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._work = {"items": 0, "tokens": 0, "seconds": 0.0}
        self._asked = 0
        self._without_terms: dict[str, int] = {}
        self.skipped: set[str] = set()  # ids of rows that this rank could not read

    def get_train_dataloader(self) -> DataLoader:
        """One element of the dataset is one whole batch of this rank; accelerate must not share it out again."""
        workers = self.args.dataloader_num_workers
        # A generator of its own: the loader draws a seed when it starts, and a resumed run starts it once more.
        return DataLoader(self.train_dataset, batch_size=None, num_workers=workers, generator=torch.Generator())

    def take_over(self, checkpoint: Path) -> None:
        """Weights and state of a checkpoint after which there is no step left."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in transformers; but scores keep their precision, whatever type DeepSpeed gives to inputs."""
        prepared = super()._prepare_inputs(inputs)
        return prepared | {name: inputs[name].to(self.args.device) for name in ("scores", "teacher_scores")}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with the learning rates of parts."""
        if self.optimizer is None and self.learning_rates:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    decay = self.args.weight_decay if name in decayed else 0.0
                    groups.setdefault((self._learning_rate_of(name), decay), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [{"params": part, "lr": rate, "weight_decay": decay} for (rate, decay), part in groups.items()],
                **options,
            )
        return super().create_optimizer(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """As in transformers, but through ``from_pretrained``.

        transformers saves some towers (ViT among them) under their older parameter names; its Trainer would read the
        file as it is and pass over what it does not know, and a resumed run would go on with the stage's first weights.
        """
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict() | _saved_heads(Path(resume_from_checkpoint)))

    def _learning_rate_of(self, name: str) -> float:
        name = name.removeprefix("base_model.model.")  # peft's
        rates = (rate for pattern, rate in self.learning_rates.items() if fnmatch.fnmatch(name, pattern))
        return next(rates, self.args.learning_rate)

    # -- one step ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        self._note_rows(inputs)
        embeddings = self._encode_at_once(model, inputs["items"], self.objective.kinds(inputs))
        loss = self._loss(model, embeddings, inputs)
        return (loss, embeddings) if return_outputs else loss

    def _encode_at_once(
        self, model: torch.nn.Module, items: Mapping[str, Tensor], kinds: set[str]
    ) -> dict[str, Tensor]:
        """All items with gradients. One process does it in passes of one length: short texts are not padded to long
        items. Ranks meet in every pass, and take all in one.
        """
        if world_size() > 1:
            return self.encode(model, items, kinds)
        cuts = micro_batches(items, PASS_TOKENS)
        last = len(cuts) - 1
        parts = [self.encode(model, select(items, cut), kinds, place == last) for place, cut in enumerate(cuts)]
        order = torch.cat(cuts).argsort().to(items["attention_mask"].device)
        return {kind: torch.cat([part[kind] for part in parts])[order] for kind in kinds}

    def encode(
        self, model: torch.nn.Module, items: Mapping[str, Tensor], kinds: set[str], use_all_parts: bool = True
    ) -> dict[str, Tensor]:
        """(M, D) embeddings of M items, by kind (objective.KINDS)."""
        alone = bool(kinds & set(ALONE))
        output = model(
            **items,
            output_modality_embeddings=alone,
            output_late_fusion="late_fusion" in kinds,
            use_all_parts=use_all_parts,
        )
        found = {"fused": output["embeddings"]}
        heads = _heads_of(model)
        if use_all_parts and heads is not None:  # ranks wait for each other's gradients of these, too
            found["fused"] = found["fused"] + 0.0 * sum(part.sum() for part in heads.parameters())
        found |= {kind: output[name] for kind, name in ALONE.items() if kind in kinds}
        return found | ({"late_fusion": output["late_fusion_embeddings"]} if "late_fusion" in kinds else {})

    def _loss(self, model: torch.nn.Module, embeddings: Mapping[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        bare = self.accelerator.unwrap_model(model)
        name = inputs["dataset"]
        temperature = bare.temperatures(name)
        heads = _heads_of(bare)
        step = Step(embeddings, inputs, bare.config.matryoshka_dims, temperature, self.objective.options, heads)
        loss, terms = self.objective(step)
        self._without_terms[name] = 0 if terms else self._without_terms.get(name, 0) + 1
        if self._without_terms[name] >= MOST_WITHOUT_TERMS:
            weights = self.objective.weights_for(inputs)
            raise ValueError(
                f"{self._without_terms[name]} batches in a row of dataset {name!r} have nothing that the terms "
                f"{sorted(weights)} can be computed from; give it another loss weight, a pattern that its rows have, "
                "scores, or tables that know its items."
            )
        logged = {f"loss/{term}": value for term, value in terms.items()}
        self._note({f"loss_of/{name}": loss.detach(), f"temperature/{name}": temperature.detach(), **logged})
        return loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        begun = time.perf_counter()
        self._work["items"] += len(inputs["items"]["attention_mask"])
        self._work["tokens"] += int(inputs["items"]["attention_mask"].sum())
        if self.token_budget is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._cached_step(model, inputs, self.token_budget)
        self._work["seconds"] += time.perf_counter() - begun
        return loss

    def _cached_step(self, model: torch.nn.Module, inputs: dict[str, Any], token_budget: int) -> Tensor:
        """Encode without gradients, take the loss, encode again micro-batch by micro-batch (grad_cache.py)."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._note_rows(inputs)
        items, kinds = inputs["items"], self.objective.kinds(inputs)
        device = items["attention_mask"].device
        cuts, replay = micro_batches(items, token_budget), Replay(device)
        rounds = largest(len(cuts), device)  # ranks meet in every round
        pieces = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for round_ in range(rounds):
                replay.record()
                places = cuts[min(round_, len(cuts) - 1)]
                pieces.append(self.encode(model, select(items, places), kinds, use_all_parts=False))
        order = torch.cat(cuts).argsort().to(device)
        leaves = {
            kind: torch.cat([piece[kind] for piece in pieces[: len(cuts)]])[order].requires_grad_() for kind in kinds
        }
        with self.compute_loss_context_manager():
            loss = self._loss(model, leaves, inputs) / self.current_gradient_accumulation_steps
        with self._synchronised(model, False):
            self.accelerator.backward(loss, **self._backward_options())
        for round_ in range(rounds):
            places = cuts[min(round_, len(cuts) - 1)]
            last = round_ == rounds - 1
            with self._synchronised(model, last):
                with replay.again(round_), self.compute_loss_context_manager():
                    part = self.encode(model, select(items, places), kinds, use_all_parts=last)
                    there = places.to(device)
                    products = [_product(part[kind], leaves[kind].grad, there) for kind in sorted(kinds)]
                    surrogate = torch.stack(products).sum() * float(round_ < len(cuts))
                self._pass_on(surrogate)
        return loss.detach()

    def _pass_on(self, surrogate: Tensor) -> None:
        """Backward of embeddings times their gradients, which the loss's own backward has scaled already."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.accelerator.backward(surrogate, **self._backward_options())
        else:
            surrogate.backward()

    def _backward_options(self) -> dict[str, Any]:
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return {"scale_wrt_gas": False} if deepspeed else {}

    @contextmanager
    def _synchronised(self, model: torch.nn.Module, now: bool) -> Iterator[None]:
        """Whether ranks exchange gradients inside: only in the last backward of a step."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(now and before)  # DeepSpeed's boundary follows it
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        try:
            with nullcontext() if now or deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    # -- what is logged ----------------------------------------------------------------------------------------------

    def _note(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds means since the last time: each term, temperatures, items and tokens a second, rows left out."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            means = mean_over_ranks(torch.stack([self._sums[name] / self._counts[name] for name in names]))
            logs |= {name: round(float(mean), 6) for name, mean in zip(names, means, strict=True)}
            ranks = max(1, self.args.world_size)
            seconds = max(self._work["seconds"], 1e-9)
            logs |= {f"{name}_per_second": round(ranks * self._work[name] / seconds, 2) for name in ("items", "tokens")}
            logs["rows_skipped"] = len(self.skipped)
            self._sums, self._counts = {}, {}
            self._work = dict.fromkeys(self._work, 0)
        super().log(logs, *args, **kwargs)

    def _note_rows(self, inputs: Mapping[str, Any]) -> None:
        """Count rows that could not be read, write them down, and stop the run where they are too many."""
        self._asked += inputs["asked"]
        new = [(name, reason) for name, reason in inputs["skipped"] if name not in self.skipped]
        self.skipped.update(name for name, _ in new)
        if new:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"skipped-{rank()}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in new)
            logger.warning("%d row(s) left out, the last: %s (%s)", len(self.skipped), *new[-1])
        most = max(ALWAYS_BORNE, self.max_bad_share * self._asked) if self.max_bad_share else 0
        if len(self.skipped) > most:
            raise RuntimeError(
                f"{len(self.skipped)} rows of {self._asked} could not be read, more than {self.max_bad_share:.0%}; "
                f"they are listed in {Path(self.args.output_dir) / f'skipped-{rank()}.jsonl'}. Mend them, or raise "
                "max_bad_share."
            )


class _StartWhereItStopped(TrainerCallback):
    """Tells the batches at which step a resumed run goes on."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        batches: Any = self.trainer.train_dataset
        batches.start = state.global_step * args.gradient_accumulation_steps


def _heads_of(model: torch.nn.Module) -> BehaviourHeads | None:
    """The heads of a model, however it is wrapped."""
    return getattr(getattr(model, "module", model), "heads", None)


def _saved_heads(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of the heads in a checkpoint: ``from_pretrained`` knows nothing of them."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("heads.")]  # noqa: SIM118  no mapping
            found |= {name: file.get_tensor(name) for name in names}
    return found


def _product(embeddings: Tensor, gradient: Tensor | None, places: Tensor) -> Tensor:
    """Sum of embeddings times their gradients: its backward is the rest of the loss's backward."""
    return embeddings.sum() * 0.0 if gradient is None else (embeddings * gradient[places]).sum()
