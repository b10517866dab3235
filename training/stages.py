"""Progressive stages (SAIL-Embedding, section 3.3.1): each starts from the last one's model and leaves its own.

    <output>/<stage>/checkpoints/  what a killed run goes on from
                     model/        the stage's model and processor, in Hub format
                     log.json      every logged value
                     balance.*, selected/, negatives/  what was chosen for it (choosing.py)
                     stage.json    what was trained on what, for how long: the entry of its model card

Unusual: a stage that is done is not run again, and a stage that was begun with another recipe is refused; both are told
by a fingerprint of everything that decides the result.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, TrainingArguments, set_seed

from ..behaviour_heads_sail import FILE_NAME as HEADS_FILE
from ..behaviour_heads_sail import BehaviourHeads
from ..encode_job import require_folder
from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from .choosing import Chosen, Remining, choose
from .collate import Collator
from .data.sources import open_dataset
from .distributed import rank, world_size
from .feature_cache import FeatureCache, cache_media
from .files import write_json, write_text
from .objective import Objective
from .recipe import BalanceSpec, Recipe, RecipeError, StageSpec
from .rows import TrainingDataset
from .sampler import SpecializedBatches
from .trainer import ContrastiveTrainer

logger = logging.getLogger(__name__)

_OPTIONAL = ("perceiver", "audio_adapter", "late_fusion_gate")  # parts that some models do without

LONGEST_WAIT = timedelta(hours=6)

Evaluator = Callable[[SailEmbeddingModel, SailEmbeddingProcessor], Any]


def run_recipe(recipe: Recipe, evaluator: Evaluator | None = None) -> Path:
    """Run the stages that are not done yet.

    Args:
        recipe: from `load_recipe`.
        evaluator: called with the model of each stage; what it returns is kept in stage.json.

    Returns:
        The folder of the last stage's model.

    Raises:
        RecipeError: a stage's folder is another recipe's; a pattern matches no parameter. FileNotFoundError: no model,
            no data.
    """
    check_against_model(recipe)
    # Meets the other ranks, where there are any. They wait long where the first one mines or fills a cache.
    PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    datasets, validation = open_datasets(recipe), open_validation(recipe)
    start = Path(recipe.model)
    for name in recipe.stages:
        folder = Path(recipe.output) / name
        if _is_done(folder, recipe.fingerprint(name)):
            logger.info("stage %s is done: %s", name, folder / "model")
        else:
            run_stage(recipe, name, datasets, validation, start, folder, evaluator)
        start = folder / "model"
    return start


def check_against_model(recipe: Recipe) -> None:
    """Refuse patterns that match no parameter of the model, before any weight is loaded.

    Raises:
        ValueError: the folder holds no model. RecipeError: by the dotted key.
    """
    require_folder(Path(recipe.model))
    config: Any = AutoConfig.from_pretrained(recipe.model)
    with torch.device("meta"):
        model = SailEmbeddingModel(config)
    names = [name for name, _ in model.named_parameters()]
    families = SailEmbeddingProcessor.from_pretrained(recipe.model).instructions
    for name, dataset in recipe.datasets.items():
        for task in dataset.tasks:
            if task is not None and task not in families:
                raise RecipeError(f"datasets.{name}.tasks: {task!r} has no instructions; there are {sorted(families)}.")
    for stage, spec in recipe.stages.items():
        _check_parts(stage, spec, model)
        given = {"freeze": spec.freeze, "learning_rates": list(spec.learning_rates)}
        for key, patterns in given.items():
            for pattern in patterns:
                # Heads are made for the stage's tables, which are read later.
                if not pattern.startswith("heads.") and not fnmatch.filter(names, pattern):
                    parts = ", ".join(sorted({name.split(".")[0] for name in names}))
                    raise RecipeError(f"stages.{stage}.{key}: {pattern!r} matches no parameter; parts are {parts}.")


def _check_parts(name: str, stage: StageSpec, model: SailEmbeddingModel) -> None:
    """Refuse what needs a part that the model lacks.

    Raises:
        RecipeError: by the dotted key.
    """
    if stage.losses.get("late_fusion", 0) > 0 and model.late_fusion_gate is None:
        raise RecipeError(f"stages.{name}.losses.late_fusion: the model has no gate (late_fusion=False, or no vision).")
    if stage.lora is None:
        return
    parts = [part for part, _ in model.named_children()] + [p for p in _OPTIONAL if getattr(model, p, None) is None]
    for part in stage.lora.train_too:
        if part not in parts:
            raise RecipeError(f"stages.{name}.lora.train_too: there is no part {part!r}; there are {', '.join(parts)}.")
    if not any(re.fullmatch(stage.lora.target_modules, module) for module, _ in model.named_modules()):
        given = stage.lora.target_modules
        raise RecipeError(f"stages.{name}.lora.target_modules: {given!r} matches no module of the model.")


def open_datasets(recipe: Recipe) -> dict[str, TrainingDataset]:
    """The datasets that a stage draws from, by name."""
    used = {name for spec in recipe.stages.values() for name in (spec.datasets or recipe.datasets)}
    return {name: open_dataset(name, spec, recipe.folder) for name, spec in recipe.datasets.items() if name in used}


def open_validation(recipe: Recipe) -> dict[str, TrainingDataset]:
    """The sets that ``balance`` and ``select`` look at, where a stage has either."""
    used = any(spec.balance or spec.select for spec in recipe.stages.values())
    return {name: open_dataset(name, spec, recipe.folder) for name, spec in recipe.validation.items() if used}


def balance_recipe(recipe: Recipe, name: str | None, out: Path) -> dict[str, float]:
    """A stage's weights by the recipe's model, without training: what ``balance`` in the stage would come to.

    Args:
        recipe: with validation sets.
        name: of the stage; the first one by default. Its ``balance`` settings count, or the defaults.
        out: folder of ``balance.json``, ``.html`` and ``.svg``.

    Raises:
        RecipeError: no such stage; no validation set. ValueError: `balancing.balance`.
    """
    name = name or next(iter(recipe.stages))
    if name not in recipe.stages:
        raise RecipeError(f"There is no stage {name!r}; there are {', '.join(recipe.stages)}.")
    if not recipe.validation:
        raise RecipeError("validation has no set; name one or more, like the downstream tests, beside datasets.")
    stage = replace(recipe.stages[name], balance=recipe.stages[name].balance or BalanceSpec(), select=None, mine=None)
    check_against_model(recipe)
    weights = _weights(recipe, stage)
    datasets = {key: one for key, one in open_datasets(recipe).items() if key in weights}
    validation = {key: open_dataset(key, spec, recipe.folder) for key, spec in recipe.validation.items()}
    model = SailEmbeddingModel.from_pretrained(recipe.model).eval()
    processor = SailEmbeddingProcessor.from_pretrained(recipe.model)
    freeze(model, stage, [stage.losses])
    images, sounds = _caches(stage, model, processor, [*datasets.values(), *validation.values()])
    collate = Collator(processor, images, sounds)
    chosen = choose(stage, model, collate, datasets, weights, validation, out, recipe.seed)
    total = sum(chosen.weights.values())
    return {key: weight / total for key, weight in chosen.weights.items()}


def _weights(recipe: Recipe, stage: StageSpec) -> dict[str, float]:
    """What a stage draws from, by name, in its order."""
    given = stage.datasets or dict.fromkeys(recipe.datasets, 1.0)
    return {key: weight for key, weight in given.items() if weight > 0}


def run_stage(
    recipe: Recipe,
    name: str,
    datasets: Mapping[str, TrainingDataset],
    validation: Mapping[str, TrainingDataset],
    start: Path,
    folder: Path,
    evaluator: Evaluator | None = None,
) -> None:
    """Train one stage from the model in ``start``; its results are written to ``folder``."""
    stage, begun = recipe.stages[name], time.time()
    set_seed(recipe.seed + list(recipe.stages).index(name))
    model = SailEmbeddingModel.from_pretrained(start)
    processor = SailEmbeddingProcessor.from_pretrained(start)
    weights = _weights(recipe, stage)
    drawn = {key: datasets[key] for key in weights}
    attach_heads(model, stage, drawn, start)
    freeze(model, stage, [stage.losses, *(dataset.losses for dataset in drawn.values())])
    looked_at = validation if stage.balance or stage.select else {}
    images, sounds = _caches(stage, model, processor, [*drawn.values(), *looked_at.values()])
    collate = Collator(processor, images, sounds, stage.field_dropout)
    _sign(folder, recipe.fingerprint(name))
    chosen = choose(stage, model, collate, drawn, weights, looked_at, folder, recipe.seed)
    model.temperatures.add({key: dataset.temperature for key, dataset in chosen.datasets.items()})
    trainer = _trainer(recipe, name, model, collate, chosen, folder)
    last = last_checkpoint(folder / "checkpoints")
    if last is not None and last.name == f"checkpoint-{stage.steps}":  # killed after its last step
        trainer.take_over(last)
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None  # on every rank
    if stage.lora is not None:
        if rank() == 0:
            trained.save_pretrained(folder / "adapter")
        trained = trained.merge_and_unload()
    if rank() == 0:
        _write_log(trainer, folder)
        save_whole(trained, processor, folder / "model", state, heads_in(start))
        entry = _entry(recipe, name, trainer, chosen, start, begun, folder)
        if evaluator is not None:
            entry["evaluation"] = evaluator(trained.eval(), processor)
        write_json(folder / "stage.json", entry)
    trainer.accelerator.wait_for_everyone()


def _sign(folder: Path, fingerprint: str) -> None:
    """What lies in the folder from now on is this recipe's."""
    if rank() == 0 and not (folder / "fingerprint").exists():
        write_text(folder / "fingerprint", fingerprint)


def _trainer(
    recipe: Recipe, name: str, model: SailEmbeddingModel, collate: Collator, chosen: Chosen, folder: Path
) -> ContrastiveTrainer:
    stage = recipe.stages[name]
    batches = SpecializedBatches(
        list(chosen.datasets.values()),
        collate,
        stage.batch_size,
        chosen.weights,
        seed=recipe.seed + list(recipe.stages).index(name),
        rank=rank(),
        world_size=world_size(),
        negatives=chosen.negatives,
    )
    trainer = ContrastiveTrainer(
        model,
        training_arguments(stage, folder, recipe.seed),
        objective=Objective(stage.losses, stage.options),
        token_budget=stage.token_budget,
        peft_config=lora_config(stage, model) if stage.lora else None,
        max_bad_share=stage.max_bad_share,
        train_dataset=batches,
        learning_rates=stage.learning_rates,
    )
    if chosen.negatives is not None and stage.mine is not None and stage.mine.every is not None:
        if trainer.is_fsdp_enabled:
            raise RecipeError(
                f"stages.{name}.mine.every: a model that ranks share (FSDP) cannot embed rows as it trains."
            )
        trainer.add_callback(Remining(trainer, chosen.datasets, stage.mine, chosen.negatives))
    return trainer


def _caches(
    stage: StageSpec,
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    datasets: Iterable[TrainingDataset],
) -> tuple[FeatureCache | None, FeatureCache | None]:
    if stage.feature_cache is None:
        return None, None
    for tower in ("vision_tower", "audio_tower"):
        module = getattr(model, tower)
        if module is not None and any(parameter.requires_grad for parameter in module.parameters()):
            raise RecipeError(f"feature_cache needs frozen towers; add '{tower}.*' to freeze.")
    with PartialState().main_process_first():  # the others read what the first one wrote
        return cache_media(model, processor, datasets, Path(stage.feature_cache))


def training_arguments(stage: StageSpec, folder: Path, seed: int) -> TrainingArguments:
    """A stage's settings as transformers takes them."""
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=stage.steps,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": stage.min_learning_rate},
        warmup_steps=round(stage.warmup_share * stage.steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        optim=stage.optimizer,
        gradient_checkpointing=stage.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if stage.gradient_checkpointing else None,
        bf16=stage.bf16,
        logging_steps=stage.logging_steps,
        logging_first_step=True,
        save_steps=stage.save_steps,
        save_total_limit=2,
        dataloader_num_workers=stage.workers,
        report_to=stage.report_to or "none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )


def attach_heads(
    model: SailEmbeddingModel, stage: StageSpec, datasets: Mapping[str, TrainingDataset], start: Path
) -> None:
    """Give the model what the stage's sequences and tables need; the heads of the stage before go on where they fit.

    Raises:
        ValueError: datasets have tables of one name and other lengths.
    """
    dims: dict[str, int] = {}
    for key, dataset in datasets.items():
        for name, table in dataset.tables.items():
            if dims.setdefault(name, table.dim) != table.dim:
                raise ValueError(f"Dataset {key!r}: its table {name!r} has {table.dim} dims, another's {dims[name]}.")
    if not dims and stage.sequence_encoder == "mean":
        return
    heads, before = BehaviourHeads(model.config.hidden_size, stage.sequence_encoder, dims), heads_in(start)
    if before is not None:
        logger.info("heads that go on from %s: %s", start, heads.take_over(before))
    model.heads = heads


def heads_in(folder: Path) -> BehaviourHeads | None:
    """The heads beside a model, if there are any."""
    return BehaviourHeads.from_pretrained(folder) if (folder / HEADS_FILE).is_file() else None


def detach_heads(model: SailEmbeddingModel, state: dict[str, torch.Tensor] | None = None) -> BehaviourHeads | None:
    """Take a model's heads off it: they are no part of its own weights; with their weights out of ``state``."""
    heads: BehaviourHeads | None = getattr(model, "heads", None)
    if heads is None:
        return None
    del model.heads
    if state is None:
        return heads
    sequence = "mean" if heads.sequence is None else "transformer"
    whole = BehaviourHeads(heads.width, sequence, heads.tables)
    own = {name: state.pop(name) for name in list(state) if name.startswith("heads.")}
    whole.load_state_dict({name.removeprefix("heads."): tensor for name, tensor in own.items()})
    return whole


def freeze(model: SailEmbeddingModel, stage: StageSpec, losses: list[Mapping[str, float]]) -> None:
    """Switch off gradients of what the stage freezes, and of the late-fusion gate where no term uses it."""
    gate_used = any(part.get("late_fusion", 0) > 0 for part in losses)
    patterns = [*stage.freeze, *([] if gate_used else ["late_fusion_gate.*"])]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatch(name, pattern) for pattern in patterns))


def lora_config(stage: StageSpec, model: nn.Module) -> Any:
    """A ``peft.LoraConfig``; parts that the model lacks, or that are frozen, are left out of what trains beside."""
    from peft import LoraConfig

    assert stage.lora is not None
    spec = stage.lora
    beside = [part for part in [*spec.train_too, "heads"] if getattr(model, part, None) is not None]
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        modules_to_save=[part for part in beside if any(p.requires_grad for p in getattr(model, part).parameters())],
    )


# --- what a stage leaves --------------------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole: the Trainer's state is written last, and must be readable."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end; it is passed over.", path)
            continue
        return path
    return None


def save_whole(
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
    before: BehaviourHeads | None = None,
) -> None:
    """Save both in Hub format, and heads beside them; the folder is there whole or not at all.

    Args:
        model, processor: what is saved; the model's heads are taken off it.
        folder: of both.
        state: where the ranks hold the weights.
        before: heads of the stage before; what this one had no use for is kept as it was.
    """
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    heads = detach_heads(model, state)
    if before is not None:
        heads = before if heads is None else heads.joined(before)
    if heads is not None:
        heads.save_pretrained(partial)
    model.save_pretrained(partial, state_dict=state)
    processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _is_done(folder: Path, fingerprint: str) -> bool:
    known = folder / "fingerprint"
    if known.is_file() and known.read_text(encoding="utf-8") != fingerprint:
        raise RecipeError(
            f"{folder} was trained by another recipe (datasets, model, seed or settings differ); "
            "set another output, or remove the folder."
        )
    return (folder / "stage.json").is_file() and (folder / "model" / "config.json").is_file()


def _entry(
    recipe: Recipe,
    name: str,
    trainer: ContrastiveTrainer,
    chosen: Chosen,
    start: Path,
    begun: float,
    folder: Path,
) -> dict[str, Any]:
    """What a model card says of the stage."""
    stage = recipe.stages[name]
    batches: Any = trainer.train_dataset
    seen = [batches.dataset_of(step) for step in range(stage.steps * stage.accumulation)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "stage": name,
        "fingerprint": recipe.fingerprint(name),
        "settings": asdict(stage),
        "seed": recipe.seed,
        "started_from": str(start),
        "datasets": {
            key: {
                "rows": None if dataset.streamed else len(dataset.source),
                "weight": float(batches.probabilities[place]),
                "batches": seen.count(place),
                "samples": seen.count(place) * stage.batch_size,
                "temperature": float(trainer.accelerator.unwrap_model(trainer.model).temperatures(key).detach()),
            }
            for place, (key, dataset) in enumerate(chosen.datasets.items())
        },
        "chosen": _reports(folder),
        "steps": trainer.state.global_step,
        "samples": stage.steps * stage.accumulation * stage.batch_size,
        "rows_skipped": len(trainer.skipped),
        "seconds": round(sum(json.loads(line)["seconds"] for line in _sessions(folder, begun)), 1),
        "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ranks": world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "weights_sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "model").glob("*.safetensors"))
        },
    }


def _reports(folder: Path) -> dict[str, Any]:
    """What choosing.py reported, by the file's place in the stage's folder."""
    found = [folder / "balance.json", folder / "selected" / "report.json", *folder.glob("negatives/*/report.json")]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(found)
        if path.is_file()
    }


def _sessions(folder: Path, begun: float) -> list[str]:
    """Lines of sessions.jsonl, this session's added: a run that was killed and resumed has several."""
    path = folder / "sessions.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"began": begun, "seconds": time.time() - begun}) + "\n")
    return path.read_text(encoding="utf-8").splitlines()


def _write_log(trainer: ContrastiveTrainer, folder: Path) -> None:
    write_json(folder / "log.json", trainer.state.log_history)
