"""`sail behaviour`: behaviour tables to what a recipe trains on: sequences, ID embeddings, content pairs, a report.

    <out>/items.parquet             every item, as rows name it by its id
          <interest>.parquet        sequences and their targets, one file for each interest
          content.parquet           a part of an item's fields and the whole item: the auxiliary i2i task
          tables.parquet            ID embeddings of the teachers
          ids.parquet               items that have a row in a table
          report.json, report.html  what was dropped, what each interest keeps and why not more

Room: recommendation, the last before the Trainer. Unusual: everything that is learned sees the events before the split
alone; each file is written whole, and a run that was killed goes on with the first that is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...items_sail import FORMAT_ORDER, KNOWN_FIELDS, MEDIA_FIELDS
from ..balancing import cluster
from ..files import whole, write_json, write_text
from ..rows import item_key, named_by_path
from .behaviour import Interactions, Items, Split, split_by_time
from .evidence import Consumers, Evidence, cosine_similarity, label_clusters
from .interests import INTERESTS, Interests, Limits, mine_interests
from .tables import IDTable, load_tables, save_tables
from .teachers import TEACHERS, TeacherSettings, train_teachers
from .validation import Report, validate

logger = logging.getLogger(__name__)

# Items to their embeddings: (I, D), a row of zeros where there is none.
Embed = Callable[[Sequence[dict[str, Any]]], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What is made, and how.

    Attributes:
        share: of the events that come before the split; ``split_time`` (unix seconds) in its place.
        split_time: None takes the share.
        unseen_share: of the items, drawn at random, whose events are kept from all that is learned: what is then
            recommended of them is a cold start.
        interests: some of `INTERESTS`.
        limits: their thresholds.
        clusters: of the items' embeddings, for the interest that draws by cluster.
        teachers: some of `TEACHERS`.
        tables: files of ID embeddings of one's own; items that they know are trained on beside the teachers'.
        teacher: their settings.
        seed: of everything that is drawn.
    """

    share: float = 0.8
    split_time: float | None = None
    unseen_share: float = 0.0
    interests: tuple[str, ...] = tuple(INTERESTS)
    limits: Limits = field(default_factory=Limits)
    clusters: int = 32
    teachers: tuple[str, ...] = tuple(TEACHERS)
    tables: tuple[str, ...] = ()
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("interests", INTERESTS), ("teachers", TEACHERS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"{name}: there are no {unknown}; take some of {list(known)}.")
        if not 0 <= self.unseen_share < 1:
            raise ValueError(f"unseen_share={self.unseen_share} must be at least 0 and below 1.")
        if self.clusters < 1:
            raise ValueError(f"clusters={self.clusters} must be at least 1.")


@dataclass(frozen=True, eq=False)
class Known:
    """Validated behaviour, and what of it may be learned from.

    Attributes:
        interactions: all events.
        items: all items.
        split: of all events.
        unseen: (I,) booleans, items whose events nothing learns from.
        learned: events before the split of the other items.
        report: of the validation.
    """

    interactions: Interactions
    items: Items
    split: Split
    unseen: np.ndarray
    learned: Interactions
    report: Report


def known_behaviour(interactions: Interactions, items: Items, settings: Settings, now: float | None = None) -> Known:
    """Validate, split by time, and set items aside.

    Args:
        interactions, items: as they were read.
        settings: for the split and the items that stay unseen.
        now: as in `validation.validate`.

    Raises:
        ValueError: `validate`, `split_by_time`; nothing is left to learn from.
    """
    kept, report = validate(interactions, items, now=now)
    split = split_by_time(kept, share=settings.share, time=settings.split_time)
    unseen = np.zeros(len(items), dtype=bool)
    count = round(settings.unseen_share * len(items))
    unseen[np.random.default_rng(settings.seed).permutation(len(items))[:count]] = True
    learned = split.before.take(~unseen[split.before.item])
    if not len(learned):
        raise ValueError(f"No event is left to learn from: {count} of {len(items)} items are set aside.")
    return Known(kept, items, split, unseen, learned, report)


def prepare(
    known: Known, embed: Embed, out: Path, settings: Settings, *, embedded_by: str = "", progress: bool = True
) -> dict[str, Any]:
    """Write the folder.

    Args:
        known: from `known_behaviour`.
        embed: makes the items' embeddings, which two interests and the graph teacher look at.
        embedded_by: what tells one embedder from another, such as `survey.model_hash`.
        out: the folder; what the same job left there is kept.
        settings: as for `known_behaviour`.
        progress: show bars.

    Returns:
        The report.

    Raises:
        ValueError: the folder is another job's; an interest or a teacher refuses its evidence.
    """
    _claim(out, f"{_job(known, settings)} {embedded_by}".strip())
    _unless_there(out / "items.parquet", lambda path: write_items(known.items, path))
    _content(known.items, out / "content.parquet", settings.seed)
    embeddings = _embeddings(known.items, embed, out / "embeddings.npy")
    report = {
        "events": known.report.as_dict(),
        "split_time": known.split.time,
        "before": len(known.split.before),
        "after": len(known.split.after),
        "learned": len(known.learned),
        "unseen_items": int(known.unseen.sum()),
    }
    report["interests"] = _sequences(known, embeddings, out, settings, progress)
    report["teachers"] = _tables(known, embeddings, out, settings, progress)
    write_json(out / "report.json", report)
    write_text(out / "report.html", report_page(report))
    return report


# --- steps ----------------------------------------------------------------------------------------------------------


def evidence_of(known: Known, embeddings: np.ndarray, settings: Settings) -> Evidence:
    """What the interests look at: content from the embeddings, consumers from the events that may be learned from."""
    return Evidence(
        similarity=cosine_similarity(embeddings),
        labels=known.items.labels,
        consumers=Consumers.from_interactions(known.learned, known.split.time),
        label_clusters=label_clusters(known.items.labels),
        clusters=clusters_of(embeddings, settings.clusters, settings.seed),
    )


def clusters_of(embeddings: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(I,) the nearest of k-means centroids; items without an embedding are a cluster of their own, the last."""
    lengths = np.linalg.norm(embeddings, axis=1)
    there = lengths > 0
    centroids = cluster(embeddings[there], count, seed).centroids
    found = np.full(len(embeddings), len(centroids))
    found[there] = (embeddings[there] / lengths[there, None] @ centroids.T).argmax(1)
    return found


def _sequences(
    known: Known, embeddings: np.ndarray, out: Path, settings: Settings, progress: bool
) -> dict[str, dict[str, Any]]:
    statistics = out / "interests.json"
    if not statistics.is_file():
        found = mine_interests(
            known.learned,
            evidence_of(known, embeddings, settings),
            split_time=known.split.time,
            interests=settings.interests,
            limits=settings.limits,
            seed=settings.seed,
            progress=progress,
        )
        for name in settings.interests:
            rows = sequence_rows(found, name, known)
            if rows:
                _write_rows(rows, out / f"{name}.parquet")
            else:
                logger.warning("The interest %r keeps no sequence: %s", name, found.statistics[name]["dropped"])
        write_json(statistics, found.statistics)
    loaded: dict[str, dict[str, Any]] = json.loads(statistics.read_text(encoding="utf-8"))
    return loaded


def sequence_rows(found: Interests, name: str, known: Known) -> list[dict[str, Any]]:
    """Records of an interest's pairs, as `rows.as_row` takes them with the table of items."""
    ids, users = known.items.ids, known.learned.user_ids
    return [
        {
            "id": f"{name}/{users[pair.user]}/{number}",
            "sequence": [ids[item] for item in pair.sequence],
            "target": ids[pair.target],
        }
        for number, pair in enumerate(found.pairs[name])
    ]


def _tables(
    known: Known, embeddings: np.ndarray, out: Path, settings: Settings, progress: bool
) -> dict[str, dict[str, Any]]:
    path, said = out / "tables.parquet", out / "teachers.json"
    if not said.is_file():
        begun = time.perf_counter()
        options = {"settings": settings.teacher, "features": embeddings, "seed": settings.seed, "progress": progress}
        tables: dict[str, IDTable] = {}
        if settings.teachers:
            tables = train_teachers(known.learned, settings.teachers, split_time=known.split.time, **options)
            save_tables(tables.values(), path)
        own = load_tables(settings.tables) if settings.tables else {}
        taught = {name for table in (*tables.values(), *own.values()) for name in table.ids}
        rows = [name for name in known.items.ids if name in taught]
        if rows:
            _write_rows([{"id": name, "item": name} for name in rows], out / "ids.parquet")
        seconds = round(time.perf_counter() - begun, 1)
        numbers = {name: {"items": len(table), "dims": table.dim} for name, table in (tables | own).items()}
        write_json(said, {"seconds": seconds, "tables": numbers})
    loaded: dict[str, dict[str, Any]] = json.loads(said.read_text(encoding="utf-8"))
    return loaded


def tables_of(out: Path) -> dict[str, IDTable]:
    """The teachers' tables in a folder; none where it was made without."""
    path = out / "tables.parquet"
    return load_tables([path]) if path.is_file() else {}


def _embeddings(items: Items, embed: Embed, path: Path) -> np.ndarray:
    if not path.is_file():
        vectors = np.asarray(embed(items.records), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(items) or not np.isfinite(vectors).all() or not vectors.any():
            raise ValueError(
                f"Embeddings of shape {vectors.shape} came for {len(items)} items; (I, D) are needed, all finite, not "
                "all zero."
            )
        with whole(path) as partial, partial.open("wb") as file:
            np.save(file, vectors)
    return np.load(path, allow_pickle=False)


# --- content --------------------------------------------------------------------------------------------------------


def _content(items: Items, path: Path, seed: int) -> None:
    rows = content_rows(items, seed)
    if rows and not path.is_file():
        _write_rows(rows, path)
    elif not rows:
        logger.warning("No item has two fields: there is no auxiliary task, and no %s.", path.name)


def content_rows(items: Items, seed: int = 0) -> list[dict[str, Any]]:
    """The auxiliary i2i task (section 3.3.5): a random part of an item's fields is the query, the whole its target.

    It needs no labels and no behaviour, and keeps each field's word in the embedding. Items of one field are left out.

    Args:
        items: all.
        seed: of the parts; those of an item do not depend on the others.

    Returns:
        Records for `rows.as_row`, items as JSON.
    """
    rows = []
    seen = set()
    for name, record in zip(items.ids, items.records, strict=True):
        content = item_key({key: value for key, value in record.items() if key != "id"})
        if content in seen:  # its twin would be its negative
            continue
        seen.add(content)
        fields = [key for key in (*FORMAT_ORDER, *MEDIA_FIELDS) if key in record]
        if len(fields) < 2:
            continue
        generator = random.Random(f"{seed}:{name}")
        part = generator.sample(fields, generator.randint(1, len(fields) - 1))
        query = {key: record[key] for key in fields if key in part}
        # Two items may be alike in the part: what they share an id by is the whole.
        said = {"query": _json(query, name), "target": _json(record, name)}
        rows.append({"id": f"content/{name}", **said, "target_id": name})
    return rows


def _json(item: dict[str, Any], name: str) -> str:
    return json.dumps(named_by_path(item, f"item {name!r}"), ensure_ascii=False)


# --- files ----------------------------------------------------------------------------------------------------------


def write_items(items: Items, path: Path) -> None:
    """The items as `load_items` reads them; media by the places where they are now."""
    named = [name for name in KNOWN_FIELDS if any(name in record for record in items.records)]
    records = []
    for record, labels, released in zip(items.records, items.labels, items.released.tolist(), strict=True):
        known = named_by_path(record, f"item {record['id']!r}")
        fields = {name: known.get(name) for name in named}
        records.append({**fields, "labels": sorted(labels), "released": released if released == released else None})
    table = pa.Table.from_pylist(records)
    pq.write_table(table, path)


def _write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with whole(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(rows)), partial)


def _unless_there(path: Path, write: Callable[[Path], None]) -> None:
    if not path.is_file():
        with whole(path) as partial:
            write(partial)


def _job(known: Known, settings: Settings) -> str:
    """A hash of all that decides what is written, but for what embeds."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for column in (known.learned.user, known.learned.item, known.learned.time, known.learned.behaviours):
        digest.update(np.ascontiguousarray(column).tobytes())
    items = known.items
    digest.update(json.dumps([*known.learned.user_ids, known.split.time, *map(sorted, items.labels)]).encode())
    digest.update(items.released.tobytes())
    for name, record in zip(items.ids, items.records, strict=True):
        content = {key: value for key, value in record.items() if key != "id"}
        digest.update(f"{name} {item_key(content)}".encode())
    return digest.hexdigest()


def _claim(out: Path, job: str) -> None:
    """Begin a job in a folder, or find it begun.

    Raises:
        ValueError: by another job, or by somebody else.
    """
    place = out / "job.json"
    known = json.loads(place.read_text(encoding="utf-8"))["job"] if place.is_file() else None
    if known is None:
        foreign = [name for name in ("items.parquet", "content.parquet", "tables.parquet") if (out / name).exists()]
        if foreign:
            raise ValueError(f"{out} holds {foreign}, which this command would write; name a folder of its own.")
        write_json(place, {"job": job})
    elif known != job:
        raise ValueError(
            f"{out} was made from other events, items or settings, or by another model; remove it, or name another "
            "folder."
        )


# --- report ---------------------------------------------------------------------------------------------------------


def report_page(report: dict[str, Any]) -> str:
    """What was dropped, and what each interest keeps, for people who would rather look."""
    from ..pages import bars, page, table  # brings pictures, which nothing else here needs

    events = report["events"]
    parts = [
        "<h2>Events</h2>",
        table({name: report[name] for name in ("before", "after", "learned", "unseen_items")}),
        bars({"kept": events["kept"], **{name: count for name, count in events["dropped"].items() if count}}),
        "<h2>Interests</h2>",
    ]
    for name, numbers in report["interests"].items():
        length = f"{numbers['mean_length']:.1f} items in the mean, {numbers['full']} sequences are full"
        parts += [f"<h3>{name}</h3><p>{length}</p>", bars({"kept": numbers["kept"], **numbers["dropped"]})]
    taught = {name: f"{one['items']} items, {one['dims']} dims" for name, one in report["teachers"]["tables"].items()}
    return page("Behaviour", *parts, "<h2>Teachers</h2>", table(taught))
