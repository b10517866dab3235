"""A stage draws what was chosen for it: balanced weights, near and clean rows, negatives that are mined again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from modeling_sail.training import choosing
from modeling_sail.training.choosing import NegativeTables
from modeling_sail.training.collate import Collator
from modeling_sail.training.recipe import LAG, RecipeError, load_recipe
from modeling_sail.training.rows import Row, TrainingDataset, with_negatives
from modeling_sail.training.sampler import SpecializedBatches
from modeling_sail.training.stages import run_recipe
from safetensors.torch import load_file

from modeling_sail.cli import main

from .conftest import picture

ROOT = Path(__file__).parent.parent
ANIMALS = ("cat", "dog", "horse", "cow", "pig", "hen", "owl", "fox")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows about animals, the same again, noise, pictures alone, and a validation set about animals."""
    folder = tmp_path_factory.mktemp("data")
    chooser = random.Random(0)
    letters = "qwxzvkj"
    noise = ["".join(chooser.choices(letters, k=9)) for _ in range(48)]
    animals = [f"a {one} and a {other}" for one in ANIMALS for other in ANIMALS if one != other][:24]
    sets = {
        "animals": [{"query": f"where is {name}?", "target": {"title": name}} for name in animals],
        "noise": [
            {"query": one, "target": {"title": other}} for one, other in zip(noise[::2], noise[1::2], strict=True)
        ],
        "validation": [{"query": f"where is a {name}?", "target": {"title": f"a {name}"}} for name in ANIMALS],
    }
    sets["mixed"] = sets["animals"][:12] + sets["noise"][:12] + sets["animals"][:2]
    sets["twin"] = sets["animals"]
    for n in range(8):
        picture(n).save(folder / f"{n}.png")
    sets["pictures"] = [{"query": {"image": f"{n}.png"}, "target": {"image": f"{n + 1}.png"}} for n in range(7)]
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def content(tiny_folder, data, output, names=("animals", "twin", "noise")) -> dict:
    return {
        "model": str(tiny_folder),
        "output": str(output),
        "datasets": {name: {"path": str(data / f"{name}.jsonl")} for name in names},
        "validation": {"near": {"path": str(data / "validation.jsonl")}},
        "defaults": {"batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "field_dropout": 0.0},
        "stages": {"base": {"steps": 4}},
    }


@pytest.fixture
def recipe_of(tiny_folder, data, tmp_path):
    def write(change, name="recipe", names=("animals", "twin", "noise")):
        made = content(tiny_folder, data, tmp_path / name, names)
        for key, value in change.items():
            *path, last = key.split(".")
            place = made
            for part in path:
                place = place[part]
            place[last] = value
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
        return tmp_path / f"{name}.yaml"

    return write


def test_a_balanced_stage_draws_twins_alike_and_noise_least(recipe_of, tmp_path, monkeypatch) -> None:
    path = recipe_of({"stages.base.balance": {"clusters": 8, "temperature": 0.02}, "stages.base.steps": 40})
    run_recipe(load_recipe(path))
    base = tmp_path / "recipe" / "base"
    report = json.loads((base / "balance.json").read_text())
    weights = report["weights"]
    assert weights["animals"] == pytest.approx(weights["twin"], rel=1e-6)
    assert weights["noise"] < weights["twin"]
    assert report["compared"] == [["text"]] * 3 and np.array(report["scores"]).shape == (3, 1)
    drawn = json.loads((base / "stage.json").read_text())
    assert drawn["datasets"]["noise"]["weight"] == pytest.approx(weights["noise"])
    assert drawn["datasets"]["noise"]["batches"] == pytest.approx(40 * weights["noise"], abs=2.5)
    assert drawn["chosen"]["balance"]["weights"] == weights
    drawing = (base / "balance.svg").read_text()
    assert drawing in (base / "balance.html").read_text() and drawing.count("<rect") == 3 * (1 + 1)
    assert not (base / "balance-parts").exists()
    monkeypatch.setattr(choosing, "sample_embeddings", None)  # a second run reads what is there
    (base / "stage.json").unlink()
    run_recipe(load_recipe(path))


def test_given_weights_are_multiplied_and_zero_is_never_drawn(recipe_of, tmp_path) -> None:
    change = {"stages.base.balance": {"clusters": 4}, "stages.base.datasets": {"animals": 3, "twin": 1, "noise": 0}}
    run_recipe(load_recipe(recipe_of(change)))
    datasets = json.loads((tmp_path / "recipe" / "base" / "stage.json").read_text())["datasets"]
    assert datasets["animals"]["weight"] == pytest.approx(0.75)
    assert set(datasets) == {"animals", "twin"}


def test_the_balance_command_prints_weights_that_a_recipe_takes(recipe_of, tmp_path, capsys) -> None:
    out = tmp_path / "weights"
    assert main(["balance", str(recipe_of({})), "--out", str(out)]) == 0
    printed = yaml.safe_load(capsys.readouterr().out.splitlines()[0])["datasets"]
    assert sum(printed.values()) == pytest.approx(1.0, abs=1e-3)
    assert printed == pytest.approx(json.loads((out / "balance.json").read_text())["weights"], abs=1e-4)
    assert main(["balance", str(recipe_of({"validation": {}})), "--out", str(out)]) == 2
    assert "validation has no set" in capsys.readouterr().err
    assert main(["balance", str(recipe_of({})), "--out", str(out), "--stage", "fine"]) == 2
    assert "There is no stage 'fine'; there are base" in capsys.readouterr().err


def test_a_dataset_that_shares_no_modality_with_a_benchmark_is_named(recipe_of, tmp_path, capsys) -> None:
    path = recipe_of({}, names=("animals", "pictures"))
    assert main(["balance", str(path), "--out", str(tmp_path / "weights")]) == 2
    assert "Dataset 'pictures' holds vision, and no benchmark has that" in capsys.readouterr().err


def test_a_stage_keeps_what_is_near_and_no_pair_twice(recipe_of, tmp_path, data) -> None:
    change = {"stages.base.select": {"share": 0.5, "clean": False, "clusters": 4}}
    run_recipe(load_recipe(recipe_of(change, names=("mixed",))))
    base = tmp_path / "recipe" / "base"
    kept = np.load(base / "selected" / "mixed.npy")
    assert len(kept) == 12 and len(set(kept.tolist())) == 12
    assert (kept < 12).sum() > 8, "animals are near, letters are not"
    assert (kept < 24).all(), "what is said twice is taken once"
    report = json.loads((base / "stage.json").read_text())["chosen"]["selected/report"]["mixed"]
    assert report["rows"] == 26 and report["said_twice"] == 2 and report["kept"] == 12
    assert report["mean_nearness"]["kept"] > report["mean_nearness"]["all"]
    assert json.loads((base / "stage.json").read_text())["datasets"]["mixed"]["rows"] == 12
    assert not list((base / "selected").glob("survey*"))


def test_clean_pairs_come_first(recipe_of, tmp_path) -> None:
    run_recipe(load_recipe(recipe_of({"stages.base.select": {"share": 0.3}}, names=("mixed",))))
    report = json.loads((tmp_path / "recipe" / "base" / "selected" / "report.json").read_text())["mixed"]
    assert report["kept_clean"] == min(report["clean"], report["kept"]) > 0


def test_mined_negatives_are_in_the_batches_and_never_the_row_itself(recipe_of, tmp_path, tiny) -> None:
    run_recipe(load_recipe(recipe_of({"stages.base.mine": {"negatives": 2}}, names=("animals",))))
    folder = tmp_path / "recipe" / "base" / "negatives"
    table = np.load(folder / "000000000" / "animals.npy")
    assert table.shape == (24, 2) and (table >= 0).any()
    assert not (table == np.arange(24)[:, None]).any()
    source = [{"query": f"q{n}", "target": {"title": f"t{n}", "id": f"t{n}"}} for n in range(24)]
    dataset = TrainingDataset("animals", source)
    tables = NegativeTables(folder, frozenset({"animals"}))
    collate = Collator(tiny[1])
    batches = SpecializedBatches([dataset], lambda draw: draw, 24, negatives=tables)
    rows = batches.draw(0).rows
    for row in rows:
        expected = [f"t{place}" for place in table[int(row.target_id[1:])] if place >= 0]
        assert list(row.negative_ids) == expected
    batch = collate(batches.draw(0))
    assert len(batch["negative_slots"]) == (table >= 0).sum()


def test_rows_of_their_own_negatives_keep_them_and_unknown_teacher_scores_are_nan() -> None:
    dataset = TrainingDataset("d", [{"query": "a", "target": "b"}, {"query": "c"}, {"query": "e", "target": "f"}])
    own = Row("r", "q", "t", "t", ("n",), ("n",), None, (0.9, 0.1))
    row = with_negatives(own, dataset, [2, 1, -1])
    assert row.negatives == ("n", "f"), "a row that cannot be read is no negative"
    assert row.teacher_scores[:2] == (0.9, 0.1) and np.isnan(row.teacher_scores[2])


def test_a_table_takes_effect_a_fixed_number_of_batches_after_it_was_mined(tmp_path) -> None:
    tables = NegativeTables(tmp_path, frozenset({"a"}), every=10)
    for batch in range(0, 60, 10):
        choosing._save(tables.path("a", batch), np.full((1, 1), batch))
    found = [int(tables.of("a", batch)[0, 0]) for batch in range(60 + LAG)]
    assert found[: LAG + 10] == [0] * (LAG + 10)
    assert found[LAG + 10 : LAG + 20] == [10] * 10
    assert tables.of("b", 3) is None


def test_a_stage_that_mines_again_and_is_resumed_ends_with_the_same_parameters(recipe_of, tmp_path) -> None:
    """With accumulation and a worker process; three minings after the point where it is resumed, of tables in use."""
    change = {"stages.base.mine": {"negatives": 1, "every": 4}, "stages.base.steps": 32, "stages.base.save_steps": 4}
    change |= {"stages.base.accumulation": 2, "stages.base.workers": 1}
    for name in ("whole", "resumed"):
        run_recipe(load_recipe(recipe_of(change, name, ("animals",))))
        if name == "resumed":
            base = tmp_path / name / "base"
            checkpoints = sorted((base / "checkpoints").glob("checkpoint-*"))
            shutil.rmtree(checkpoints[-1])  # of the end; the one before it is gone on from
            assert checkpoints[0].name == "checkpoint-28"
            (base / "stage.json").unlink()
            shutil.rmtree(base / "model")
            shutil.rmtree(base / "negatives" / "000000008")  # mined before, but no batch to come needs it
            run_recipe(load_recipe(recipe_of(change, name, ("animals",))))
    one, other = (load_file(tmp_path / name / "base" / "model" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    folder = tmp_path / "whole" / "base" / "negatives"
    mined = sorted(path.name for path in folder.iterdir())
    assert mined == [f"{batch:09d}" for batch in range(0, 64, 8)], "batches, not steps"
    first, used = (np.load(folder / f"{batch:09d}" / "animals.npy") for batch in (0, (63 - LAG) // 8 * 8))
    assert not np.array_equal(first, used), "the model has moved, and so have its negatives"


def test_a_batch_sees_the_table_that_was_mined_for_it(tmp_path, tiny) -> None:
    tables = NegativeTables(tmp_path, frozenset({"d"}), every=8)
    for batch in range(0, 64, 8):
        choosing._save(tables.path("d", batch), np.full((40, 1), batch // 8))
    dataset = TrainingDataset("d", [{"query": f"q{n}", "target": {"title": f"t{n}", "id": f"t{n}"}} for n in range(40)])
    batches = SpecializedBatches([dataset], lambda draw: draw, 2, negatives=tables)
    seen = {step: batches.draw(step).rows[0].negative_ids for step in (0, LAG, LAG + 7, LAG + 8, LAG + 20)}
    assert seen == {0: ("t0",), LAG: ("t0",), LAG + 7: ("t0",), LAG + 8: ("t1",), LAG + 20: ("t2",)}


def test_a_drawn_target_is_the_negative_that_was_scored(tmp_path) -> None:
    def drawn(n):
        return lambda generator: {"query": f"q{n}", "target": f"target {n} {generator.random():.6f}"}

    dataset = TrainingDataset("d", [drawn(n) for n in range(4)])
    scored = dataset.read_as_surveyed(2).target
    row = with_negatives(dataset.read(0, random.Random("elsewhere")), dataset, [2, 3])
    assert row.negatives[0] == scored and row.negatives[1] == dataset.read_as_surveyed(3).target


def test_two_ranks_choose_and_train_as_one(recipe_of, tmp_path) -> None:
    change = {
        "stages.base.balance": {"clusters": 4},
        "stages.base.select": {"share": 0.7},
        "stages.base.mine": {"negatives": 1, "every": 2},
        "stages.base.losses": {"nce": 1.0},
    }
    run_recipe(load_recipe(recipe_of(change, "one")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = [*command, "-m", "tests.ranks", "recipe", str(recipe_of(change, "two"))]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (tmp_path / name / "base" for name in ("one", "two"))
    places = ["selected/animals.npy", "negatives/000000000/noise.npy"]
    for path in [*places, "negatives/000000002/animals.npy"]:  # the last one mined by the model as it trains
        assert np.array_equal(np.load(one / path), np.load(other / path)), path
    first, second = (json.loads((base / "balance.json").read_text())["weights"] for base in (one, other))
    assert first == pytest.approx(second, abs=1e-6)
    ours, theirs = (load_file(base / "model" / "model.safetensors") for base in (one, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=2e-4, rtol=0, msg=name)


def test_weights_of_other_settings_or_datasets_are_made_anew(recipe_of, tmp_path, capsys) -> None:
    out, found = str(tmp_path / "weights"), []
    for change, names in (({}, ("animals", "noise")), ({}, ("animals", "noise", "twin")), ({"seed": 3}, ("noise",))):
        assert main(["balance", str(recipe_of(change, names=names)), "--out", out]) == 0
        found.append(yaml.safe_load(capsys.readouterr().out.splitlines()[0])["datasets"])
    assert [sorted(weights) for weights in found] == [["animals", "noise"], ["animals", "noise", "twin"], ["noise"]]
    change = {"stages.base.balance": {"temperature": 0.001}}
    assert main(["balance", str(recipe_of(change, names=("animals", "noise"))), "--out", out]) == 0
    assert "animals: 1.0" in capsys.readouterr().out


def test_what_another_model_left_of_a_mining_is_thrown_away(recipe_of, tmp_path) -> None:
    left = tmp_path / "recipe" / "base" / "negatives" / "000000000" / "survey-animals"
    left.mkdir(parents=True)
    (left / "job.json").write_text(json.dumps({"model": "another"}))
    run_recipe(load_recipe(recipe_of({"stages.base.mine": {"negatives": 1}}, names=("animals",))))
    assert not left.exists() and left.with_name("animals.npy").is_file()


def test_a_dataset_without_negatives_goes_without_and_says_why(recipe_of, tmp_path, data, caplog) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"query": "a", "target": "b"}) + "\n")
    change = {"datasets.lone": {"path": str(tmp_path / "one.jsonl")}, "stages.base.mine": {"negatives": 1}}
    run_recipe(load_recipe(recipe_of(change, names=("animals",))))
    assert "'lone' goes without mined negatives: 1 pair(s) have no cross pairs" in caplog.text
    report = json.loads((tmp_path / "recipe" / "base" / "negatives" / "000000000" / "report.json").read_text())
    assert "at least two" in report["lone"]["note"] and report["animals"]["negatives"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stages.base.balance": {}, "validation": {}},
            r"validation is \{\}; it must be a set or more, as stages.base.bal",
        ),
        ({"stages.base.balance": {"temperature": 0}}, "stages.base.balance.temperature is 0.0; it must be above 0"),
        ({"stages.base.balance": {"sample": 3}}, r"unknown key stages.base.balance.sample; did you mean 'samples'\?"),
        ({"stages.base.select": {"share": 1.5}}, "stages.base.select.share is 1.5; it must be above 0 and at most 1"),
        ({"stages.base.mine": {"negatives": 0}}, "stages.base.mine.negatives is 0; it must be an integer >= 1"),
        (
            {"stages.base.mine": {"datasets": ["dogs"]}},
            r"stages.base.mine.datasets is \['dogs'\]; it must be of the stage's",
        ),
        (
            {"stages.base.mine": {"every": 5}, "stages.base.workers": 15},
            "stages.base.workers is 15; it must be at most 14",
        ),
        (
            {"stages.base.mine": {}, "datasets.noise.streamed": True},
            "datasets.noise.streamed is True; it must be false",
        ),
        ({"validation.near": {}}, "validation.near.path is missing"),
    ],
)
def test_a_bad_choice_names_its_key(recipe_of, change, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_of(change))


def test_a_streamed_validation_set_does_for_balance_and_does_not_matter_to_mine(recipe_of) -> None:
    for choice in ("balance", "mine"):
        assert load_recipe(recipe_of({f"stages.base.{choice}": {}, "validation.near.streamed": True}))
    with pytest.raises(RecipeError, match="there is no validation.far; there are near"):
        load_recipe(recipe_of({}), ["validation.far.path=x.jsonl"])


def test_what_is_chosen_and_from_what_is_part_of_a_stages_fingerprint(recipe_of) -> None:
    plain, mined, balanced = (
        load_recipe(recipe_of(change)).fingerprint("base")
        for change in ({}, {"stages.base.mine": {}}, {"stages.base.balance": {}})
    )
    other = load_recipe(recipe_of({"stages.base.balance": {}, "validation.near.path": "x.jsonl"})).fingerprint("base")
    assert len({plain, mined, balanced, other}) == 4
    assert plain == load_recipe(recipe_of({"validation.near.path": "x.jsonl"})).fingerprint("base")


def test_a_fingerprint_stays_what_it_was_when_settings_are_added() -> None:
    """Of the shipped recipe `mini` as it was run: what it trained must not be refused by a later version."""
    recipe = load_recipe("mini", ["model=runs/mini/warm", "defaults.feature_cache=runs/mini", "seed=0"])
    assert recipe.fingerprint("all") == "10b2041c8d60acfd69d3653cc55e26261d69e272bc20d07736715cb52a148bda"
