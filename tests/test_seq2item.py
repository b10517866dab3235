"""Sequences and ID embeddings in a training step: items encoded once, places, heads, terms, recipes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.collate import Collator
from modeling_sail.training.losses import relational_divergence
from modeling_sail.training.objective import Objective, Options, Step, in_places
from modeling_sail.training.recipe import RecipeError, load_recipe
from modeling_sail.training.recommendation.tables import IDTable, save_tables
from modeling_sail.training.rows import Row, RowError, TrainingDataset, as_row
from modeling_sail.training.sampler import Draw, SpecializedBatches
from modeling_sail.training.stages import run_recipe
from modeling_sail.training.survey import survey
from safetensors import safe_open
from torch.nn import functional as F  # noqa: N812

from modeling_sail.behaviour_heads_sail import FILE_NAME, BehaviourHeads, mean_of_sequence

from .ranks import id_tables, sequence_rows, trainer

ITEMS = {
    f"i{n}": {"id": f"i{n}", "title": f"film {n} " * (1 + n % 3), "nickname": f"author {n % 3}"} for n in range(12)
}


def draw_of(rows, tables=None, items=None, task=None) -> Draw:
    dataset = TrainingDataset("films", rows, tasks=(task,), tables=tables or {}, items=items)
    generators = [random.Random(n) for n in range(len(rows))]
    return Draw(dataset, task, rows, generators, [], len(rows))


def film_rows(*sequences) -> list[Row]:
    """A row of each (items of the sequence..., target), by number."""
    return [
        Row(f"r{n}", tuple(ITEMS[f"i{item}"] for item in some[:-1]), ITEMS[f"i{some[-1]}"], f"i{some[-1]}")
        for n, some in enumerate(sequences)
    ]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_names_items_by_their_ids_where_there_is_a_table() -> None:
    row = as_row({"sequence": ["i3", "i1"], "target": "i2", "negatives": ["i5"]}, "r", items=ITEMS)
    assert row.query == (ITEMS["i3"], ITEMS["i1"])
    assert row.queries == row.query
    assert (row.target, row.target_id, row.negative_ids) == (ITEMS["i2"], "i2", ("i5",))
    alone = as_row({"item": "i4"}, "r", items=ITEMS)
    assert alone.query is alone.target is ITEMS["i4"]
    assert alone.queries == (ITEMS["i4"],)


def test_a_sequence_may_hold_the_items_themselves() -> None:
    row = as_row({"sequence": [{"title": "a"}, '{"title": "b"}'], "target": "c"}, "r")
    assert row.query == ({"title": "a"}, {"title": "b"})


def test_ids_without_a_table_of_items_are_not_read_as_texts() -> None:
    for record in ({"sequence": ["i1", "i2"], "target": "i3"}, {"item": "i1"}):
        with pytest.raises(RowError, match="for ids, the dataset needs its table of items"):
            as_row(record, "r")


def test_ids_may_be_numbers_of_numpy() -> None:
    items = {"3": {"id": "3", "title": "three"}, "4": {"id": "4", "title": "four"}}
    row = as_row({"sequence": np.array([3, 4]), "target": np.int64(4)}, "r", items=items)
    assert [item["id"] for item in row.query] == ["3", "4"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"sequence": ["i1", "i77"], "target": "i2"}, "sequence: there is no item 'i77' among the 12"),
        ({"sequence": [], "target": "i2"}, "sequence is empty"),
        ({"sequence": "i1", "target": "i2"}, "sequence must be a list of items, got str"),
        ({"sequence": ["i1"], "query": "i3", "target": "i2"}, "query and sequence are given"),
        ({"item": "i1", "target": "i2"}, "item are given; a row has"),
        ({"sequence": ["i1"]}, "target must be the id of an item.*it is None"),
        ({"query": {"title": "x"}, "target": "i2"}, "query must be the id of an item"),
        ({"sequence": ["i1", None], "target": "i2"}, "sequence must be the id of an item.*it is None"),
    ],
)
def test_a_row_that_cannot_be_says_why(record, reason) -> None:
    with pytest.raises(RowError, match=reason):
        as_row(record, "r", items=ITEMS)


def test_sequences_are_not_surveyed(tiny, tmp_path) -> None:
    dataset = TrainingDataset("films", film_rows((0, 1), (2, 3)))
    with pytest.raises(ValueError, match="its query is a sequence, not an item: leave the dataset out of mine"):
        survey(*(tiny[0], Collator(tiny[1])), dataset, tmp_path)


# --- one batch ------------------------------------------------------------------------------------------------------


def test_every_item_of_a_step_is_encoded_once(tiny) -> None:
    batch = Collator(tiny[1])(draw_of(film_rows((0, 1, 2), (1, 2, 3), (3, 2, 1, 0))))
    assert len(batch["items"]["attention_mask"]) == 4  # i0 .. i3, in eleven places
    assert len(batch["members"]) == 10
    assert batch["owners"].tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 4, 5]
    assert not batch["parts"][:3].any() and batch["parts"][3:].any(dim=1).all()  # sequences have no single modality


def test_one_item_under_two_instructions_is_encoded_twice(tiny) -> None:
    batch = Collator(tiny[1])(draw_of(film_rows((0, 1), (1, 0)), task="i2i"))
    assert len(batch["items"]["attention_mask"]) == 4
    batch = Collator(tiny[1])(draw_of([Row("r", ITEMS["i0"], ITEMS["i0"], "i0")]))
    assert len(batch["items"]["attention_mask"]) == 1
    assert batch["members"].tolist() == [0, 0]


def test_an_item_that_cannot_be_read_leaves_the_rest_of_its_sequence(tiny) -> None:
    broken = {"id": "x", "image": "none.png"}
    rows = film_rows((0, 1, 2), (3, 4), (5, 6))
    rows[0] = Row("r0", (ITEMS["i0"], broken, ITEMS["i1"]), ITEMS["i2"], "i2")
    rows[1] = Row("r1", (broken,), ITEMS["i4"], "i4")
    rows[2] = Row("r2", (ITEMS["i5"],), broken, "x")
    batch = Collator(tiny[1])(draw_of(rows))
    assert batch["owners"].tolist() == [0, 0, 1]
    assert [name for name, _ in batch["skipped"]] == ["item x", "r1", "r2"]  # of the first row an item alone is lost
    assert all("none.png" in reason for _, reason in batch["skipped"])


def test_dropped_fields_are_dropped_once_for_all_places_of_an_item(tiny) -> None:
    batch = Collator(tiny[1], field_dropout=0.5)(draw_of(film_rows(*[(0, 1, n) for n in range(2, 8)])))
    assert len(batch["items"]["attention_mask"]) == 8
    nameless = [
        Row(f"r{n}", ({"title": "a", "ocr": "b"}, {"title": "c", "ocr": "d"}), {"title": "e"}, "e") for n in range(6)
    ]
    assert len(Collator(tiny[1], field_dropout=0.5)(draw_of(nameless))["items"]["attention_mask"]) == 3


def test_what_is_dropped_of_a_shared_item_is_the_same_on_every_rank(tiny) -> None:
    rows = TrainingDataset("films", sequence_rows())
    batches = [
        SpecializedBatches([rows], Collator(tiny[1], field_dropout=0.5), 16, seed=3, rank=n, world_size=2)
        for n in (0, 1)
    ]
    whole = SpecializedBatches([rows], Collator(tiny[1], field_dropout=0.5), 16, seed=3).batch(4)
    known = {
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(*(whole["items"][k] for k in ("input_ids", "attention_mask")), strict=True)
    }
    for part in (one.batch(4) for one in batches):
        ids, mask = part["items"]["input_ids"], part["items"]["attention_mask"]
        assert {tuple(line[there.bool()].tolist()) for line, there in zip(ids, mask, strict=True)} <= known


def test_a_sequence_of_one_item_is_a_sequence(tiny) -> None:
    batch = Collator(tiny[1])(draw_of(film_rows((0, 1), (2, 3, 4))))
    heads = BehaviourHeads(8, "transformer")
    torch.nn.init.normal_(heads.sequence.output.weight)
    items = torch.randn(len(batch["items"]["attention_mask"]), 8)
    places = in_places(items, batch["members"], batch["owners"], batch["sequences"], heads)
    torch.testing.assert_close(places[0], heads.encode_sequence(items[None, :1], torch.ones(1, 1).bool())[0])
    assert not torch.allclose(places[0], F.normalize(items[0], dim=0), atol=1e-2)


def test_heads_keep_their_weights_in_bfloat16() -> None:
    heads = BehaviourHeads(32, "transformer", {"a": 5}).bfloat16()
    assert heads.project("a", torch.randn(3, 5)).dtype == torch.float32
    assert heads.encode_sequence(torch.randn(2, 3, 32), torch.ones(2, 3).bool()).isfinite().all()


def test_a_batch_brings_the_id_embeddings_of_its_items(tiny) -> None:
    table = IDTable("als", ("i1", "i9", "i3"), np.eye(3, dtype=np.float32))
    batch = Collator(tiny[1])(draw_of(film_rows((0, 1), (2, 3)), tables={"als": table}))
    assert batch["table_rows"]["als"].tolist() == [False, False, True, True]  # i0, i2, then the targets
    assert batch["tables"]["als"][2:].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert len(set(batch["item_ids"].tolist())) == 4


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=8))
def test_places_are_items_or_means_of_sequences(lists) -> None:
    items = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    members = torch.tensor([member for some in lists for member in some])
    owners = torch.tensor([owner for owner, some in enumerate(lists) for _ in some])
    sequences = torch.tensor([len(some) > 1 or place % 2 == 0 for place, some in enumerate(lists)])
    found = in_places(items, members, owners, sequences, BehaviourHeads(6))
    for place, some in enumerate(lists):
        wanted = F.normalize(items[some], dim=1).mean(dim=0) if sequences[place] else items[some[0]]
        torch.testing.assert_close(found[place], wanted)


# --- heads ----------------------------------------------------------------------------------------------------------


def test_a_transformer_begins_as_the_mean_and_then_minds_the_order() -> None:
    torch.manual_seed(0)
    heads = BehaviourHeads(32, "transformer")
    items, mask = torch.randn(3, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    torch.testing.assert_close(heads.encode_sequence(items, mask), mean_of_sequence(items, mask))
    torch.nn.init.normal_(heads.sequence.output.weight)
    found = heads.encode_sequence(items, mask)
    torch.testing.assert_close(heads.encode_sequence(items[1:2, :2], mask[1:2, :2]), found[1:2])  # padding says nothing
    assert not torch.allclose(heads.encode_sequence(items.flip(1), mask.flip(1))[0], found[0], atol=1e-3)
    assert len(heads.sequence.layers.layers) == 3


def test_a_projection_keeps_cosines_where_training_begins() -> None:
    heads = BehaviourHeads(48, tables={"my.als": 16})
    vectors = torch.randn(9, 16)
    found, wanted = (F.normalize(part, dim=1) for part in (heads.project("my.als", vectors), vectors))
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no projection for the table 'bpr'; there are \\['my.als'\\]"):
        heads.project("bpr", vectors)
    with pytest.raises(ValueError, match="vectors of 15 dims; its projection takes 16"):
        heads.project("my.als", vectors[:, :15])


def test_heads_are_saved_beside_a_model_and_go_on(tmp_path) -> None:
    heads = BehaviourHeads(32, "transformer", {"a.b": 5, "c": 7})
    heads.save_pretrained(tmp_path)
    loaded = BehaviourHeads.from_pretrained(tmp_path)
    assert loaded.tables == heads.tables
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    other = BehaviourHeads(32, "mean", {"c": 7, "a.b": 6})
    assert other.take_over(loaded) == ["c"]
    assert torch.equal(other.project("c", torch.ones(1, 7)), heads.project("c", torch.ones(1, 7)))
    BehaviourHeads(32).save_pretrained(tmp_path)  # nothing to train is a kind, too
    assert not list(BehaviourHeads.from_pretrained(tmp_path).parameters())
    with pytest.raises(ValueError, match="'lstm' is not one of mean, transformer"):
        BehaviourHeads(32, "lstm")


# --- terms ----------------------------------------------------------------------------------------------------------


def step_of(items, vectors, rows, weights, heads=None) -> tuple[torch.Tensor, dict]:
    ids = torch.arange(len(items))
    batch = {
        "target_ids": ids[:0],
        "item_ids": ids,
        "said_ids": ids,
        "tables": {"t": vectors},
        "table_rows": {"t": rows},
    }
    batch |= {"losses": {}, "patterns": []}
    options = Options(matryoshka=False, symmetric=False)
    step = Step({"fused": items}, batch, [items.shape[1]], torch.tensor(1.0), options, heads)
    return Objective(weights, options)(step)


def test_id2item_is_the_nce_with_the_projected_ids_of_items_that_have_a_row() -> None:
    torch.manual_seed(0)
    heads = BehaviourHeads(8, tables={"t": 4})
    items, vectors, rows = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(6, 4),
        torch.tensor([1, 1, 0, 1, 0, 1]).bool(),
    )
    loss, terms = step_of(items, vectors, rows, {"id2item": 1.0}, heads)
    there = rows.nonzero()[:, 0]
    scores = F.normalize(items[there], dim=1) @ F.normalize(heads.project("t", vectors[there]), dim=1).T
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.arange(4)))
    loss.backward()
    assert items.grad[there].abs().sum(dim=1).gt(0).all()
    assert not items.grad[~rows].any()  # no row in the table: not a positive, not a negative
    assert heads.projections[0].weight.grad.any()
    assert set(terms) == {"id2item", "id2item/t"}


def test_relations_are_zero_where_both_spaces_have_the_same_cosines() -> None:
    vectors = torch.randn(7, 4)
    turned = vectors @ torch.linalg.qr(torch.randn(4, 4))[0] * 3
    loss, _ = step_of(turned, vectors, torch.ones(7).bool(), {"id_relations": 1.0})
    assert float(loss) == pytest.approx(0, abs=1e-6)
    other, _ = step_of(torch.randn(7, 4), vectors, torch.ones(7).bool(), {"id_relations": 1.0})
    assert float(other) > 0.01


def test_relational_divergence_of_two_neighbours_by_hand() -> None:
    unit = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    flat = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # its neighbours are all alike
    mask = ~torch.eye(3, dtype=torch.bool)
    found = relational_divergence(flat[:1], flat, unit[:1], unit, mask[:1], temperature=1.0)
    wanted = torch.tensor([1.0, 0.0]).softmax(dim=0)
    torch.testing.assert_close(found, (wanted * (wanted / 0.5).log()).sum())


def test_tables_need_heads() -> None:
    with pytest.raises(ValueError, match="need the model's heads"):
        step_of(torch.randn(3, 8), torch.randn(3, 4), torch.ones(3).bool(), {"id2item": 1.0})


# --- trained --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_cached_gradients_of_sequences_are_the_direct_ones(tmp_path, budget) -> None:
    found = []
    for given_budget in (None, budget):
        run = trainer(tmp_path, kind="sequences", token_budget=given_budget, arguments={"optim": "sgd"}, steps=2)
        run.train()
        found.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
    fresh = trainer(tmp_path, kind="sequences").model.state_dict()
    moved = {name for name, tensor in fresh.items() if not torch.equal(tensor, found[0][name])}
    assert {"heads.projections.0.weight", "heads.sequence.special", "heads.sequence.output.weight"} <= moved
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_train_the_heads_beside_them(tmp_path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=r".*text_tower.*q_proj", modules_to_save=["heads", "temperatures"])
    run = trainer(tmp_path, kind="sequences", peft_config=config)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss/id2item" in entry]
    assert logged[-1]["loss/id2item"] < logged[0]["loss/id2item"]
    state = run.model.state_dict()
    assert any("heads" in name and "modules_to_save" in name for name in state)


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """A recipe of sequences, then of ID embeddings, over a table of films."""
    items = [{**item, "labels": ["a"]} for item in ITEMS.values()]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "items.parquet")
    sequences = [
        {"id": row.id, "sequence": [item["id"] for item in row.query], "target": row.target["id"]}
        for row in sequence_rows()
    ]
    pq.write_table(pa.Table.from_pylist(sequences), tmp_path / "sequences.parquet")
    pq.write_table(
        pa.Table.from_pylist([{"id": name, "item": name} for name in list(ITEMS)[:9]]), tmp_path / "ids.parquet"
    )
    save_tables(id_tables().values(), tmp_path / "tables.parquet")
    content = {
        "model": str(tiny_folder),
        "output": str(tmp_path / "out"),
        "datasets": {
            "sequences": {"path": "sequences.parquet", "items": "items.parquet"},
            "ids": {
                "path": "ids.parquet",
                "items": "items.parquet",
                "tables": ["tables.parquet"],
                "losses": {"nce": 0, "id2item": 1, "id_relations": 0.5},
            },
        },
        "defaults": {
            "batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "sequence_encoder": "transformer",
        },
        "stages": {
            "seq2item": {"datasets": {"sequences": 1}, "steps": 4},
            "id2item": {"datasets": {"ids": 2, "sequences": 1}, "steps": 4, "learning_rates": {"heads.*": 1e-2}},
        },
    }
    path = tmp_path / "cre.yaml"
    path.write_text(json.dumps(content))
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_stages_leave_heads_beside_the_model_and_the_next_goes_on_with_them(recipe, tmp_path) -> None:
    folder = run_recipe(load_recipe(recipe))
    first, second = (tmp_path / "out" / name / "model" for name in ("seq2item", "id2item"))
    assert not [name for name in weights(folder / "model.safetensors") if name.startswith("heads.")]
    sequence, both = weights(first / FILE_NAME), weights(second / FILE_NAME)
    assert {name for name in sequence} < set(both)
    assert {"projections.0.weight", "projections.1.weight"} <= set(both)
    # One draw in three is of sequences: their encoder went on from where it was, and moved on a little.
    special = "sequence.output.weight"
    assert sequence[special].any()
    assert 0 < (both[special] - sequence[special]).abs().max() < sequence[special].abs().max() * 20
    logged = json.loads((tmp_path / "out" / "id2item" / "log.json").read_text())
    assert any("loss/id2item/my.bpr" in line for line in logged)


def test_heads_that_a_stage_has_no_use_for_are_kept(recipe, tmp_path) -> None:
    options = ["stages.id2item.sequence_encoder=mean", "stages.id2item.datasets={ids: 1}", "stages.id2item.steps=2"]
    folder = run_recipe(load_recipe(recipe, options))
    before, after = weights(tmp_path / "out" / "seq2item" / "model" / FILE_NAME), weights(folder / FILE_NAME)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(after) > set(before)


def test_a_table_that_knows_no_item_is_refused(recipe, tmp_path) -> None:
    save_tables([IDTable("als", ("film_1", "film_2"), np.eye(2, dtype=np.float32))], tmp_path / "tables.parquet")
    with pytest.raises(ValueError, match="datasets.ids.tables: not one of the 2 ids of table 'als', such as 'film_1'"):
        run_recipe(load_recipe(recipe))


def test_a_stage_with_heads_resumes_to_the_same_parameters(recipe, tmp_path) -> None:
    whole = run_recipe(load_recipe(recipe))
    wanted = weights(whole / "model.safetensors") | weights(whole / FILE_NAME)
    stage = tmp_path / "out" / "id2item"
    for path in ("model/config.json", "stage.json"):
        (stage / path).unlink()
    import shutil

    shutil.rmtree(stage / "checkpoints" / "checkpoint-4")  # as if it were killed in its third step
    again = run_recipe(load_recipe(recipe))
    found = weights(again / "model.safetensors") | weights(again / FILE_NAME)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.seq2item.sequence_encoder=gru", "sequence_encoder is 'gru'; it must be one of mean, transformer"),
        ("datasets.ids.tables=tables.parquet", "datasets.ids.tables must be a list"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_its_key(recipe, override, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [override])


def test_a_recipe_with_missing_files_names_them(recipe) -> None:
    with pytest.raises(FileNotFoundError, match="none.parquet"):
        run_recipe(load_recipe(recipe, ["datasets.ids.tables=[none.parquet]"]))
    with pytest.raises(FileNotFoundError, match="nothing.parquet"):
        run_recipe(load_recipe(recipe, ["datasets.sequences.items=nothing.parquet"]))


def test_the_same_batch_comes_whatever_came_before(tiny) -> None:
    dataset = TrainingDataset("films", film_rows(*[(n, (n + 1) % 12, (n + 2) % 12) for n in range(12)]))
    batches = [SpecializedBatches([dataset], Collator(tiny[1], field_dropout=0.3), 4, seed=3) for _ in range(2)]
    batches[0].batch(0)
    one, other = (some.batch(2) for some in batches)
    assert torch.equal(one["items"]["input_ids"], other["items"]["input_ids"])
    assert torch.equal(one["members"], other["members"])
