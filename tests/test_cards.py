"""Cards say what files say: every number has its place, and what is missing stays away."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from modeling_sail.evaluation.reports import file_sha256, model_entry, table, write_report
from modeling_sail.model_cards import card as card_module
from modeling_sail.model_cards import checkpoint as checkpoint_module
from modeling_sail.model_cards import claims, results
from modeling_sail.model_cards.card import build_card, fill
from modeling_sail.model_cards.checkpoint import read_checkpoint, shipped_preset, stages_before
from modeling_sail.model_cards.trace import At, Trace, numbers_in
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path) -> Path:
    """A folder of the tiny preset that a test may write into."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def words(text: str) -> list[str]:
    return [found[0] for found in numbers_in(text)]


# --- what a number is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("recall 0.482 ±0.005 of 1,401 cases, 67%", ["0.482", "0.005", "1,401", "67"]),
        ("+0.09, -0.5 and 1.4e-07; 5 of 6.", ["+0.09", "-0.5", "1.4e-07", "5", "6"]),
        ("R@50, float32, lite0, GPL-2.0, ViT-B/32, Qwen2.5-1.5B, 2026-11-21", []),
        ("§3.3.5 and Fig.9/10, arXiv:2510.12709", []),
        ("`7` [a](b/3.svg) <!-- 8 --> and 9", ["9"]),
        ("---\nvalue: 0.5\n---\n1\n```python\nx = 2\n```\n| 3 |", ["1", "3"]),
    ],
)
def test_a_number_stands_alone_and_names_references_and_code_are_none(text, found) -> None:
    assert words(text) == found


def test_nothing_measured_is_typed_into_the_template_or_the_facts() -> None:
    template = (CARDS / "template.md").read_text(encoding="utf-8")
    assert words(template) == []
    outside_fences = re.sub(r"^```.*?^```", "", template, flags=re.DOTALL | re.MULTILINE)
    assert [code for code in re.findall(r"`([^`]*)`", outside_fences) if words(code)] == []

    def strings(content: Any) -> list[str]:
        if isinstance(content, str):
            return [content]
        below = content.values() if isinstance(content, dict) else content
        return [text for one in below for text in strings(one)]

    facts = yaml.safe_load((CARDS / "facts.yaml").read_text(encoding="utf-8"))
    assert [text for text in strings(facts) if words(text)] == []


# --- the trace --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> At:
    content = {"0": {"a": 0.1, "b": 0.4}, "1": {"a": 0.3, "b": 0.4}, "list": [1.0, 2.0, 6.0], "name": "5 films"}
    (tmp_path / "r.json").write_text(json.dumps(content), encoding="utf-8")
    return At(tmp_path / "r.json")


def test_a_number_is_the_mean_of_its_seeds_with_half_the_distance_of_the_extremes(file) -> None:
    trace = Trace({})
    text, entries = trace.finish(f"x {trace.spread(file / 'list')} y {trace.number(file / '0' / 'b', digits=1)}")
    assert text == "x 3.000 ±2.500 y 0.4"
    assert [entry["how"] for entry in entries] == ["mean", "half range", "mean"]
    assert entries[0]["paths"] == [["list"]] and entries[0]["file"] == file.file


def test_a_difference_is_taken_seed_by_seed_and_rows_above_are_counted(file) -> None:
    trace = Trace({})
    more = {"minus": [file / "0" / "a", file / "1" / "a"]}
    better = [file / "list", file / "0" / "b"]
    said = trace.spread(file / "list", minus=[file / "0" / "a"], digits=1, signed=True)
    assert trace.finish(said)[0] == "+2.9 ±2.5"
    above = trace.number(*better, how="places above", **more)
    assert trace.finish(f"{above} of {trace.number(*better, how='places')}")[0] == "2 of 2"
    assert trace.values(*better) == [0.7, 1.2, 3.2]  # the mean over places, for each seed


def test_entries_stand_in_the_order_of_the_text_and_unused_ones_go(file) -> None:
    trace = Trace({})
    first, second = trace.number(file / "0" / "a", digits=1), trace.number(file / "0" / "b", digits=1)
    trace.number(file / "1" / "a", digits=1)
    text, entries = trace.finish(f"{second} then {first}, {trace.text('5 films', file / 'name')}")
    assert text == "0.4 then 0.1, 5 films" and [entry["shown"] for entry in entries] == ["0.4", "0.1", "5"]


def test_a_typed_number_is_refused_and_so_is_one_that_no_file_has(file) -> None:
    trace = Trace({})
    with pytest.raises(ValueError, match="The number 0.99 .* comes from no file"):
        trace.finish(f"{trace.number(file / '0' / 'a', digits=1)} and 0.99")
    with pytest.raises(ValueError, match=r"r.json: there is no 'c' at"):
        trace.number(file / "0" / "c")
    with pytest.raises(ValueError, match="no number"):
        trace.number(file / "name")


def test_a_section_of_which_nothing_was_measured_is_left_out() -> None:
    template = "# {{a}}\n<!-- section: one -->\n## One\n{{b}}{{c}}\n<!-- section: two -->\n## Two\n{{d}}\n"
    assert fill(template, {"a": "x", "b": "", "c": "", "d": "y"}) == "# x\n## Two\ny\n"
    assert fill(template, {"a": "x", "b": "", "c": "z", "d": ""}) == "# x\n## One\nz\n"


# --- the card of a checkpoint -----------------------------------------------------------------------------------------


def report_of(folder: Path, name: str, rows: dict, model: dict | None = None, **options: Any) -> Path:
    made = table("Some tasks", "Recall@50", rows, seeds=[0, 1, 2], **options)
    write_report(folder / name, "What is asked.", "python -m some.command", {"q2i": made}, model)
    return folder / name


def test_a_card_without_results_has_no_figure_of_quality(tiny_copy) -> None:
    card = build_card(tiny_copy, [])
    assert "## Measured" not in card.text and "## Beside the paper" not in card.text and "R@" not in card.text
    assert "## What training took" not in card.text and "## Use" in card.text
    assert "model-index" not in card.text and "license" not in card.text  # of a model that we do not ship we know none
    assert file_sha256(tiny_copy / "model.safetensors") in card.text
    assert card.checkpoint["parameters"]["all"] == sum(
        tensor.numel() for name, tensor in load_file(tiny_copy / "model.safetensors").items()
    )


def test_the_metadata_come_back_through_huggingface_hub(tiny_copy, tmp_path) -> None:
    write_mteb(tmp_path / "mteb" / "NameToItem.json", {"main_score": 0.25, "recall_at_10": 0.25, "ndcg_at_10": 0.125})
    card = build_card(tiny_copy, [tmp_path / "mteb"], name="tiny")
    data = ModelCard(card.text).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        "sentence-transformers",
        "feature-extraction",
        "tiny",
    )
    _, values = model_index_to_eval_results(data.to_dict()["model-index"])
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in values] == [
        ("NameToItem", "main_score", 0.25)
    ]
    assert "| NameToItem | 0.250 | 0.250 | 0.125 |" in card.text


def write_mteb(path: Path, scores: dict, name: str = "", revision: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"task_name": path.stem, "mteb_version": "2", "scores": {"test": [{**scores, "hf_subset": "default"}]}}
    path.write_text(json.dumps(content), encoding="utf-8")
    if revision is not None:
        (path.parent / "model_meta.json").write_text(json.dumps({"name": name, "revision": revision}), encoding="utf-8")


def test_results_of_mteb_on_another_model_are_left_out(tiny_copy, tmp_path) -> None:
    digest = read_checkpoint(tiny_copy).digest
    for place, name, revision in (
        ("Other", "local/other", "0" * 40),
        ("Mine", "local/tiny", digest),
        ("Text", "local/tiny-plain", digest),
    ):
        write_mteb(tmp_path / "mteb" / place / f"{place}Task.json", {"main_score": 0.25}, name, revision)
    text = build_card(tiny_copy, [tmp_path / "mteb"]).text
    assert "MineTask" in text and "OtherTask" not in text and "TextTask" not in text


def test_any_report_is_shown_and_a_cell_that_was_not_measured_is_empty(tiny_copy, tmp_path) -> None:
    report_of(tmp_path, "peers.json", {"seek": {"ours": [0.5, 0.7, 0.6]}, "find": {"peer": [0.25]}})
    report_of(tmp_path, "aaa.json", {"dims": {"64": [0.1], "128": [0.2]}}, notes=["over 12 films"])
    card = build_card(tiny_copy, [tmp_path])
    assert "| seek | 0.600 ±0.100 | – |" in card.text and "| find | – | 0.250 |" in card.text
    assert card.text.index("### Beside its peers") < card.text.index("### Aaa")  # known keys first
    assert "| Recall@50 | 64 | 128 |" in card.text and "over 12 films" in card.text
    assert "`python -m some.command`" in card.text and "figures/tiny/peers-q2i.svg" in card.figures
    assert build_card(tiny_copy, [tmp_path]).text == card.text


def test_a_report_about_other_weights_is_left_out(tiny_copy, tmp_path, caplog) -> None:
    rows = {"seek": {"all": [0.5], "text": [0.25]}}
    report_of(tmp_path, "robustness.json", rows, {"name": "tiny", "hash": "0" * 64})
    assert "Robustness" not in build_card(tiny_copy, [tmp_path]).text and "other weights" in caplog.text
    report_of(tmp_path, "robustness.json", rows, model_entry(tiny_copy))
    assert "Robustness" in build_card(tiny_copy, [tmp_path]).text


def test_a_broken_result_file_stops_the_card_with_its_name(tiny_copy, tmp_path) -> None:
    report_of(tmp_path, "peers.json", {"seek": {"ours": [0.5]}}).write_text('{"tables": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="peers.json is no report"):
        build_card(tiny_copy, [tmp_path])
    with pytest.raises(FileNotFoundError, match="no folder .* of results"):
        build_card(tiny_copy, [tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="There is no model in"):
        build_card(tmp_path)


def test_what_was_measured_on_mini_is_not_shown_for_another_model(tiny_copy) -> None:
    found = results.read_results([card_module.RESULTS], read_checkpoint(tiny_copy))
    assert not {one.key for one in found} & set(results.EARLIER)


STAGE = {
    "stage": "base",
    "started_from": "elsewhere/model",
    "datasets": {"pairs": {"rows": 1200, "samples": 6400}},
    "steps": 100,
    "samples": 6400,
    "seconds": 7200.0,
    "peak_memory_bytes": 3 << 30,
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
    "evaluation": [{"task": "picture -> name", "queries": 20, "model R@1": 0.25, "model R@10": 0.5}],
}


def test_what_training_took_comes_from_the_stages_logs(tiny_folder, tmp_path) -> None:
    for name, started in (("base", "elsewhere/model"), ("refined", "old/place/base/model")):
        shutil.copytree(tiny_folder, tmp_path / name / "model")
        told = {**STAGE, "started_from": started}
        (tmp_path / name / "stage.json").write_text(json.dumps(told), encoding="utf-8")
    stages, root = stages_before(tmp_path / "refined" / "model")
    assert [stage.folder.name for stage in stages] == ["base", "refined"] and root == Path("elsewhere/model")
    card = build_card(tmp_path / "refined" / "model")
    assert card.name == "refined"
    assert "| base | 100 | 6,400 | 2.00 | 3.0 | cpu |" in card.text
    assert "| `refined: pairs` | 1,200 | 6,400 |" in card.text
    assert "| picture -> name | 20 | 0.250 | 0.500 |" in card.text  # its own evaluation; no candidates, no baseline
    assert ModelCard(card.text).data.eval_results[1].metric_value == 0.5


def test_a_shipped_model_is_known_by_its_tensors_alone(tiny_copy, tmp_path, monkeypatch) -> None:
    tensors = load_file(tiny_copy / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(checkpoint_module, "WEIGHTS", tmp_path / "weights")
    half = tensors[name].half()
    save_file({name: half}, tmp_path / "weights" / "tiny" / "trained.safetensors")
    assert shipped_preset(tiny_copy) is None  # half precision is not what the folder holds
    save_file({**tensors, name: half.float()}, tiny_copy / "model.safetensors")
    assert shipped_preset(tiny_copy) == "tiny"
    save_file(
        {name: half + torch.nn.functional.one_hot(torch.tensor(0), half.shape[1])},
        tmp_path / "weights" / "tiny" / "trained.safetensors",
    )
    assert shipped_preset(tiny_copy) is None


# --- beside the paper -------------------------------------------------------------------------------------------------


def test_a_verdict_needs_more_than_the_spread() -> None:
    assert claims.verdict([0.1, 0.2, 0.3]) == claims.AGREES
    assert claims.verdict([-0.1, -0.2, -0.3]) == claims.DISAGREES
    assert claims.verdict([-0.1, 0.0, 0.2]) == claims.WITHIN
    assert claims.verdict([0.0, 0.0]) == claims.WITHIN
    assert claims.verdict([-0.1, -0.2], higher_is_better=False) == claims.AGREES
    assert claims.verdict([0.1]) == f"{claims.AGREES} (one seed)"


def test_the_card_says_where_our_direction_is_not_the_papers(tiny_copy, tmp_path) -> None:
    columns = {"dual tower": [0.3, 0.3, 0.3], "VLM-style (no audio)": [0.5, 0.6, 0.7], "SAIL (mini)": [0.4, 0.4, 0.4]}
    lower = {name: [value / 2 for value in values] for name, values in columns.items()}
    report_of(tmp_path, "peers.json", {"one": columns, "two": lower})
    text = build_card(tiny_copy, [tmp_path]).text
    said = text[text.index("## Beside the paper") :]
    assert (
        "| the omni-modal model is above the VLM-style one on q2i | Tab.3 | -0.150 ±0.075 | 0 of 2 | **disagrees** |"
        in said
    )
    assert "| the omni-modal model is above the dual tower on q2i | Tab.3 | +0.075 ±0.000 | 2 of 2 | agrees |" in said
    assert "i2i" not in said.split("##")[1] and "CoSENT" not in said  # no table, no claim


def test_a_rule_names_each_of_its_sides_once_and_rules_are_not_said_twice() -> None:
    assert len({(rule.claim, rule.report, rule.table) for rule in claims.RULES}) == len(claims.RULES)
    assert all(
        rule.better != rule.worse and rule.source and not words(rule.claim + rule.source) for rule in claims.RULES
    )
