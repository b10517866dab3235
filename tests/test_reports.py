"""Reports: one form, written whole, refused when broken; tables and pictures show the values of the seeds."""

from __future__ import annotations

import json
import platform
import statistics
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.evaluation import charts, reports
from modeling_sail.evaluation.reports import (
    bar_chart,
    markdown_table,
    model_entry,
    read_report,
    report,
    spread,
    table,
    write_histograms,
    write_report,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 4))
CELLS = {"seek": {"ours": [0.5, 0.7, 0.6], "peer": [0.4]}, "name": {"ours": [0.25, 0.25, 0.25]}}


def example() -> dict:
    return table("Retrieval", "Recall@50", CELLS, seeds=[0, 1, 2], notes=["of held-out names"])


def test_a_report_comes_back_as_it_was_written_with_machine_versions_and_day(tmp_path) -> None:
    made = write_report(tmp_path / "a" / "peers.json", "Peers.", "python -m x", {"q2i": example()})
    assert read_report(tmp_path / "a" / "peers.json") == made
    assert made["machine"]["threads"] == torch.get_num_threads() and made["machine"]["memory_gib"] > 0
    assert made["versions"]["torch"] == torch.__version__ and made["model"] is None
    assert platform.node() not in json.dumps(made["machine"])


def test_a_table_keeps_the_order_of_columns_and_every_seed() -> None:
    made = example()
    assert made["columns"] == ["ours", "peer"] and made["rows"] == CELLS and made["higher_is_better"] is True
    assert table("t", "", CELLS, seeds=[0, 1, 2], columns=["peer", "ours"])["columns"] == ["peer", "ours"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1, float("nan"), 0.2], "3 finite numbers"),
        ([0.1, 0.2], "3 finite numbers"),
        ([], "3 finite numbers"),
        ([None], "leave a cell out"),
        ([True], "finite"),
    ],
)
def test_a_cell_that_is_no_value_a_seed_is_refused(values, said) -> None:
    with pytest.raises(ValueError, match=said):
        table("t", "", {"row": {"column": values}}, seeds=[0, 1, 2])


def test_a_column_that_is_not_named_is_refused() -> None:
    with pytest.raises(ValueError, match="has a column 'b'; there are \\['a'\\]"):
        table("t", "", {"row": {"b": [1.0]}}, seeds=[0], columns=["a"])


BROKEN = {
    "machine missing": (lambda one: one.pop("machine"), "is no report: machine missing"),
    "no sentence": (lambda one: one.update(about=" "), "about is ' '"),
    "no tables": (lambda one: one.update(tables=[1]), "tables is list"),
    "model without hash": (lambda one: one.update(model={"name": "mini"}), "model is"),
    "a mean in place of seeds": (
        lambda one: one["tables"]["q2i"]["rows"]["seek"].update(ours=0.5),
        "tables.q2i: 'seek', 'ours' holds 0.5",
    ),
    "histograms of something else": (lambda one: one.update(histograms=[1]), "histograms are no rows"),
    "a histogram without edges": (
        lambda one: one.update(histograms={"a": {"b": {"positive": [1], "negative": [1]}}}),
        "KeyError: 'edges'",
    ),
    "a histogram whose bins do not fit": (
        lambda one: one.update(histograms={"a": {"b": {"edges": [0, 1], "positive": [1, 2], "negative": [1]}}}),
        "histograms, a, b: 2 edges, bins [2, 1]",
    ),
    "no title": (lambda one: one["tables"]["q2i"].pop("title"), "tables.q2i: title must be of the type str"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_report_is_refused_with_its_file_and_place(tmp_path, name) -> None:
    content = report("Peers.", "python -m x", {"q2i": example()})
    change, said = BROKEN[name]
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="broken.json") as caught:
        read_report(path)
    assert said in str(caught.value)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON file"):
        read_report(path)


def test_a_refused_report_leaves_the_old_file(tmp_path) -> None:
    write_report(tmp_path / "a.json", "Old.", "python -m x", {"q2i": example()})
    with pytest.raises(ValueError, match="about"):
        write_report(tmp_path / "a.json", "", "python -m x", {"q2i": example()})
    assert read_report(tmp_path / "a.json")["about"] == "Old."


def test_a_model_is_named_by_its_folder_and_the_hash_of_its_weights(tmp_path) -> None:
    (tmp_path / "mini").mkdir()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        model_entry(tmp_path / "mini")
    (tmp_path / "mini" / "model.safetensors").write_bytes(b"abc")
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", by FIPS 180
    assert model_entry(tmp_path / "mini") == {"name": "mini", "hash": sha}


# --- shown ------------------------------------------------------------------------------------------------------------


def test_the_spread_is_the_mean_and_half_the_distance_of_the_extremes() -> None:
    assert spread([0.1, 0.2, 0.4]) == "0.233 ±0.150"
    assert spread([0.25]) == "0.250" and spread([1536.0, 1538.0], 0) == "1,537 ±1"
    assert spread([2e-7], -1) == "2.0e-07"


@pytest.mark.parametrize(
    ("values", "digits"),
    [([0.5, 1.9], 3), ([5.5], 2), ([150.2], 1), ([15000.5], 0), ([128, 256], 0), ([1, 0], 3), ([2e-7], -1)],
)
def test_decimals_follow_the_largest_value(values, digits) -> None:
    assert reports.digits_for(values) == digits


def test_the_table_marks_the_best_of_a_row_and_leaves_out_what_was_not_measured() -> None:
    lines = markdown_table(example()).splitlines()
    assert lines[0] == "| Recall@50 | ours | peer |"
    assert lines[2:] == ["| seek | **0.600 ±0.100** | 0.400 |", "| name | 0.250 ±0.000 | – |"]
    lower = {**example(), "higher_is_better": False}
    assert "| **0.400** |" in markdown_table(lower)
    assert "**" not in markdown_table({**example(), "unit": ""})  # several units: no best
    same = table("t", "AUC", {"row": {"a": [0.5], "b": [0.5]}}, seeds=[0])
    assert "**" not in markdown_table(same)


def test_a_column_of_seconds_and_shares_has_the_decimals_of_each_row() -> None:
    mixed = table("t", "", {"speed": {"a": [1200.0], "b": [900.4]}, "gap": {"a": [2e-7], "b": [3e-7]}}, seeds=[0])
    assert markdown_table(mixed).splitlines()[2:] == ["| speed | 1,200 | 900 |", "| gap | 2.0e-07 | 3.0e-07 |"]


def test_a_small_number_of_another_unit_is_not_shown_as_none() -> None:
    mixed = table("t", "", {"peak": {"a": [490.0], "b": [1003.0]}, "items": {"a": [24.1], "b": [0.124]}}, seeds=[0])
    assert markdown_table(mixed).splitlines()[2:] == ["| peak | 490.0 | 1,003 |", "| items | 24.1 | 0.1 |"]


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return [one for one in ElementTree.fromstring(svg).iter() if one.tag.endswith(tag)]


@settings(max_examples=30)
@given(
    st.dictionaries(st.text(min_size=1, max_size=30), st.lists(NUMBERS, min_size=1, max_size=3), min_size=1, max_size=4)
)
def test_a_bar_is_as_high_as_the_mean_and_stands_on_zero(cells) -> None:
    made = {
        "title": "a <title>",
        "unit": "&",
        "columns": ["one"],
        "rows": {row: {"one": v} for row, v in cells.items()},
    }
    svg = bar_chart(made)
    low, high, _ = charts.axis(min(map(min, cells.values())), max(map(max, cells.values())))
    bars = [one for one in elements(svg, "rect") if one.get("width") == str(charts.BAR)]
    assert len(bars) == len(cells)
    for bar, values in zip(bars, cells.values(), strict=True):
        assert float(bar.get("height")) == pytest.approx(
            abs(statistics.mean(values)) * charts.HEIGHT / (high - low), abs=0.06
        )
        ends = float(bar.get("y")), float(bar.get("y")) + float(bar.get("height"))
        zero = charts.TOP + charts.HEIGHT * high / (high - low)
        assert min(abs(end - zero) for end in ends) < 0.11


@given(NUMBERS, NUMBERS)
def test_an_axis_holds_zero_and_the_values_with_few_lines(one, other) -> None:
    low, high, step = charts.axis(min(one, other), max(one, other))
    slack = 1e-6 * step
    assert low <= min(one, other, 0) + slack and high >= max(one, other, 0) - slack and high > low
    lines = charts.ticks(low, high, step)
    assert 2 <= len(lines) <= 7 and any(abs(line) <= slack for line in lines)


def test_whiskers_reach_the_extremes_and_one_seed_has_none() -> None:
    svg = bar_chart(example())
    whiskers = [one for one in elements(svg, "line") if one.get("stroke") == "#000"]
    assert len(whiskers) == 2  # three seeds of ours in two rows; the peer has one
    low, high, _ = charts.axis(0.25, 0.7)
    expected = [charts.TOP + charts.HEIGHT * (high - value) / (high - low) for value in (0.5, 0.7)]
    assert [float(whiskers[0].get(end)) for end in ("y1", "y2")] == pytest.approx(expected, abs=0.06)
    with pytest.raises(ValueError, match="no value"):
        bar_chart({"title": "t", "unit": "", "columns": [], "rows": {}})


# --- histograms -------------------------------------------------------------------------------------------------------

BINS = {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "positive": [0, 0, 1, 3], "negative": [6, 2, 0, 0]}


def test_positives_go_up_and_negatives_down_by_their_share() -> None:
    svg = charts.histogram_chart("same <name>", BINS)
    zero, scale = charts.TOP + charts.SIDE, charts.SIDE / 0.75
    bars = {color: [] for color in charts.MIRRORED.values()}
    for one in elements(svg, "rect"):
        if one.get("width") == str(charts.BIN):
            bars[one.get("fill")].append(tuple(float(one.get(name)) for name in ("x", "y", "height")))
    up, down = bars.values()
    assert [x for x, _, _ in up] == [charts.LEFT + 2 * charts.BIN, charts.LEFT + 3 * charts.BIN]
    assert [height for _, _, height in up] == pytest.approx([0.25 * scale, 0.75 * scale], abs=0.06)
    assert all(y + height == pytest.approx(zero, abs=0.11) for _, y, height in up)
    assert [height for _, _, height in down] == pytest.approx([0.75 * scale, 0.25 * scale], abs=0.06)
    assert all(y == pytest.approx(zero) for _, y, _ in down)
    said = [one.text for one in elements(svg, "text")]
    assert "same <name>" in said and {"positives", "random negatives", "-1", "0", "1"} <= set(said)


@pytest.mark.parametrize(
    "change", [{"positive": [0, 0, 0, 0]}, {"negative": [1]}, {"edges": [0.0]}], ids=["nothing", "few", "edges"]
)
def test_a_histogram_that_cannot_be_drawn_is_refused(change) -> None:
    with pytest.raises(ValueError, match="one less than edges, with a count"):
        charts.histogram_chart("t", BINS | change)


def test_histograms_are_added_and_come_back_with_the_report_and_as_a_page(tmp_path) -> None:
    both = reports.pooled([BINS, BINS])
    assert both == {"edges": BINS["edges"], "positive": [0, 0, 2, 6], "negative": [12, 4, 0, 0]}
    found = {"a <task>": {"ours": both, "peer": BINS}}
    made = write_report(tmp_path / "a.json", "Peers.", "python -m x", {"q2i": example()}, histograms=found)
    assert read_report(tmp_path / "a.json") == made and made["histograms"] == found
    assert "histograms" not in report("Peers.", "python -m x", {"q2i": example()})
    text = write_histograms(tmp_path / "page.html", "Peers & co", found).read_text(encoding="utf-8")
    assert text.count("<svg") == 2 and "<h2>a &lt;task&gt;</h2>" in text and "Peers &amp; co" in text
