"""What two gloo ranks do in tests: run by torchrun, writes its parameters for the one-process run to compare with.

torchrun --nproc_per_node 2 -m tests.ranks CASE OUT, or recipe RECIPE, or leave, or fail [command]
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from modeling_sail.training import stages
from modeling_sail.training.__main__ import main as run_training
from modeling_sail.training.build import build_tiny
from modeling_sail.training.collate import Collator
from modeling_sail.training.distributed import leave, rank, world_size
from modeling_sail.training.objective import TERMS, Objective
from modeling_sail.training.recommendation.tables import IDTable
from modeling_sail.training.rows import Row, TrainingDataset
from modeling_sail.training.sampler import SpecializedBatches
from modeling_sail.training.trainer import ContrastiveTrainer
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from modeling_sail.behaviour_heads_sail import BehaviourHeads
from modeling_sail.cli import main as run_command

from .conftest import picture, sound

# Adam divides a gradient by itself and so makes a step of what is rounding; the films of sequences are so alike that
# there is much of it. Descent along the (clipped) gradient shows the gradient.
DESCENT: dict[str, dict[str, Any]] = {"sequences": {"arguments": {"optim": "sgd", "learning_rate": 0.1}}}
EVERY_TERM = dict.fromkeys(TERMS, 0.5)


def ragged_rows(kind: str = "mixed") -> list[Row]:
    """Sixteen rows of every mixture; "halves": pictures and sounds in the first half of the rows alone."""
    chooser = random.Random(0)
    rows = []
    for n in range(16):
        media: dict[str, Any] = {"image": picture(n), "audio": sound(n)}
        few = {name: value for name, value in media.items() if chooser.random() < 0.6 and (kind == "mixed" or n < 8)}
        query = {"id": f"q{n}", "title": f"query {n} " * chooser.randint(1, 5), **few}
        target = {"id": f"t{n}", "title": f"target {n // 2}", **({"image": picture(99 - n)} if "image" in few else {})}
        negatives = tuple({"title": f"negative {n} {k}"} for k in range(n % 3))
        scores = tuple(chooser.random() for _ in range(1 + len(negatives)))
        rows.append(Row(f"r{n}", query, target, f"t{n // 2}", negatives, ("x",) * len(negatives), n / 16, scores))
    return rows


def sequence_rows() -> list[Row]:
    """Sixteen sequences of one to five of twelve items and the item after them; ranks share items."""
    items = [{"id": f"i{n}", "title": f"film {n} " * (1 + n % 4)} for n in range(12)]
    chooser = random.Random(1)
    rows = []
    for n in range(16):
        *sequence, target = chooser.sample(items, chooser.randint(2, 6))
        rows.append(Row(f"r{n}", tuple(sequence), target, target["id"]))
    return rows


def id_tables() -> dict[str, IDTable]:
    """Two tables of other lengths; each knows some of the items of `ragged_rows` and `sequence_rows`."""
    names = [f"{letter}{n}" for letter in "qti" for n in range(16)]
    numbers = np.random.default_rng(0)
    tables = {"als": (names[::2], 5), "my.bpr": (names[5:], 9)}
    return {
        name: IDTable(name, tuple(ids), numbers.normal(size=(len(ids), dim)).astype(np.float32))
        for name, (ids, dim) in tables.items()
    }


def trainer(folder: Path, steps: int = 3, kind: str = "mixed", batch_size: int = 16, **options: Any) -> Any:
    """A trainer of the tiny model on the sixteen rows, all alike but for the options."""
    torch.manual_seed(0)
    model, processor = build_tiny()
    torch.manual_seed(1)
    patterns = ("ITC", "IIC", "TTC", "OOC", "ATC")
    rows = sequence_rows() if kind == "sequences" else ragged_rows(kind)
    dataset = TrainingDataset("default", rows, tasks=("i2i",), patterns=patterns, tables=id_tables())
    dims = {name: table.dim for name, table in dataset.tables.items()}
    model.heads = BehaviourHeads(model.config.hidden_size, "transformer" if kind == "sequences" else "mean", dims)
    if model.heads.sequence is not None:  # else its layers have no gradient at first
        torch.nn.init.normal_(model.heads.sequence.output.weight, std=0.05)
    batches = SpecializedBatches(
        [dataset], Collator(processor), batch_size, seed=1, rank=rank(), world_size=world_size()
    )
    if kind == "halves":
        batches._order = lambda index, epoch: torch.arange(16).numpy()
    settings = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "save_strategy": "no",
        **options.pop("arguments", {}),
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )
    return ContrastiveTrainer(
        model, arguments, objective=options.pop("objective", Objective(EVERY_TERM)), train_dataset=batches, **options
    )


def main() -> None:
    """One rank; it fails where a thread of its process group is left, which may abort the interpreter's end."""
    if sys.argv[1] == "recipe":
        status = run_training([sys.argv[2]])
    elif sys.argv[1] == "leave":
        status = 0
        _work_on()
        leave()
    elif sys.argv[1] == "fail":
        stages.run_recipe = _fail
        status = (run_command(["train", "mini"]) if sys.argv[2:] else run_training(["mini"])) != 2
    else:
        status = 0
        _train(sys.argv[1], Path(sys.argv[2]))
        leave()
    sys.exit(status or not _no_threads())


def _no_threads() -> bool:
    """Whether no thread of a process group is left."""
    names = []
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # one of torch's that ends just now
            names.append(Path(thread, "comm").read_text())
    return not any("gloo" in name for name in names)


def _fail(recipe: object) -> None:
    """A training that ends by an error, which holds what its functions held."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]
    raise ValueError("a stage fails")


def _work_on() -> None:
    """What a trainer leaves at worst: it lies in a cycle, and gloo's thread frees a last tensor late."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]
    time.sleep(2 * rank())  # the first to leave has to wait for the other's part
    dist.all_reduce(torch.ones(4), async_op=True)


def _train(case: str, out: Path) -> None:
    dist.init_process_group("gloo")
    kind, _, budget = case.partition("-")
    run = trainer(
        out.parent / "ranks", kind=kind, token_budget=int(budget) if budget else None, **DESCENT.get(kind, {})
    )
    run.train()
    if rank() == 0:
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        torch.save({"model": run.accelerator.unwrap_model(run.model).state_dict(), "losses": losses}, out)
    dist.barrier()


if __name__ == "__main__":
    main()
