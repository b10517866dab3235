"""Cards say what files say: every number has its place, and what is missing stays away."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
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
from modeling_sail.training.build import load_built, save
from safetensors.torch import load_file, save_file

from modeling_sail.cli import main
from modeling_sail.configuration_sail import SailEmbeddingConfig
from modeling_sail.modeling_sail import SailEmbeddingModel

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
    (tmp_path / "r_7.json").write_text(json.dumps(content), encoding="utf-8")
    return At(tmp_path / "r_7.json")


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
    with pytest.raises(ValueError, match=r"r_7.json: there is no 'c' at"):
        trace.number(file / "0" / "c")
    with pytest.raises(ValueError, match="no number"):
        trace.number(file / "name")


def test_words_of_a_file_are_looked_for_where_they_stand_and_nowhere_else(file) -> None:
    trace = Trace({})
    said = [trace.text("5 films", file / "name"), trace.text("0", file / "0"), trace.text("r 7", At(file.file))]
    said.append(trace.text("0 of 5", file / "0", file / "name"))
    text, entries = trace.finish(" and ".join(said))
    assert text == "5 films and 0 and r 7 and 0 of 5" and entries[-1]["paths"] == [["0"], ["name"]]
    for wrong in (file, file / "0", file / "list"):
        with pytest.raises(ValueError, match="r_7.json: there is no 5 at"):
            trace.text("5 films", wrong)
    with pytest.raises(ValueError, match="r_7.json: there is no 'gone'"):
        trace.text("5 films", file / "gone")


def test_half_a_pair_of_backticks_hides_no_number(file) -> None:
    trace = Trace({})
    said = [trace.text("`a", file), trace.number(file / "0" / "b", digits=1), trace.text("b`", file)]
    assert trace.finish(" | ".join(said))[0] == "'a | 0.4 | b'"


def test_a_section_of_which_nothing_was_measured_is_left_out() -> None:
    template = "# {{a}}\n<!-- section: one -->\n## One\n{{b}}{{c}}\n<!-- section: two -->\n## Two\n{{d}}\n"
    assert fill(template, {"a": "x", "b": "", "c": "", "d": "y"}) == "# x\n## Two\ny\n"
    assert fill(template, {"a": "x", "b": "", "c": "z", "d": ""}) == "# x\n## One\nz\n"


# --- the card of a checkpoint -----------------------------------------------------------------------------------------


def report_of(folder: Path, name: str, rows: dict, model: dict | None, histograms: Any = None, **options: Any) -> Path:
    made = table("Some tasks", "Recall@50", rows, seeds=[0, 1, 2], **options)
    write_report(folder / name, "What is asked.", "python -m some.command", {"q2i": made}, model, histograms)
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
    mine = model_entry(tiny_copy)
    report_of(tmp_path, "peers.json", {"seek": {"ours": [0.5, 0.7, 0.6]}, "find": {"peer": [0.25]}}, mine)
    report_of(tmp_path, "aaa_3.json", {"dims": {"64": [0.1], "128": [0.2]}}, mine, notes=["over 12 films"])
    card = build_card(tiny_copy, [tmp_path])
    assert "| seek | 0.600 ±0.100 | – |" in card.text and "| find | – | 0.250 |" in card.text
    assert card.text.index("### Beside its peers") < card.text.index("### Aaa 3")  # known keys first
    assert "| Recall@50 | 64 | 128 |" in card.text and "over 12 films" in card.text
    assert "`python -m some.command`" in card.text and "figures/tiny/peers-q2i.svg" in card.figures
    assert build_card(tiny_copy, [tmp_path]).text == card.text


def test_a_report_that_is_about_nobody_or_a_shipped_model_is_in_no_other_card(tiny_copy, tmp_path, caplog) -> None:
    columns = {"dual tower": [0.3], "VLM-style (no audio)": [0.5], "SAIL (mini)": [0.4]}
    for name, model in (("peers.json", None), ("ladder.json", {"preset": "mini"})):
        report_of(tmp_path, name, {"seek": columns}, model)
    text = build_card(tiny_copy, [tmp_path]).text
    assert "## Measured" not in text and "## Beside the paper" not in text
    assert "does not say which model" in caplog.text and "about the shipped mini" in caplog.text


def test_a_report_about_the_shipped_preset_is_in_its_card_until_it_is_trained_on(tiny_copy, tmp_path, shipped) -> None:
    report_of(tmp_path, "peers.json", {"seek": {"ours": [0.5]}}, {"preset": "tiny"})
    assert "| seek | 0.500 |" in build_card(tiny_copy, [tmp_path]).text
    whole = json.loads((tiny_copy / "config.json").read_text(encoding="utf-8"))
    for changed in ({"fusion": "separate"}, {"causal": True}, {"audio_config": None}):
        (tiny_copy / "config.json").write_text(json.dumps({**whole, **changed}), encoding="utf-8")
        assert shipped_preset(tiny_copy) is None, f"the same tensors under {changed} are another model"


def test_histograms_of_the_separability_are_one_picture(tiny_copy, tmp_path) -> None:
    one = {"edges": [-1.0, 0.0, 1.0], "positive": [1, 9], "negative": [8, 2]}
    rows = {"seek": {"ours": [0.5], "peer": [0.25]}}
    found = {"seek": {"ours": one, "peer": one}, "find": {"ours": one}}
    report_of(tmp_path, "peers.json", rows, model_entry(tiny_copy), found)
    write_mteb(tmp_path / "mteb" / "NameToItem.json", {"main_score": 0.25, "separability_histogram": one})
    card = build_card(tiny_copy, [tmp_path])
    svg = ElementTree.fromstring(card.figures["figures/tiny/peers-separability.svg"])
    assert [(part.get("x"), part.get("y") == "0") for part in svg] == [
        ("0", True),
        (svg[0].get("width"), True),
        ("0", False),
    ]
    assert "seek: peer" in "".join(svg.itertext()) and "(figures/tiny/peers-separability.svg)" in card.text
    assert "NameToItem" in card.figures["figures/tiny/mteb-separability.svg"]
    write_mteb(tmp_path / "mteb" / "NameToItem.json", {"main_score": 0.25, "separability_histogram": {"edges": 3}})
    with pytest.raises(ValueError, match="NameToItem.json: separability_histogram cannot be drawn"):
        build_card(tiny_copy, [tmp_path])


def test_pictures_of_two_folders_of_results_do_not_meet(tiny_copy, tmp_path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        report_of(tmp_path / place, "a (b).json", {place: {"x": [0.5], "y": [0.25]}}, model_entry(tiny_copy))
    card = build_card(tiny_copy, [tmp_path / "one", tmp_path / "two"])
    assert list(card.figures) == ["figures/tiny/a-b-q2i.svg", "figures/tiny/a-b-q2i-again.svg"]
    assert all(f"]({place})" in card.text for place in card.figures)


def test_what_could_not_be_embedded_is_shown_where_there_is_any(tiny_copy, tmp_path) -> None:
    scores = {"main_score": 0.25, "recall_at_1": 0.125}
    write_mteb(tmp_path / "AllTask.json", {**scores, "left_out": 0.0})
    assert "| left out |" not in build_card(tiny_copy, [tmp_path]).text
    write_mteb(tmp_path / "SomeTask.json", {**scores, "left_out": 12.0})
    text = build_card(tiny_copy, [tmp_path]).text
    assert "| SomeTask | 0.250 | 0.125 | 12 |" in text and "| AllTask | 0.250 | 0.125 | 0 |" in text
    assert "| left out |" in text and "- *left out*: how many" in text


def test_a_report_about_other_weights_is_left_out(tiny_copy, tmp_path, caplog) -> None:
    rows = {"seek": {"all": [0.5], "text": [0.25]}}
    report_of(tmp_path, "robustness.json", rows, {"name": "tiny", "hash": "0" * 64})
    assert "Robustness" not in build_card(tiny_copy, [tmp_path]).text and "other weights" in caplog.text
    report_of(tmp_path, "robustness.json", rows, model_entry(tiny_copy))
    assert "Robustness" in build_card(tiny_copy, [tmp_path]).text


def test_a_broken_result_file_stops_the_card_with_its_name(tiny_copy, tmp_path) -> None:
    report_of(tmp_path, "peers.json", {"seek": {"ours": [0.5]}}, None).write_text('{"tables": {}}', encoding="utf-8")
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
    assert card.name == f"{tmp_path.name}/refined", "two runs have stages of one name"
    assert "Untrained" not in card.text and "not trained" not in card.text.lower()
    assert "| `base` | 100 | 6,400 | 2.00 | 3.0 | cpu |" in card.text
    assert "| `refined: pairs` | 1,200 | 6,400 |" in card.text
    assert "| picture -> name | 20 | 0.250 | 0.500 |" in card.text  # its own evaluation; no candidates, no baseline
    assert ModelCard(card.text).data.eval_results[1].metric_value == 0.5


@pytest.fixture
def shipped(tiny_copy, tmp_path, monkeypatch) -> None:
    """As if this package shipped `tiny_copy`."""
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(checkpoint_module, "WEIGHTS", tmp_path / "weights")
    save_file(load_file(tiny_copy / "model.safetensors"), tmp_path / "weights" / "tiny" / "trained.safetensors")
    for name, content in (("manifest", {"sha256": "0", "torch": "2"}), ("log", {})):
        (tmp_path / "weights" / "tiny" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    assert shipped_preset(tiny_copy) == "tiny"


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
    report_of(tmp_path, "peers.json", {"one": columns, "two": lower}, model_entry(tiny_copy))
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


# --- what a configuration tells ---------------------------------------------------------------------------------------

FORMS = {
    "all": {},
    "no audio": {"audio_config": None},
    "no vision": {"vision_config": None},
    "text alone": {"audio_config": None, "vision_config": None},
    "separate": {"fusion": "separate"},
}


def other_form(source: Path, folder: Path, form: str) -> Path:
    """A random model whose configuration differs from that of `source`."""
    model, processor = load_built(source)
    changed = SailEmbeddingModel(SailEmbeddingConfig.from_dict({**model.config.to_dict(), **FORMS[form]}))
    processor.modalities = [one for one in ("vision", "audio") if getattr(changed.config, f"{one}_config") is not None]
    save(changed, processor, folder)
    return folder


@pytest.mark.parametrize(
    ("form", "promised", "missing"),
    [
        ("all", "pictures, video and sound", "no audio"),
        ("no audio", "text, pictures and video in one vector. It has no audio tower", "ound is read"),
        ("no vision", "text and sound in one vector. It has no vision tower", "Visual tokens"),
        ("text alone", "neither a vision nor an audio tower", "fusion backbone"),
        ("separate", "It is a dual tower", "fusion backbone"),
    ],
)
def test_a_card_promises_what_the_configuration_has(tiny_folder, tmp_path, form, promised, missing) -> None:
    card = build_card(other_form(tiny_folder, tmp_path / "model", form))
    has = {"image": "vision_config", "video": "vision_config", "audio": "audio_config"}
    tags = {tag for tag, tower in has.items() if tower not in FORMS[form]}
    data = ModelCard(card.text).data
    assert promised in card.text and missing not in card.text
    assert set(data.tags) & set(has) == tags and ("multimodal" in data.tags) == bool(tags)
    assert data.pipeline_tag == ("feature-extraction" if tags else "sentence-similarity")
    assert ("Pictures and the frames of videos are not looked at" in card.text) == ("image" not in tags)
    assert ("Sound is not listened to" in card.text) == ("audio" not in tags)


def test_a_model_that_nobody_trained_is_said_to_be_untrained(tiny_copy) -> None:
    assert "**Untrained**" in build_card(tiny_copy).text
    tensors = load_file(tiny_copy / "model.safetensors")
    for part in ("text_tower", "vision_tower"):
        norm = next(name for name, one in tensors.items() if name.startswith(part) and one.dim() == 1)
        tensors[norm] = tensors[norm] + torch.arange(len(tensors[norm]))
    save_file(tensors, tiny_copy / "model.safetensors", {"format": "pt"})
    text = build_card(tiny_copy).text
    assert "**Untrained**" not in text and "**Not trained yet**: the weights of `audio_" in text
    said = text.split("Not trained yet")[1].split("drawn at random")[0]
    assert "`text_tower`" not in said and "gate" not in said, "no embedding passes through the gate"


@pytest.mark.parametrize("name", ["0", "run 2", "mini-v2", "1.5", "a|b `7", "12/3", 'q"u\\ote', "../../out", "#3 *x*"])
def test_a_folder_may_have_any_name(tiny_copy, tmp_path, name) -> None:
    card = build_card(tiny_copy, name=name)
    assert card.name == name and ModelCard(card.text).data.model_name == name
    assert [entry["shown"] for entry in card.numbers if entry["paths"] == [["name"]]] == words(
        next(line for line in card.text.splitlines() if line.startswith("# "))
    )
    loads = re.findall(r"^```python\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)
    assert f"name={json.dumps(name)}" in loads[2]
    assert all(compile(one, "an example", "exec") for one in loads)
    report_of(tmp_path, "a.json", {"seek": {"x": [0.5], "y": [0.25]}}, model_entry(tiny_copy))
    (place,) = build_card(tiny_copy, [tmp_path], name=name).figures
    assert re.fullmatch(r"figures/[\w][\w.-]*/a-q2i\.svg", place)


# --- what is broken ---------------------------------------------------------------------------------------------------


def broken_mteb(scores: Any) -> Any:
    def spoil(folder: Path) -> None:
        (folder / "results").mkdir()
        content = {"task_name": "NameTask", "scores": scores}
        (folder / "results" / "NameTask.json").write_text(json.dumps(content), encoding="utf-8")

    return spoil


def broken_stage(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        told = {name: value for name, value in {**STAGE, **changes}.items() if value is not None}
        (folder.parent / "stage.json").write_text(json.dumps(told), encoding="utf-8")

    return spoil


def holding(name: str, content: bytes) -> Any:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (holding("config.json", b'{"model_type": "bert", "hidden_size": 8}'), "a model of the type 'bert'"),
        (holding("config.json", b"[]"), "config.json holds a JSON list"),
        (
            holding("config.json", b'{"model_type": "sail_embedding", "text_config": 3}'),
            "config.json describes no model",
        ),
        (holding("config.json", b"\xff"), "config.json is no UTF-8 text"),
        (holding("processor_config.json", b"[1]"), "processor_config.json holds a JSON list"),
        (holding("results/a.json", b"\xff"), "a.json is no UTF-8 text"),
        (holding("results/a.json", b'{"tables": []}'), "a.json is no report"),
        (broken_stage(started_from=None), "stage.json is not what `sail train` writes: started_from missing"),
        (broken_stage(datasets=None), "stage.json is not what `sail train` writes: datasets missing"),
        (broken_stage(datasets={"pairs": 3}), "datasets missing or of another kind"),
        (broken_stage(versions=[], device=None), "device, versions missing"),
        (broken_stage(seconds="long"), "stage.json: there is no number at"),
        (broken_mteb([1]), "NameTask.json is no result of mteb: task_name"),
        (broken_mteb(None), "NameTask.json is no result of mteb: task_name"),
        (broken_mteb({"test": {"main_score": 0.5}}), "scores.test must be a list of objects"),
        (broken_mteb({"test": [3]}), "scores.test must be a list of objects"),
        (broken_mteb({"test": [{"recall_at_1": 0.5}]}), "main_score is missing from scores.test"),
    ],
)
def test_what_is_broken_is_one_line_that_names_the_file(tiny_folder, tmp_path, capsys, spoil, said) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "stage" / "model"))
    spoil(folder)
    results = ["--results", str(folder / "results")] if (folder / "results").is_dir() else []
    assert main(["card", str(folder), *results]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_code_that_is_missing_is_named_with_where_to_get_it(tiny_copy, tmp_path) -> None:
    write_mteb(tmp_path / "OneTask.json", {"main_score": 0.5}, "local/tiny", "0" * 40)
    (tiny_copy / "sentence_transformer_sail.py").unlink()
    with pytest.raises(ValueError, match=r"sentence_transformer_sail\.py is missing there; copy it from"):
        build_card(tiny_copy, [tmp_path])


def test_a_score_that_is_no_number_is_left_out(tiny_copy, tmp_path) -> None:
    write_mteb(tmp_path / "OneTask.json", {"main_score": float("nan"), "recall_at_1": 0.5, "recall_at_10": None})
    card = build_card(tiny_copy, [tmp_path])
    assert "| OneTask | 0.500 |" in card.text and not ModelCard(card.text).data.eval_results


def test_a_folder_above_the_model_is_told_where_the_model_lies(tiny_folder, tmp_path, capsys) -> None:
    shutil.copytree(tiny_folder, tmp_path / "my run" / "base" / "model")
    for place in ("my run", "my run/base"):
        for command in (["card"], ["push", "--repo", "someone/tiny"]):
            assert main([command[0], str(tmp_path / place), *command[1:]]) == 2
            error = capsys.readouterr().err
            assert f"name '{tmp_path}/my run/base/model'" in error and error.count("\n") == 1
