"""What a model's answers rest on: items with modalities removed, short and coarse vectors, and what each costs.

    python -m modeling_sail.evaluation.robustness --model build/mini --out evaluation/results/robustness.json

Room: Embeddings -> **Evaluation**. Items are held-out names of Tux Paint with a picture, speech in one language and a
title in another; the English name is on the other side. Unusual: what is slow or large is timed with vectors and items
of its own, in a process of its own, and stands beside the recall of the real ones.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sentence_transformers.util import quantize_embeddings

from ..training.build import load_built
from .benchmarks.child import run_child
from .feature_encoder import Data, cached_collator, kept, model_encoder
from .reports import markdown_table, model_entry, table, write_report
from .similarity import retrieval_scores
from .tasks.held_out import Row, tuxpaint
from .tasks.names import item_to_name, name_to_item
from .tasks.task import Encode, Item, Retrieval, score, unit

SPOKEN, WRITTEN = "fr", "es"  # the languages of an item's speech and title; its name on the other side is English
PARTS = ("vision", "audio", "text")
SUBSETS = [part for size in (1, 2, 3) for part in itertools.combinations(PARTS, size)]
PRECISIONS = ("float32", "int8", "binary")
CORPUS = 100_000  # vectors that a query is timed among
COST_ITEMS = 48
KS = (1, 10, 50)


# --- items ------------------------------------------------------------------------------------------------------------


def held_out_rows() -> list[Row]:
    """Stamps that have all three modalities."""
    return [row for row in tuxpaint() if SPOKEN in row["speech"] and WRITTEN in row["names"]]


def items_of(rows: Sequence[Row]) -> dict[str, Item]:
    """Items by id, whose title is not in the language that asks for them."""
    return {
        row["id"]: {"image": row["image"], "audio": row["speech"][SPOKEN], "title": row["names"][WRITTEN]}
        for row in rows
    }


def both_ways(rows: Sequence[Row]) -> tuple[Retrieval, Retrieval]:
    """English names look for items, and items for their English name; of a name there may be several items."""
    items = items_of(rows)
    there, back = name_to_item(rows, ("en",)), item_to_name(rows, ("en",))
    return replace(there, corpus=items), replace(back, queries=items)


def reduced(data: Retrieval, side: str, parts: Sequence[str]) -> Retrieval:
    """The same with only some modalities left of the items on one side."""
    if side == "query":
        queries = {name: kept(item, parts) for name, item in data.queries.items()}
        return Retrieval(queries, data.corpus, data.relevant, data.excluded)
    corpus = {name: kept(item, parts) for name, item in data.corpus.items()}
    return Retrieval(data.queries, corpus, data.relevant, data.excluded)


# --- modalities removed -----------------------------------------------------------------------------------------------


def by_subset(data: Retrieval, side: str, encode: Encode) -> dict[str, dict[str, list[float]]]:
    """Recall with every subset of the modalities left on a side; rows of a table."""
    rows = {}
    for parts in SUBSETS:
        found = score(reduced(data, side, parts), encode)
        rows[" + ".join(parts)] = {f"Recall@{k}": [found[f"recall_at_{k}"]] for k in KS}
    return rows


def answered_by(data: Retrieval, encode: Encode, k: int = 10) -> dict[str, dict[str, list[float]]]:
    """Of queries with a right answer in the top k: which single modality of it is nearest to the query.

    Returns:
        Rows by modality: its share of those answers, and the share of answers that are found with it alone, too.
    """
    queries = unit(encode(list(data.queries.values()), "query"))
    vectors = {parts: unit(encode(list(reduced(data, "target", parts).corpus.values()), "target")) for parts in SUBSETS}
    place = {name: row for row, name in enumerate(data.corpus)}
    answers = []
    for row, name in enumerate(data.queries):
        best = max((place[one] for one in data.relevant[name]), key=lambda one: vectors[PARTS][one] @ queries[row])
        if _rank(vectors[PARTS], queries[row], best) < k:
            answers.append((row, best))
    if not answers:
        return {}
    cosine = np.array([[vectors[part,][one] @ queries[row] for part in PARTS] for row, one in answers])
    alone = np.array([[_rank(vectors[part,], queries[row], one) < k for part in PARTS] for row, one in answers])
    return {
        part: {
            "nearest to the query": [float((cosine.argmax(axis=1) == column).mean())],
            "found with it alone": [float(alone[:, column].mean())],
        }
        for column, part in enumerate(PARTS)
    }


def _rank(corpus: np.ndarray, query: np.ndarray, place: int) -> int:
    """Candidates that are as near as that one, or nearer."""
    scores = corpus @ query
    return int((scores >= scores[place]).sum()) - 1


# --- short and coarse vectors -----------------------------------------------------------------------------------------


def coarse(vectors: np.ndarray, dim: int, precision: str, calibration: np.ndarray) -> np.ndarray:
    """(N, D) vectors cut to ``dim``, normalised again, at a precision, as float32 that an inner product compares.

    Args:
        vectors: of any length.
        dim: Matryoshka length.
        precision: "float32"; "int8", each dimension in 255 steps between the calibration's extremes; "binary", signs.
        calibration: (M, D), of the corpus.
    """
    short = unit(vectors[:, :dim])
    if precision == "float32":
        return short
    if precision == "binary":
        return np.where(short > 0, 1.0, -1.0).astype(np.float32)
    ranges = np.stack([unit(calibration[:, :dim]).min(axis=0), unit(calibration[:, :dim]).max(axis=0)])
    steps = np.asarray(quantize_embeddings(short, precision="int8", ranges=ranges), dtype=np.float32)
    return ranges[0] + (steps + 128) * (ranges[1] - ranges[0]) / 255


def bytes_per_item(dim: int, precision: str) -> float:
    """Bytes of one vector."""
    return dim * {"float32": 4.0, "int8": 1.0, "binary": 0.125}[precision]


def query_seconds(dim: int, precision: str, rounds: int = 5, queries: int = 20) -> float:
    """Median seconds of one exact query among `CORPUS` random vectors, by FAISS, one query at a time."""
    generator = np.random.default_rng(0)
    vectors = unit(generator.standard_normal((CORPUS, dim), dtype=np.float32))
    asked: Any = vectors[:queries]
    index: Any
    if precision == "binary":
        index, vectors = faiss.IndexBinaryFlat(dim), np.packbits(vectors > 0, axis=1)
        asked = vectors[:queries]
    elif precision == "int8":
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[:10_000])
    else:
        index = faiss.IndexFlatIP(dim)
    index.add(vectors)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for row in range(queries):
            index.search(asked[row : row + 1], 10)
        seconds.append((time.perf_counter() - begun) / queries)
    return statistics.median(seconds)


def by_precision(data: Retrieval, encode: Encode, dims: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Recall, bytes an item and milliseconds a query for each Matryoshka length and precision; rows of a table."""
    queries, targets = encode(list(data.queries.values()), "query"), encode(list(data.corpus.values()), "target")
    place = {name: row for row, name in enumerate(data.corpus)}
    relevant = [np.array(sorted(place[one] for one in data.relevant[name])) for name in data.queries]
    nothing = [np.array([], dtype=np.int64)] * len(queries)
    rows = {}
    for dim, precision in itertools.product(sorted(dims, reverse=True), PRECISIONS):
        pair = (coarse(part, dim, precision, targets) for part in (queries, targets))
        found = retrieval_scores(*pair, relevant, nothing, ks=KS)
        rows[f"{dim} {precision}"] = {
            **{f"Recall@{k}": [found[f"recall_at_{k}"]] for k in KS},
            "bytes an item": [bytes_per_item(dim, precision)],
            "ms a query": [1000 * query_seconds(dim, precision)],
        }
    return rows


# --- what a representation costs --------------------------------------------------------------------------------------


def encode_items(module: Any, items: Sequence[Item], parts: Sequence[str]) -> Callable[[], Any]:
    """Encoding items from their files, with some of their modalities: what `measured` times."""
    chosen = [kept(item, parts) for item in items]
    instruction = module.processor.instruction_for("q2i", "target")

    def work() -> None:
        module(module.preprocess(chosen, prompt=instruction))

    return work


def cost_of(model: Path, parts: Sequence[str]) -> dict[str, float]:
    """Milliseconds an item and MiB above the loaded model, in a process of its own."""
    found = run_child("modeling_sail.evaluation.robustness_cost", {"model": str(model), "parts": list(parts)})
    seconds = statistics.median(found["seconds"])
    return {"ms an item": 1000 * seconds / found["items"], "peak MiB": found["extra_bytes"] / (1 << 20)}


def by_cost(model: Path, recalls: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Recall beside latency and memory: frames only, text only, sound only, all."""
    rows = {}
    for name, parts in (*((f"{part} only", (part,)) for part in PARTS), ("all", PARTS)):
        cost = {key: [value] for key, value in cost_of(model, parts).items()}
        rows[name] = {**recalls[" + ".join(parts)], **cost}
    return rows


# --- the run ----------------------------------------------------------------------------------------------------------


def robustness_tables(model: Path, work: Path) -> dict[str, Any]:
    """All tables of the report.

    Raises:
        ValueError: the model lacks a modality.
    """
    built = load_built(model)
    if lacks := sorted(set(PARTS) - {"text", *built[1].modalities}):
        raise ValueError(f"{model} reads no {' and no '.join(lacks)}; this report takes items of all modalities apart.")
    towards, back = both_ways(held_out_rows())
    data: Data = {"robustness": {"name -> item": towards, "item -> name": back}}
    collate = cached_collator(*built, work, data)
    q2i, i2n = (model_encoder(built[0], collate, family=family) for family in ("q2i", "cls"))
    targets = by_subset(towards, "target", q2i)
    sizes = [
        f"{len(towards.queries)} names, {len(towards.corpus)} items with picture, speech ({SPOKEN}), title ({WRITTEN})."
    ]
    made = {
        "target_subsets": ("English name -> item with some modalities left", "Recall", targets),
        "query_subsets": ("item with some modalities left -> English name", "Recall", by_subset(back, "query", i2n)),
        "answered_by": ("Which modality a right answer in the top 10 came from", "share", answered_by(towards, q2i)),
        "dims_precision": (
            f"Length and precision of vectors; time of one exact query among {CORPUS} vectors",
            "Recall, bytes, ms",
            by_precision(towards, q2i, built[0].config.matryoshka_dims),
        ),
        "cost": ("What each representation costs and brings", "Recall, ms, MiB", by_cost(model, targets)),
    }
    return {key: table(title, unit_, rows, seeds=[0], notes=sizes) for key, (title, unit_, rows) in made.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/mini"))
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="feature cache")
    parser.add_argument("--out", type=Path, help="JSON of the report")
    args = parser.parse_args(arguments)
    made = robustness_tables(args.model, args.work)
    for one in made.values():
        print(f"\n{one['title']}\n\n{markdown_table(one)}")
    if args.out is not None:
        about = "Items with modalities removed, short and coarse vectors, and what each representation costs."
        command = f"python -m modeling_sail.evaluation.robustness --model {args.model}"
        write_report(args.out, about, command, made, model_entry(args.model))


if __name__ == "__main__":
    main()
