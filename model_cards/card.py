"""`sail card`: a checkpoint, what its training left, and result files become a card with metadata, tables and pictures.

Room: Evaluation -> **Card**. Unusual: no number is written here or in the template: each is asked for by its place
(trace.py), and a section of which nothing was measured is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.charts import bar_chart, histogram_chart
from ..evaluation.reports import file_sha256, markdown_table
from ..training.files import write_text
from ..training.packages import PACKAGES
from ..training.towers import tower_licences
from . import wording
from .checkpoint import Checkpoint, read_checkpoint
from .claims import claims_table
from .pictures import side_by_side
from .push import check_repo
from .results import RESULTS, read_results
from .tables import Found, Table
from .trace import CHECKPOINT, At, Entry, Trace, read_json, read_text, shown

HERE = Path(__file__).parent
MOST_BARS = 120  # a picture with more tells nothing


@dataclass(frozen=True)
class Card:
    """A card and where its numbers come from.

    Attributes:
        name: of the model.
        text: Markdown with the metadata block.
        numbers: an entry for each number of the text, in its order; metadata: the same for its model-index.
        checkpoint: what was read from the checkpoint.
        files: result files that were read.
        figures: SVG by the path that the text names.
    """

    name: str
    text: str
    numbers: Sequence[Entry]
    metadata: Sequence[Entry]
    checkpoint: Mapping[str, Any]
    files: Sequence[Path]
    figures: Mapping[str, str]


def make_card(
    folder: str | Path,
    results: Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    repo: str | None = None,
) -> list[Path]:
    """Write the card of a model: ``README.md`` in its folder, and ``out``; pictures and the trace lie beside each.

    Args:
        folder: of the model.
        results: folders of result files. By default this package's own for a shipped model, none for another.
        out: another place for the card, such as ``model_cards/mini.md``.
        name: of the model; by default the folder's, or of a stage ``<run>/<stage>``.
        repo: what the card's examples load, such as ``USER/NAME``; the folder by default.

    Returns:
        The cards that were written.

    Raises:
        FileNotFoundError: no model, no folder of results. ValueError: another kind of model, a broken file, or no name
            of a repository.
    """
    if repo is not None:
        check_repo(repo)
    card = build_card(Path(folder), None if results is None else [Path(one) for one in results], name=name, repo=repo)
    places = [Path(folder) / "README.md", *([Path(out)] if out is not None else [])]
    for place in places:
        write_card(card, place)
    return places


def build_card(
    folder: Path, results: Sequence[Path] | None = None, *, name: str | None = None, repo: str | None = None
) -> Card:
    """The card of a model, not yet written; see `make_card`."""
    checkpoint = read_checkpoint(folder)
    if results is None:
        results = [RESULTS] if checkpoint.untouched and RESULTS.is_dir() else []
    name = " ".join((name or _default_name(folder)).split())
    found = read_results(results, checkpoint)
    trace = Trace({"name": name, **checkpoint.facts()})
    facts = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    about: dict[str, Any] = facts["models"].get(checkpoint.shipped, {}) if checkpoint.untouched else {}
    figures: dict[str, str] = {}
    filled = {
        **wording.examples(checkpoint.config, repo or _load_from(folder), name),
        "title": trace.text(name, At(CHECKPOINT) / "name"),
        "summary": about.get("summary") or wording.summary(checkpoint),
        "parts": _parts(checkpoint, facts, trace),
        "shape": _shape(checkpoint, trace),
        "results": "\n\n".join(_result(one, name, trace, figures) for one in found),
        "claims": claims_table(found, trace),
        "towers": _towers(checkpoint, facts),
        "sources": _sources(checkpoint, facts, trace),
        "cost": _cost(checkpoint, trace),
        "limits": "\n".join(f"- {one}" for one in [*wording.limits(checkpoint.config), *about.get("limits", [])]),
        "files": _files(trace),
        "versions": _versions(checkpoint),
    }
    body, numbers = trace.finish(fill((HERE / "template.md").read_text(encoding="utf-8"), filled))
    data, metadata = _metadata(name, checkpoint, facts, about, found, trace)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    assert ModelCard(text).data.to_dict() == data.to_dict(), "the metadata do not come back as they were written"
    files = dict.fromkeys(entry["file"] for entry in [*numbers, *metadata] if entry["file"] != CHECKPOINT)
    files |= dict.fromkeys(path for one in found for path in one.files)
    return Card(name, text, numbers, metadata, trace.checkpoint, list(files), figures)


def _default_name(folder: Path) -> str:
    """The folder's name; of what a stage wrote, ``<run>/<stage>/model``, those of run and stage."""
    whole = folder.resolve()
    if (whole.parent / "stage.json").is_file():
        return f"{whole.parent.parent.name}/{whole.parent.name}"
    return whole.name


def _load_from(folder: Path) -> str:
    """Where examples load a model that has no repository: its folder as it was named, but no path of this machine."""
    return folder.resolve().name if folder.is_absolute() else folder.as_posix()


def slug(name: str) -> str:
    """A name as a part of a path: no spaces, slashes or brackets."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "model"


def fill(template: str, filled: Mapping[str, str]) -> str:
    """A template with its places filled; a section all of whose places came out empty is left out."""
    kept = []
    for section in re.split(r"^<!-- section: \w+ -->\n", template, flags=re.MULTILINE):
        names = re.findall(r"\{\{(\w+)\}\}", section)
        if not names or any(filled[name] for name in names):
            kept.append(re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], section))
    return re.sub(r"\n{3,}", "\n\n", "".join(kept)).rstrip() + "\n"


def write_card(card: Card, path: Path) -> None:
    """Write a card, its pictures and its trace; pictures of an earlier one that are no longer in it go."""
    folder = f"figures/{slug(card.name)}"
    for old in (path.parent / folder).glob("*.svg"):
        if f"{folder}/{old.name}" not in card.figures:
            old.unlink()
    for place, svg in card.figures.items():
        write_text(path.parent / place, svg)
    write_text(path, card.text)

    def beside(file: Path) -> str:
        return str(file) if file == CHECKPOINT else Path(os.path.relpath(file, path.parent)).as_posix()

    def lines(entries: Sequence[Entry]) -> str:
        return ",\n".join(json.dumps({**entry, "file": beside(entry["file"])}, ensure_ascii=False) for entry in entries)

    sources = {beside(file): file_sha256(file) for file in card.files}
    head = json.dumps({"card": path.name, "sources": sources, "checkpoint": card.checkpoint}, indent=1)[:-2]
    listed = f',\n "metadata": [\n{lines(card.metadata)}\n],\n "numbers": [\n{lines(card.numbers)}\n]\n}}\n'
    write_text(path.with_suffix(".trace.json"), head + listed)


# --- the model --------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns in which nothing stands are left out, and a table without a row is nothing."""
    kept = [place for place, _ in enumerate(columns) if any(row[place] for row in rows)]
    lines = [[columns[place] for place in kept], ["---"] * len(kept), *([row[place] for place in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _parts(checkpoint: Checkpoint, facts: Mapping[str, Any], trace: Trace) -> str:
    names, order = checkpoint.tower_names(), list(wording.PARTS)
    rows = []
    for part in sorted(checkpoint.parameters, key=lambda part: order.index(part) if part in order else -1):
        tower = names.get(part.removesuffix("_tower"), "")
        what = facts["towers"].get(tower, {}).get("what", tower and f"`{tower}`")
        said = ": ".join(word for word in (wording.part_name(part, checkpoint.config), what) if word)
        rows.append([f"`{part}`" if part != "all" else "", said, trace.number(At(CHECKPOINT) / "parameters" / part)])
    return _table(["part", "what", "parameters"], rows)


def _shape(checkpoint: Checkpoint, trace: Trace) -> str:
    """Lengths of embeddings, and of inputs that the model has towers for, as far as the configuration tells them."""
    has = ("", *wording.modalities(checkpoint.config))
    config, processor = At(CHECKPOINT) / "config", At(CHECKPOINT) / "processor"
    dims = trace.checkpoint["config"].get("matryoshka_dims", [])
    lengths = [trace.number(config / "matryoshka_dims" / place) for place in range(len(dims))]
    said = [f"Lengths of the embedding that stand alone (Matryoshka): {', '.join(lengths)}."] if lengths else []
    for needed, place, key, words in (
        ("vision", config, "num_latents", "Visual tokens of an item: {}."),
        ("", processor, "max_tokens", "Tokens of an item at most: {}."),
        ("vision", processor, "frames_per_video", "Frames of a video: {}."),
        ("audio", processor, "audio_window_seconds", "Sound is read in windows of {} seconds."),
        ("audio", processor, "max_audio_seconds", "Seconds of sound at most: {}."),
    ):
        if needed in has and isinstance(trace.checkpoint[place.path[0]].get(key), (int, float)):
            said.append(words.format(trace.number(place / key)))
    return " ".join(said)


def _towers(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str:
    rows, licences = [], tower_licences()
    for modality, name in checkpoint.tower_names().items():
        known = facts["towers"].get(name, {})
        shipped_as = ", ".join(f"`{known['hub']}`" for _ in [0] if "hub" in known)
        rows.append([modality, f"`{name}`", shipped_as, licences.get(name, "as its page says")])
    return f"Towers:\n\n{_table(['modality', 'tower', 'on the Hub', 'licence'], rows)}" if rows else ""


def _sources(checkpoint: Checkpoint, facts: Mapping[str, Any], trace: Trace) -> str:
    """What the shipped model was trained on, then what each stage after it was."""
    rows = []
    if checkpoint.trained is not None:
        manifest = At(checkpoint.trained / "manifest.json") / "rows"
        for source in read_json(manifest.file).get("rows", {}):
            data = [facts["data"][one] for one in facts["sources"].get(source, [])]
            licences = dict.fromkeys(PACKAGES[package].licence for one in data for package in one["packages"])
            what = "; ".join(one["what"] for one in data)
            rows.append([f"`{source}`", what, ", ".join(licences), trace.number(manifest / source), ""])
    for stage in checkpoint.stages:
        at = At(stage.folder / "stage.json") / "datasets"
        for source, told in stage.entry["datasets"].items():
            numbers = [
                trace.number(at / source / key) if told.get(key) is not None else "" for key in ("rows", "samples")
            ]
            rows.append([f"`{stage.folder.name}: {source}`", "", "", *numbers])
    lead = "Trained on; the licences are the data's, and none of the data is in this folder:"
    return f"{lead}\n\n{_table(['source', 'what', 'licence', 'rows', 'samples'], rows)}" if rows else ""


def _cost(checkpoint: Checkpoint, trace: Trace) -> str:
    rows = []
    hours = {"digits": 2, "scale": 1 / 3600}
    if checkpoint.trained is not None:
        manifest, log = At(checkpoint.trained / "manifest.json") / "seconds", checkpoint.trained / "log.json"
        steps = read_json(log) if log.is_file() else {}
        for stage in read_json(manifest.file).get("seconds", {}):
            last = At(log) / stage / -1 / "step"
            done = trace.number(last) if steps.get(stage) and "step" in steps[stage][-1] else ""
            rows.append(
                [trace.text(stage, manifest / stage), done, "", trace.number(manifest / stage, **hours), "", ""]
            )
    for stage in checkpoint.stages:
        at, entry = At(stage.folder / "stage.json"), stage.entry
        peak = trace.number(at / "peak_memory_bytes", digits=1, scale=1 / (1 << 30))
        counts = [trace.number(at / "steps"), trace.number(at / "samples")]
        device = trace.text(entry["device"], at / "device")
        rows.append([f"`{stage.folder.name}`", *counts, trace.number(at / "seconds", **hours), peak, device])
    return _table(["stage", "steps", "samples", "hours", "peak memory (GiB)", "device"], rows)


def _files(trace: Trace) -> str:
    at = At(CHECKPOINT) / "weights"
    rows = [
        [f"`{name}`", trace.number(at / name / "bytes"), f"`{one['sha256']}`"]
        for name, one in trace.checkpoint["weights"].items()
    ]
    return _table(["file", "bytes", "sha256"], rows)


def _versions(checkpoint: Checkpoint) -> str:
    """Versions and hashes stand in code: they are names, not measurements."""
    said = []
    if checkpoint.trained is not None:
        manifest = read_json(checkpoint.trained / "manifest.json")
        said.append(f"What training changed is `trained.safetensors`, sha256 `{manifest['sha256']}`.")
        said.append(f"Trained with `torch {manifest['torch']}`.")
    for stage in checkpoint.stages:
        versions = ", ".join(f"`{name} {version}`" for name, version in stage.entry["versions"].items())
        said.append(f"Stage `{stage.folder.name}`: {versions}.")
    config = checkpoint.config.get("transformers_version")
    return " ".join([*said, *([f"Saved with `transformers {config}`."] if config else [])])


# --- results ----------------------------------------------------------------------------------------------------------


def _result(found: Found, name: str, trace: Trace, figures: dict[str, str]) -> str:
    about = trace.text(found.about, found.about_at) if found.about_at else found.about
    parts = [f"### {trace.text(found.heading, At(found.files[0]))}", about]
    for table in found.tables:
        parts.append(_measured(table, trace))
        if found.picture is None and 0 < len(table.rows) * len(table.drawn) <= MOST_BARS:
            place = _place(figures, name, f"{found.key}-{table.key}", bar_chart(table.content(table.drawn)))
            parts.append(f"![{trace.text(table.title, table.at / 'title')}]({place})")
    if found.picture is not None:
        place = _place(figures, name, found.key, read_text(found.picture))
        parts.append(f"![{trace.text(found.heading, At(found.files[0]))}]({place})")
    if found.histograms:
        rows = [
            [histogram_chart(": ".join(part for part in (row, column) if part), one) for column, one in cells.items()]
            for row, cells in found.histograms.items()
        ]
        place = _place(figures, name, f"{found.key}-separability", side_by_side(rows))
        parts.append(f"![Cosines of positives, upward, and of random negatives, downward]({place})")
    parts.append(_where(found, trace))
    return "\n\n".join(part for part in parts if part)


def _place(figures: dict[str, str], name: str, key: str, svg: str) -> str:
    """Where a picture of the card lies; two of one name, as of two folders of results, do not meet."""
    place = f"figures/{slug(name)}/{slug(key)}"
    while f"{place}.svg" in figures:
        place += "-again"
    figures[f"{place}.svg"] = svg
    return f"{place}.svg"


def _measured(table: Table, trace: Trace) -> str:
    def cell(row: str, column: str, values: Sequence[float], digits: int) -> str:
        return trace.spread(table.rows[row][column].at, digits=digits)

    def named(name: str) -> str:
        return trace.text(name, *table.names.get(name, (table.at,)))

    title = f"**{trace.text(table.title, table.at / 'title')}**"
    notes = "\n".join(f"- {trace.text(note, table.at / 'notes' / n)}" for n, note in enumerate(table.notes))
    return "\n\n".join([title, markdown_table(table.content(), cell=cell, name=named), *([notes] if notes else [])])


def _where(found: Found, trace: Trace) -> str:
    """The command, and machine, day and versions of a report."""
    said = [f"`{' '.join(found.command.split())}`"] if found.command else []
    machine, at = found.where.get("machine", {}), At(found.files[0])
    if machine:
        words = {"cpu": "{}", "cores": "{} cores", "threads": "{} threads", "memory_gib": "{} GiB"}
        told = [words[key].format(trace.text(machine[key], at / "machine" / key)) for key in words if key in machine]
        said.append(f"on {', '.join(told)}, {trace.text(found.where['date'], at / 'date')}")
    versions = ", ".join(f"`{name} {version}`" for name, version in found.where.get("versions", {}).items())
    return "; ".join([*said, *([versions] if versions else [])])


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(
    name: str,
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
    about: Mapping[str, Any],
    found: Sequence[Found],
    trace: Trace,
) -> tuple[ModelCardData, list[Entry]]:
    """The block that the Hub reads, and where each value of its model-index stands."""
    entries, values = [], []
    for metric in (metric for one in found for metric in one.metrics):
        entry: Entry = {"file": metric.at.file, "paths": [list(metric.at.path)], "how": "mean", "digits": 4}
        entry["shown"] = shown(trace.content(metric.at.file), entry)
        entries.append(entry)
        values.append(
            EvalResult(
                task_type=metric.task_type,
                dataset_type=re.sub(r"\W+", "-", metric.dataset.lower()).strip("-"),
                dataset_name=metric.dataset,
                dataset_config=metric.subset,
                metric_type=metric.name,
                metric_value=float(entry["shown"].replace(",", "")),
            )
        )
    known = [facts["towers"].get(tower, {}).get("hub", tower) for tower in checkpoint.tower_names().values()]
    data = ModelCardData(
        language=about.get("languages"),
        license=about.get("licence"),
        library_name="sentence-transformers",
        tags=wording.tags(checkpoint.config),
        pipeline_tag=wording.pipeline(checkpoint.config),
        base_model=known or None,
        model_name=name,
        eval_results=values or None,
    )
    return data, entries
