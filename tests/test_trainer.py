"""The training step: whole = cached = two ranks, in gradient and in parameters; adapters, accumulation, broken rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from modeling_sail.training.collate import Collator
from modeling_sail.training.distributed import leave
from modeling_sail.training.grad_cache import Replay, micro_batches, select
from modeling_sail.training.objective import TERMS, Objective, Options
from modeling_sail.training.rows import Row, TrainingDataset
from modeling_sail.training.sampler import SpecializedBatches

from .conftest import seven_items
from .ranks import DESCENT, EVERY_TERM, ragged_rows, trainer

ROOT = Path(__file__).parent.parent


def trained(folder, **options):
    run = trainer(folder, **options)
    run.train()
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three steps of one process with every term, the batch encoded at once."""
    return trained(tmp_path_factory.mktemp("whole"))


def assert_same(found, wanted, tolerance=2e-5) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_every_term_counts_and_is_logged(whole) -> None:
    logged = whole[1].state.log_history[0]
    assert {f"loss/{name}" for name in TERMS} <= set(logged)
    assert {
        "loss/patterns/ITC",
        "loss/patterns/OOC",
        "temperature/default",
        "items_per_second",
        "tokens_per_second",
    } <= set(logged)
    assert logged["loss"] == pytest.approx(0.5 * sum(logged[f"loss/{name}"] for name in TERMS), abs=1e-3)
    assert all(logged[f"loss/{name}"] > 0 for name in TERMS)
    assert "grad_norm" in logged


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_cached_gradients_train_to_the_same_parameters(whole, tmp_path, budget) -> None:
    assert_same(trained(tmp_path, token_budget=budget)[0], whole[0])


def gradients(run):
    """Gradients of one step on the first batch."""
    run.create_optimizer_and_scheduler(1)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    run.model.zero_grad()
    torch.manual_seed(3)
    run.training_step(run.model, run.train_dataset.batch(0))
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def test_every_part_has_a_gradient_and_caching_does_not_change_it(tmp_path) -> None:
    direct, cached = (gradients(trainer(tmp_path, token_budget=budget)) for budget in (None, 80))
    assert (
        set(direct)
        == set(cached)
        == {name for name, p in trainer(tmp_path).model.named_parameters() if p.requires_grad}
    )
    zero = [name for name, gradient in direct.items() if not gradient.any()]
    assert not [name for name in zero if "k_proj.bias" not in name and "key.bias" not in name], zero
    assert_same(cached, direct)


def test_dropout_is_replayed_in_the_second_pass(tmp_path) -> None:
    run = trainer(tmp_path, token_budget=80)
    dropped = []

    def hook(module, inputs, output):
        output = torch.nn.functional.dropout(output, 0.5, training=True)
        dropped.append(output.detach() == 0)
        return output

    run.model.perceiver.output.register_forward_hook(hook)
    gradients(run)
    half = len(dropped) // 2
    assert half >= 2
    assert all(torch.equal(one, other) for one, other in zip(dropped[:half], dropped[half : 2 * half], strict=True))
    assert not torch.equal(dropped[0][:1], dropped[1][:1])


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_caching_works_with_checkpointing_and_mixed_precision(tmp_path, changes) -> None:
    runs = [gradients(trainer(tmp_path, token_budget=budget, arguments=changes)) for budget in (None, 80)]
    plain = gradients(trainer(tmp_path))
    tolerance = 5e-2 if "bf16" in changes else 2e-5
    assert_same(runs[1], runs[0], tolerance)
    if "bf16" not in changes:
        assert_same(runs[0], plain)


def test_adapters_train_with_cached_gradients_and_the_backbone_stays(tmp_path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=r".*text_tower.*q_proj", modules_to_save=["perceiver", "temperatures"])
    direct, cached = (trained(tmp_path, peft_config=config, token_budget=budget) for budget in (None, 60))
    assert_same(cached[0], direct[0])
    fresh = trainer(tmp_path, peft_config=config).model.state_dict()
    moved = {name for name, tensor in direct[0].items() if not torch.equal(tensor, fresh[name])}
    assert any("lora_B" in name for name in moved)
    assert any("modules_to_save" in name and "perceiver" in name for name in moved)
    assert all("lora" in name or "modules_to_save" in name for name in moved)


def test_accumulated_batches_equal_one_batch_where_the_loss_is_a_mean_over_rows(tmp_path) -> None:
    """8 x 1 equals 1 x 8 there alone: in-batch negatives do not reach across batches; a larger batch with a token
    budget is the way to more of them.
    """
    rowwise = Objective({"listwise": 1.0, "ranknet": 1.0})
    results = []
    for size in (16, 2):
        run = trainer(
            tmp_path,
            1,
            batch_size=size,
            objective=rowwise,
            arguments={"gradient_accumulation_steps": 16 // size, "optim": "sgd"},
        )
        rows = [row for row in ragged_rows() if row.negatives][:8]  # two candidates at least: every row counts alike
        dataset = TrainingDataset("default", rows + rows, tasks=("i2i",))
        run.train_dataset = SpecializedBatches([dataset], run.train_dataset.collate, size, seed=1)
        run.train()
        results.append(run.model.state_dict())
    assert_same(*results)


def run_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `tests.ranks`."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        + ["-m", "tests.ranks", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_ranks_leave_when_a_last_tensor_is_freed_late() -> None:
    """Python's lock and the group's threads waited for each other when it was the collection that ended the group."""
    done = run_ranks("leave")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(("backend", "failed", "ended"), [("nccl", True, 0), ("nccl", False, 1), ("gloo", True, 1)])
def test_the_group_of_a_failed_rank_is_not_waited_for_on_nccl(monkeypatch, backend, failed, ended) -> None:
    done: list[str] = []
    group = SimpleNamespace(_device_types=["cuda"], _get_backend=lambda kind: kind)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    leave(failed)
    assert len(done) == ended


@pytest.mark.parametrize("command", [[], ["command"]])
def test_a_training_that_fails_leaves_too(command) -> None:
    done = run_ranks("fail", *command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("sail train: a stage fails") == 2


@pytest.mark.parametrize("case", ["mixed", "halves", "sequences", "mixed-60", "halves-60", "sequences-60"])
def test_two_ranks_train_like_one_process_on_the_whole_batch(tmp_path, case) -> None:
    kind, _, budget = case.partition("-")
    out = tmp_path / "ranks.pt"
    done = run_ranks(case, str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(out, weights_only=True)
    wanted, run = trained(tmp_path / "one", kind=kind, **DESCENT.get(kind, {}))
    assert_same(found["model"], wanted, 5e-5)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert found["losses"] == pytest.approx(losses, abs=2e-3)


# --- micro-batches --------------------------------------------------------------------------------------------------


def test_selected_items_embed_as_in_the_whole_batch(tiny) -> None:
    model, processor = tiny
    model.eval()
    items = processor(seven_items())
    with torch.inference_mode():
        expected = model(**items).embeddings
        for places in ([3], [6, 0, 1], [2, 5, 4], [0], list(range(7))[::-1]):
            found = model(**select(items, torch.tensor(places))).embeddings
            torch.testing.assert_close(found, expected[places], atol=1e-5, rtol=0)


def test_micro_batches_hold_every_item_once_within_the_budget(tiny) -> None:
    items = tiny[1](seven_items())
    lengths = items["attention_mask"].sum(dim=1)
    for budget in (1, 150, 500, 10_000):
        cuts = micro_batches(items, budget)
        assert sorted(torch.cat(cuts).tolist()) == list(range(7))
        padded = [int(lengths[cut].max()) * len(cut) for cut in cuts]
        assert all(size <= budget or len(cut) == 1 for size, cut in zip(padded, cuts, strict=True))
    assert len(micro_batches(items, 10_000)) == 1
    with pytest.raises(ValueError, match="token_budget=0"):
        micro_batches(items, 0)


def test_replay_leaves_the_random_state_as_it_was() -> None:
    replay = Replay(torch.device("cpu"))
    replay.record()
    first = torch.rand(3)
    before = torch.get_rng_state()
    with replay.again(0):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


# --- rows that cannot be read ---------------------------------------------------------------------------------------


def broken_rows(bad: int) -> TrainingDataset:
    rows = [
        Row(f"r{n}", {"title": "q"}, {"image": f"none{n}.png"} if n < bad else {"title": f"t{n}"}, f"t{n}")
        for n in range(40)
    ]
    return TrainingDataset("default", rows)


def test_unreadable_rows_are_left_out_counted_and_written_down(tiny, tmp_path) -> None:
    run = trainer(tmp_path, steps=5, objective=Objective())
    run.train_dataset = SpecializedBatches([broken_rows(5)], Collator(tiny[1]), 8, seed=0)
    run.train()
    assert run.skipped == {f"r{n}" for n in range(5)}
    written = (tmp_path / "skipped-0.jsonl").read_text()
    assert written.count("\n") == 5
    assert "target: image: " in written
    assert run.state.log_history[-2]["rows_skipped"] == 5


def test_too_many_unreadable_rows_stop_the_run(tiny, tmp_path) -> None:
    run = trainer(tmp_path, steps=5, objective=Objective())
    run.train_dataset = SpecializedBatches([broken_rows(20)], Collator(tiny[1]), 8, seed=0)
    with pytest.raises(RuntimeError, match=r"rows of \d+ could not be read, more than 5%"):
        run.train()


def test_a_batch_without_one_good_row_takes_others_and_then_says_so(tiny) -> None:
    batches = SpecializedBatches([broken_rows(40)], Collator(tiny[1]), 2, seed=0)
    with pytest.raises(RuntimeError, match="not one of 6 rows could be read. The last: r"):
        batches.batch(0)


def test_a_broken_negative_costs_the_negative_alone(tiny) -> None:
    negatives = ({"title": "fine"}, {"image": "none.png"}, {"title": "same"})
    row = Row("r", {"title": "q"}, {"title": "t"}, "t", negatives, ("a", "b", "t"), None, (3.0, 2.0, 1.0, 0.0))
    batches = SpecializedBatches([TrainingDataset("default", [row])], Collator(tiny[1]), 1)
    batch = batches.batch(0)
    assert batch["negative_slots"].tolist() == [[0, 0], [0, 2]]
    assert batch["negative_mask"].tolist() == [True, False]  # the last is the target itself
    assert batch["teacher_scores"].nan_to_num(-1).tolist() == [[3.0, 2.0, -1.0, 0.0]]
    assert [name for name, _ in batch["skipped"]] == ["r"]


# --- objective ------------------------------------------------------------------------------------------------------


def test_weights_of_unknown_terms_or_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="no loss term 'nec'; there are nce, cosent"):
        Objective({"nec": 1.0})
    with pytest.raises(ValueError, match="weight of 'nce' is -1"):
        Objective({"nce": -1})


def test_a_dataset_without_anything_for_its_terms_is_told(tiny, tmp_path) -> None:
    run = trainer(tmp_path, steps=20, objective=Objective({"cosent": 1.0}))
    rows = [Row(f"r{n}", {"title": "q"}, {"title": f"t{n}"}, f"t{n}") for n in range(8)]
    run.train_dataset = SpecializedBatches([TrainingDataset("default", rows)], Collator(tiny[1]), 4)
    with pytest.raises(
        ValueError, match="10 batches in a row of dataset 'default' have nothing that the terms \\['cosent'\\]"
    ):
        run.train()


def test_a_datasets_own_weights_come_first() -> None:
    objective = Objective({"nce": 1.0, "micl": 0.5}, Options(micl_audio=True))
    batch = {"losses": {"micl": 0.0, "cosent": 2.0}, "patterns": []}
    assert objective.weights_for(batch) == {"nce": 1.0, "cosent": 2.0}
    assert objective.kinds(batch) == {"fused"}
    assert objective.kinds({"losses": {}, "patterns": []}) == {"fused", "vision", "text", "audio"}
    assert EVERY_TERM.keys() == TERMS.keys()
