"""What goes up to the Hub is told before, nothing else does, and the card's examples run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from modeling_sail.evaluation.reports import file_sha256
from modeling_sail.evaluation.tasks import TASKS
from modeling_sail.evaluation.tasks.task import Retrieval
from modeling_sail.model_cards.card import build_card, make_card
from modeling_sail.model_cards.push import plan_push, push

from modeling_sail.cli import main

from .conftest import picture
from .test_cards import FORMS, other_form

REPO = "someone/tiny"


@pytest.fixture(scope="module")
def with_card(tiny_folder, tmp_path_factory) -> Path:
    """The tiny preset with its card."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("push") / "tiny"))
    make_card(folder, [], repo=REPO)
    return folder


@pytest.fixture
def folder(with_card, tmp_path) -> Path:
    """The same, to write into."""
    return Path(shutil.copytree(with_card, tmp_path / "tiny"))


class FakeHub:
    """A `HfApi` that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, **given: Any) -> None:
        self.calls.append(("create_repo", given))

    def upload_folder(self, **given: Any) -> None:
        self.calls.append(("upload_folder", given))


def add_what_must_stay(folder: Path) -> dict[str, str]:
    """Files that lie in folders of trainings, and the reason why each stays."""
    names = {
        ".env": "secrets",
        "optimizer.pt": "state of a training",
        "training_args.bin": "state of a training",
        "pytorch_model.bin": "pickle",
        "notes.txt": "no part",
        "config.json.bak": "no part",
        "cache.npy": "pickle",
        "checkpoints/checkpoint-1/model.safetensors": "state of a training",
        ".cache/huggingface/token": "secrets",
        "data/pairs.jsonl": "no part",
    }
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    return names


def test_the_dry_run_lists_exactly_what_the_upload_gets(folder) -> None:
    add_what_must_stay(folder)
    plan, hub = push(folder, REPO, dry_run=True, api=None), FakeHub()
    push(folder, REPO, dry_run=False, private=True, api=hub)
    (made, given), (sent, upload) = hub.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert given == {"repo_id": REPO, "private": True, "exist_ok": True} and upload["folder_path"] == str(folder)
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    taken = set(filter_repo_objects(there, allow_patterns=upload["allow_patterns"]))
    assert taken == {file.name for file in plan.files} and len(taken) < len(there)
    assert {"config.json", "model.safetensors", "README.md", "modeling_sail.py", "tokenizer.json"} <= taken
    assert not taken & set(add_what_must_stay(folder)) and "README.trace.json" not in taken


def test_what_stays_is_listed_with_its_reason(folder) -> None:
    names = add_what_must_stay(folder)
    told = dict(plan_push(folder, REPO).left_out)
    for name, reason in names.items():
        assert reason in told.get(name, "") + told.get(f"{name.split('/')[0]}/", ""), name
    assert "repository" in told["README.trace.json"]


def test_the_listing_has_size_sha256_lfs_and_the_total(folder, capsys) -> None:
    assert main(["push", str(folder), "--repo", REPO, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    weights = next(line for line in lines if line.startswith("model.safetensors"))
    size = (folder / "model.safetensors").stat().st_size
    assert weights.split()[1:] == [f"{size:,}", file_sha256(folder / "model.safetensors"), "LFS"]
    assert next(line for line in lines if line.startswith("config.json")).endswith(" -")
    plan = plan_push(folder, REPO)
    assert f"{len(plan.files)} files, {sum(file.size for file in plan.files):,} bytes, to {REPO}" in lines


def test_a_dry_run_sends_nothing(folder) -> None:
    hub = FakeHub()
    push(folder, REPO, dry_run=True, api=hub)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("config.json", "(no config.json): `sail build"),
        ("README.md", "README.md is missing (`sail card {folder} --repo someone/tiny` writes it"),
        ("model.safetensors", "model.safetensors is missing (`sail build`"),
        ("items_sail.py", "items_sail.py is missing (code that the model needs"),
        ("sentence_transformer_sail.py", "sentence_transformer_sail.py is missing (code"),
        ("processor_config.json", "processor_config.json is missing"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_in_one_line(folder, capsys, gone, said) -> None:
    (folder / gone).unlink()
    assert main(["push", str(folder), "--repo", REPO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said.format(folder=folder) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("modules.json", b'{"a": 1}', "modules.json is no list of modules"),
        ("modules.json", b'[{"type": 3}]', "modules.json: type is"),
        ("modules.json", b'["x"]', "modules.json is no list of modules"),
        ("config.json", b"[]", "config.json holds a JSON list"),
        ("config.json", b'{"auto_map": ["a.B"]}', "config.json: auto_map is ['a.B']"),
        ("config.json", b'{"auto_map": {"AutoConfig": 1}}', "config.json: auto_map is"),
        ("config.json", b"\xff\xfe", "config.json is no UTF-8 text"),
        ("processor_config.json", b"3", "processor_config.json holds a JSON int"),
        ("README.md", b"\xff", "README.md is no UTF-8 text"),
        ("modeling_sail.py", b"\xff", "modeling_sail.py is no UTF-8 text"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "weight_map is []"),
        ("model.safetensors.index.json", b"[]", "index.json holds a JSON list"),
    ],
)
def test_what_is_broken_is_one_line_that_names_the_file(folder, capsys, name, content, said) -> None:
    (folder / name).write_bytes(content)
    assert main(["push", str(folder), "--repo", REPO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and error.count("\n") == 1


def test_a_card_whose_examples_load_another_place_is_refused_with_the_command_that_mends_it(folder, capsys) -> None:
    place = Path(shutil.move(folder, folder.parent / "my folder"))
    make_card(place, [])
    assert main(["push", str(place), "--repo", REPO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    command = f"sail card '{place}' --repo {REPO}"
    assert f"load 'my folder', not '{REPO}'" in error and command in error and error.count("\n") == 1
    assert main(shlex.split(command)[1:]) == 0
    assert main(["push", str(place), "--repo", REPO, "--dry-run"]) == 0
    card = (place / "README.md").read_text(encoding="utf-8")
    (place / "README.md").write_text(card.replace(f'("{REPO}"', "('build/mini'", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="load 'build/mini', not"):
        plan_push(place, REPO)


def test_a_picture_goes_up_if_the_card_shows_it(folder) -> None:
    (folder / "figures" / "old").mkdir(parents=True)
    for name in ("old/a", "old/b"):
        (folder / "figures" / f"{name}.svg").write_text("<svg/>", encoding="utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(f"{card}\n![a](figures/old/a.svg)\n", encoding="utf-8")
    plan = plan_push(folder, REPO)
    assert [file.name for file in plan.files if file.name.endswith(".svg")] == ["figures/old/a.svg"]
    assert ("figures/old/b.svg", "a picture that the card does not show") in plan.left_out


def test_a_missing_shard_is_told(folder) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is missing"):
        plan_push(folder, REPO)


def test_a_card_of_other_weights_is_refused(folder) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b" ")
    with pytest.raises(ValueError, match="other weights.*sail card"):
        plan_push(folder, REPO)


@pytest.mark.parametrize("name", ["config.json", "README.md", "chat_template.jinja", "modeling_sail.py"])
def test_a_secret_in_a_file_that_would_go_up_stops_it_and_is_not_printed(folder, name) -> None:
    secret = "hf_" + "a1B2" * 9
    path = folder / name
    text = path.read_text(encoding="utf-8") if path.is_file() else "x"
    extra = json.dumps({**json.loads(text), "note": secret}) if name.endswith(".json") else f"{text}\n# {secret}\n"
    path.write_text(extra, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} holds what looks like a secret") as caught:
        plan_push(folder, REPO)
    assert secret not in str(caught.value)


def test_a_link_stays_and_so_the_folder_is_refused(folder, tmp_path) -> None:
    (tmp_path / "elsewhere.json").write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="config.json is missing"):
        plan_push(folder, REPO)


def test_a_folder_of_this_machine_and_older_code_are_pointed_out(folder) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["_name_or_path"] = "/home/someone/towers/text"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "installed" not in str(plan_push(folder, REPO))
    (folder / "modeling_sail.py").write_text("# older\n", encoding="utf-8")
    plan = plan_push(folder, REPO)
    assert "look: modeling_sail.py is not the installed package's" in str(plan)
    assert len(plan.notes) == 2 and "look: config.json names a folder of this machine" in str(plan)


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "some one/tiny"])
def test_a_repository_needs_a_user_and_a_name(folder, repo, capsys) -> None:
    for command in (["push", "--dry-run"], ["card"]):
        assert main([command[0], str(folder), *command[1:], "--repo", repo]) == 2
        error = capsys.readouterr().err
        assert f"--repo is {repo!r}; USER/NAME is needed" in error and error.count("\n") == 1


# --- the card's examples ----------------------------------------------------------------------------------------------


def test_the_command_writes_the_card_in_both_places_with_pictures_and_trace(folder, tmp_path, capsys) -> None:
    out = tmp_path / "cards" / "tiny.md"
    assert main(["card", str(folder), "--results", "--out", str(out), "--repo", REPO]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "README.md"), str(out)]
    assert out.read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")
    assert out.with_suffix(".trace.json").is_file() and f'from_pretrained("{REPO}"' in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_every_example_of_the_card_runs(tiny_folder, tmp_path, monkeypatch, form) -> None:
    folder = other_form(tiny_folder, tmp_path / "my 2 models", form)
    text = build_card(folder, [], repo=str(folder)).text
    examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    picture(1).save(folder / "owl.png")
    corpus = {"a": {"title": "an owl", "image": str(folder / "owl.png")}, "b": {"title": "tea"}}
    few = Retrieval({"q": {"text": "owl"}}, corpus, {"q": frozenset("a")})
    (name,) = re.findall(r'TASKS\["(\w+)"\]', text)  # its data would be fetched
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], load=lambda: dict.fromkeys(TASKS[name].languages, few)))
    given: list[dict[str, Any]] = [{} for _ in examples]
    for example, names in zip(examples, given, strict=True):
        exec(compile(example, "an example of the card", "exec"), names)
    assert given[0]["model"].similarity(given[0]["query"], given[0]["items"]).shape == (1, len(given[0]["items"]))
    assert len(given[0]["items"]) == (3 if "audio_config" not in FORMS[form] else 2)
    assert torch.isfinite(given[1]["unit"]).all() and given[1]["unit"].shape[0] == 2
    assert given[2]["results"].task_results[0].get_score() == 1.0  # both are among the first ten
