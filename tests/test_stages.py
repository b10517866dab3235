"""Recipes that are checked before any weight loads; stages that build on each other, resume after a kill, report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from modeling_sail.training.__main__ import main
from modeling_sail.training.build import build_tiny
from modeling_sail.training.recipe import RECIPES, RecipeError, load_recipe
from modeling_sail.training.stages import last_checkpoint, run_recipe, save_whole
from safetensors.torch import load_file

from modeling_sail import SailEmbeddingModel

from .conftest import picture

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve rows with pictures, as JSONL, in a folder with their media; and the same as Parquet."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for n in range(12):
        picture(n).save(folder / f"{n}.png")
        query = {"title": f"query {n}", "image": f"{n}.png"} if n % 3 else {"title": f"query {n}"}
        records.append(
            {"id": f"r{n}", "query": query, "target": {"title": f"target {n}", "ocr": "sale"}, "score": n / 12}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    from datasets import Dataset

    texts = [{**record, "query": {"title": record["query"]["title"]}} for record in records]
    Dataset.from_list(texts).to_parquet(str(folder / "texts.parquet"))
    return folder


def content(tiny_folder, data, output) -> dict:
    return {
        "model": str(tiny_folder),
        "output": str(output),
        "datasets": {
            "rows": {
                "path": str(data / "rows.jsonl"),
                "tasks": ["i2i"],
                "patterns": ["ITC", "OOC"],
                "temperature": 0.1,
            },
            "texts": {"path": str(data / "texts.parquet"), "tasks": ["q2i", None], "losses": {"cosent": 0.5}},
        },
        "defaults": {"batch_size": 4, "learning_rate": "1e-3", "logging_steps": 1, "save_steps": 2},
        "stages": {
            "base": {"steps": 4, "losses": {"nce": 1.0, "micl": 0.1, "patterns": 0.1, "late_fusion": 0.1}},
            "fine": {"steps": 3, "datasets": {"texts": 1}, "lora": {"r": 2, "train_too": ["temperatures"]}},
        },
    }


@pytest.fixture
def recipe_of(tiny_folder, data, tmp_path):
    def write(change=None, name="recipe.yaml"):
        made = content(tiny_folder, data, tmp_path / "out")
        for key, value in (change or {}).items():
            *path, last = key.split(".")
            place = made
            for part in path:
                place = place[part]
            place[last] = value
        (tmp_path / name).write_text(yaml.safe_dump(made, sort_keys=False))
        return tmp_path / name

    return write


def test_stages_build_on_each_other_and_leave_a_model_a_log_and_an_entry(recipe_of, tmp_path) -> None:
    recipe = load_recipe(recipe_of())
    seen = []
    folder = run_recipe(recipe, evaluator=lambda model, processor: seen.append(model) or {"score": 1})
    assert folder == tmp_path / "out" / "fine" / "model"
    assert len(seen) == 2
    base, fine = (tmp_path / "out" / name for name in ("base", "fine"))
    entry = json.loads((base / "stage.json").read_text())
    assert entry["steps"] == 4
    assert entry["samples"] == 16
    assert sum(part["samples"] for part in entry["datasets"].values()) == 16
    assert entry["evaluation"] == {"score": 1}
    assert set(entry["weights_sha256"]) == {"model.safetensors"}
    assert json.loads((fine / "stage.json").read_text())["started_from"] == str(base / "model")
    logged = json.loads((base / "log.json").read_text())
    assert any("loss/nce" in line for line in logged)
    assert (fine / "adapter" / "adapter_model.safetensors").is_file()
    before, after = (load_file(path / "model" / "model.safetensors") for path in (base, fine))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("text_tower" in name or "temperatures" in name for name in moved)
    model = SailEmbeddingModel.from_pretrained(folder)
    assert model.config.temperatures["rows"] == 0.1
    assert float(model.temperatures("rows")) != pytest.approx(0.1, abs=1e-9)
    assert run_recipe(recipe) == folder  # nothing is run again
    assert len(json.loads((base / "stage.json").read_text())) == len(entry)


def test_a_stage_of_another_recipe_is_not_gone_on_with(recipe_of, capsys) -> None:
    path = recipe_of()
    assert main([str(path), "stages.base.steps=2", "stages.fine.steps=1"]) == 0
    assert main([str(path), "stages.base.steps=3"]) == 2
    assert "was trained by another recipe" in capsys.readouterr().err


def run_command(recipe) -> subprocess.Popen:
    command = [sys.executable, "-m", "modeling_sail.training", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_stage_that_is_killed_and_resumed_ends_with_the_same_parameters(recipe_of, tmp_path) -> None:
    change = {"stages.base.steps": 40, "stages.base.token_budget": 100, "stages.fine.steps": 2}
    whole, killed = (
        recipe_of({**change, "output": str(tmp_path / name)}, f"{name}.yaml") for name in ("whole", "killed")
    )
    assert run_command(whole).wait(timeout=240) == 0
    run = run_command(killed)
    checkpoints = tmp_path / "killed" / "base" / "checkpoints"
    deadline = time.time() + 120
    while last_checkpoint(checkpoints) is None and time.time() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed" / "base" / "stage.json").exists()
    assert last_checkpoint(checkpoints) is not None
    assert run_command(killed).wait(timeout=240) == 0
    for stage in ("base", "fine"):
        one, other = (
            load_file(tmp_path / name / stage / "model" / "model.safetensors") for name in ("whole", "killed")
        )
        assert all(torch.equal(one[name], other[name]) for name in one), stage
    assert len((tmp_path / "killed" / "base" / "sessions.jsonl").read_text().splitlines()) >= 1


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path) -> None:
    for step, state in ((2, "{}"), (4, '{"half'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.base.step": 3}, r"unknown key stages.base.step; did you mean 'steps'\?"),
        ({"stages.base.steps": "many"}, r"stages.base.steps must be an integer, it is 'many' \(str\)"),
        ({"stages.base.steps": 0}, r"stages.base.steps is 0; it must be an integer >= 1"),
        ({"stages.base.learning_rate": -1.0}, r"stages.base.learning_rate is -1.0; it must be above 0"),
        ({"stages.base.min_learning_rate": 1.0}, r"stages.base.min_learning_rate .* between 0 and learning_rate"),
        ({"stages.base.losses": {"nec": 1}}, r"stages.base.losses: There is no loss term 'nec'"),
        ({"stages.base.losses": [1]}, r"stages.base.losses must be a mapping"),
        ({"stages.base.options": {"margin": "x"}}, r"stages.base.options.margin must be a number"),
        (
            {"stages.base.datasets": {"other": 1}},
            r"stages.base.datasets.other .* dataset of the recipe \(rows, texts\)",
        ),
        ({"stages.base.bf16": 1}, r"stages.base.bf16 must be true or false, it is 1 \(int\)"),
        ({"datasets.rows.patterns": ["ITX"]}, r"datasets.rows.patterns: There is no pattern 'ITX'"),
        ({"datasets.rows.temperature": 0.0}, r"datasets.rows.temperature is 0.0; it must be above 0"),
        ({"datasets.rows": {}}, r"datasets.rows.path is missing"),
        ({"stages": {}}, "datasets and stages must each have an entry"),
        ({"model": None}, r"model must be a string, it is nothing"),
    ],
)
def test_a_bad_recipe_names_its_key_before_any_weight_loads(recipe_of, change, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_of(change))


def test_patterns_that_match_no_parameter_fail_before_any_weight_loads(recipe_of, capsys, monkeypatch) -> None:
    path = recipe_of({"stages.fine.freeze": ["txt_tower.*"]})
    monkeypatch.setattr(SailEmbeddingModel, "from_pretrained", None)
    assert main([str(path)]) == 2
    assert "stages.fine.freeze: 'txt_tower.*' matches no parameter; parts are audio_adapter" in capsys.readouterr().err


def test_values_are_set_from_the_command_line_and_mistakes_are_told(recipe_of) -> None:
    path = recipe_of()
    recipe = load_recipe(
        path, ["stages.base.steps=7", "seed=3", "stages.fine.lora=null", "datasets.rows.temperature=2e-2"]
    )
    assert (recipe.stages["base"].steps, recipe.seed, recipe.stages["fine"].lora) == (7, 3, None)
    assert recipe.datasets["rows"].temperature == 0.02
    for override, message in {
        "steps": "write key=value",
        "stages.bse.steps=1": "there is no stages.bse; there are base, fine",
        "stages.base.stps=1": "unknown key stages.base.stps; did you mean 'steps'",
        "seed.x=1": "seed",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(path, [override])
    with pytest.raises(RecipeError, match="There is no recipe nothing; .* mini, .*paper"):
        load_recipe("nothing")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_good(path) -> None:
    if path.stem.startswith("accelerate"):
        assert yaml.safe_load(path.read_text())["distributed_type"]
    else:
        assert load_recipe(path.stem).stages


def test_the_papers_settings_are_the_default(recipe_of) -> None:
    stage = load_recipe("paper").stages["base"]
    assert (stage.optimizer, stage.learning_rate, stage.min_learning_rate) == ("adamw_torch_fused", 1e-5, 6e-6)
    assert (stage.weight_decay, stage.max_grad_norm) == (1e-4, 1.0)
    assert stage.field_dropout > 0


def test_a_feature_cache_trains_like_the_towers_themselves(recipe_of, tmp_path) -> None:
    frozen = ["vision_tower.*", "audio_tower.*"]
    stage = {"steps": 3, "datasets": {"rows": 1}, "freeze": frozen, "losses": {"nce": 1.0}, "batch_size": 4}
    results = []
    for name, more in (("direct", {}), ("cached", {"feature_cache": str(tmp_path / "cache")})):
        change = {"stages": {"base": {**stage, **more}}, "output": str(tmp_path / name)}
        folder = run_recipe(load_recipe(recipe_of(change, f"{name}.yaml")))
        results.append(load_file(folder / "model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=2e-3, rtol=0, msg=name)
    with pytest.raises(RecipeError, match=r"feature_cache needs frozen towers; add 'vision_tower.\*' to freeze"):
        change["stages"]["base"]["freeze"] = []
        run_recipe(load_recipe(recipe_of({**change, "output": str(tmp_path / "third")})))


def resumed(tmp_path, recipe_of, change, keep):
    """A stage run to its end, and one that goes on from one of its checkpoints."""
    shared = {"stages.base.save_steps": 2, "stages.base.steps": 4, **change}
    first = load_recipe(recipe_of({**shared, "output": str(tmp_path / "one")}, "one.yaml"))
    run_recipe(first)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    base = tmp_path / "two" / "base"
    for path in (base / "checkpoints").iterdir():
        if path.name not in keep:
            shutil.rmtree(path)
    (base / "stage.json").unlink()
    shutil.rmtree(base / "model")
    shutil.rmtree(tmp_path / "two" / "fine")
    run_recipe(load_recipe(recipe_of({**shared, "output": str(tmp_path / "two")}, "two.yaml")))
    for stage in ("base", "fine"):
        one, other = (load_file(tmp_path / name / stage / "model" / "model.safetensors") for name in ("one", "two"))
        assert all(torch.equal(one[name], other[name]) for name in one), stage
    return json.loads((base / "stage.json").read_text())


def test_a_stage_killed_after_its_last_step_takes_no_step_more(recipe_of, tmp_path) -> None:
    assert resumed(tmp_path, recipe_of, {}, ["checkpoint-4"])["steps"] == 4


def test_dropout_goes_on_with_the_same_random_numbers(recipe_of, tmp_path) -> None:
    model, processor = build_tiny()
    model.config.text_config.attention_dropout = 0.3
    save_whole(model, processor, tmp_path / "dropout")
    change = {"model": str(tmp_path / "dropout"), "stages.fine.lora": {"r": 2, "dropout": 0.2}}
    assert resumed(tmp_path, recipe_of, change, ["checkpoint-2"])["steps"] == 4


def test_one_loss_can_be_set_without_losing_the_others_and_broken_values_are_told(recipe_of) -> None:
    change = {"defaults.losses": {"nce": 1.0, "cosent": 0.1}, "stages.base": {"steps": 2}}
    recipe = load_recipe(recipe_of(change), ["stages.base.losses.nce=2.0", "defaults.steps=9"])
    assert recipe.stages["base"].losses == {"nce": 2.0, "cosent": 0.1}
    assert (recipe.stages["base"].steps, recipe.stages["fine"].steps) == (2, 3)
    lone = load_recipe(recipe_of({"stages.base": {"steps": 2}}), ["stages.base.losses.micl=0.2"])
    assert lone.stages["base"].losses == {"nce": 1.0, "micl": 0.2}
    for change, message in (
        ({"defaults": [1]}, "defaults must be a mapping"),
        ({"stages.base.optimizer": "adam"}, r"stages.base.optimizer is 'adam'; it must be known to transformers"),
        ({"stages.base.options": {"margin": float("nan")}}, "stages.base.options.margin must be finite"),
        (
            {"stages.fine.lora": {"target_modules": "("}},
            "stages.fine.lora.target_modules: '\\(' is no regular expression",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe_of(change))
    with pytest.raises(RecipeError, match=r"stages.base.freeze: '\[a' is no YAML value"):
        load_recipe(recipe_of(), ["stages.base.freeze=[a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"datasets.rows.tasks": ["i3i"]},
            r"datasets.rows.tasks: 'i3i' has no instructions; there are \['cls', 'i2i', 'q2i'\]",
        ),
        ({"stages.fine.lora": {"train_too": ["percever"]}}, "stages.fine.lora.train_too: there is no part 'percever'"),
        ({"stages.fine.lora": {"target_modules": "nothing"}}, "lora.target_modules: 'nothing' matches no module"),
    ],
)
def test_what_does_not_fit_the_model_fails_before_any_weight_loads(recipe_of, change, message, monkeypatch) -> None:
    monkeypatch.setattr(SailEmbeddingModel, "from_pretrained", None)
    with pytest.raises(RecipeError, match=message):
        run_recipe(load_recipe(recipe_of(change)))


def test_what_only_a_later_stage_uses_does_not_refuse_an_earlier_one(recipe_of) -> None:
    one, other, third = (
        load_recipe(recipe_of({"stages.base.datasets": {"rows": 1}, **change}))
        for change in ({}, {"datasets.texts.temperature": 0.2}, {"datasets.rows.temperature": 0.2})
    )
    assert one.fingerprint("base") == other.fingerprint("base") != third.fingerprint("base")
    assert one.fingerprint("fine") != other.fingerprint("fine")
