"""`sail index`: embeddings of any number to a folder that `load_index` opens; never uploaded.

Unusual: what the index reaches is measured while it is built, against exact search, and its settings are raised until
the asked recall is reached. Memory holds a block of vectors, a sample to train on, and the codes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .checked_files import describe_files
from .embedding_files import EmbeddingFiles, open_embeddings
from .index import (
    FIRST,
    FORMAT,
    ID_ENDS,
    IDS,
    MANIFEST,
    VECTORS,
    VERSION,
    FirstPass,
    Index,
    load_index,
    map_items,
    unit,
)
from .index_recall import (
    BLOCK,
    FACTOR,
    FAR,
    NEAR,
    Held,
    blocks,
    effort_of,
    exact_search,
    held_items,
    inverted_lists,
    milliseconds,
    raise_effort,
)
from .whole_folder import refuse_other_things, whole_folder

KINDS = ("flat", "ivf", "ivf-pq", "opq", "hnsw")
PRECISIONS = ("float32", "int8", "binary")
FLAT_UP_TO, IVF_UP_TO = 50_000, 1_000_000  # items; exact search of 50,000 takes a few ms, full codes of 1M 0.5 GB
SHORTEST = 128  # the shortest first pass that is tried, a usual Matryoshka length
TRAIN_ROWS = (65_536, 1_000_000)  # at least (where there are as many), and at most
LAST_SEED = 2**31 - 2  # FAISS keeps seeds in 32 bits with a sign, and the next one is used too
CODE_ROWS = 40 * 256  # to train product codes, of 256 centroids each


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    Attributes:
        kind: one of `KINDS`.
        precision: of the first pass, one of `PRECISIONS`.
        first_pass: leading dimensions that it sees.
        num_lists: of inverted lists; 0 where there are none.
    """

    kind: str
    precision: str
    first_pass: int
    num_lists: int

    @property
    def product(self) -> bool:
        """Whether the first pass has product codes."""
        return self.kind in ("ivf-pq", "opq")

    def exact(self, dim: int) -> bool:
        """Whether every full vector is compared, so that no first pass is needed."""
        return self.kind == "flat" and self.precision == "float32" and self.first_pass == dim

    def empty_index(self) -> Any:
        """The FAISS index that this plan asks for, not trained."""
        dim, lists = self.first_pass, self.num_lists
        if self.precision == "binary":
            key = {"flat": "BFlat", "ivf": f"BIVF{lists}", "hnsw": "BHNSW32"}[self.kind]
            return faiss.index_binary_factory(-(-dim // 8) * 8, key)
        codes = {"float32": "Flat", "int8": "SQ8"}[self.precision]
        part = 4 * -(-dim // 256)  # dimensions of a byte: 4, more where codes would be longer than 64 bytes
        bytes_ = -(-dim // part)
        keys = {  # np: without polysemous training, which takes minutes for a filter that is not used
            "flat": codes,
            "ivf": f"IVF{lists},{codes}",
            "hnsw": f"HNSW32_{codes}",
            "ivf-pq": f"IVF{lists},PQ{bytes_}np",
            "opq": f"OPQ{bytes_},IVF{lists},PQ{bytes_}np",
        }
        width = bytes_ * part if self.product else dim
        return faiss.index_factory(width, keys[self.kind], faiss.METRIC_INNER_PRODUCT)


def build_index(
    embeddings: Path,
    out: Path,
    *,
    kind: str = "auto",
    recall: float = 0.95,
    precision: str = "float32",
    first_pass: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Build an index folder of what `sail encode` wrote, and measure it.

    ``auto`` is flat to 50,000 items, IVF to a million (and for int8 and binary beyond), IVF with OPQ codes above.
    Without ``first_pass``, binary and exact indexes see all dimensions; others the fewest of 128, 256, 512 ... whose
    exact first pass loses no more than half of what ``recall`` allows.

    Args:
        embeddings: a Parquet file, or a folder of shards.
        out: the folder; an index that is there already is replaced once the new one is whole.
        kind: "auto" or one of `KINDS`.
        recall: recall@10 on held items that search effort is raised for.
        precision: of the codes of the first pass; "float32", "int8" or "binary".
        first_pass: leading dimensions of the first pass; D or more means all.
        seed: of the training sample, the held queries and k-means.

    Returns:
        The folder's manifest: settings, measured recall, bytes an item, milliseconds a query.

    Raises:
        ValueError: another kind or precision, a recall outside (0, 1], a seed that FAISS has no room for, as
            `open_embeddings`, ``out`` is something else, or another process writes it.
    """
    _check(kind, precision, recall, first_pass, seed)
    started = time.perf_counter()
    files = open_embeddings(embeddings)
    if out.resolve() == embeddings.resolve():
        raise ValueError(f"{out} holds the embeddings; name another folder for the index")
    with whole_folder(out) as folder:
        refuse_other_things(out, _replaceable(out), "index")
        _copy(files, folder)
        held = held_items(folder / VECTORS, files.ok, seed)
        plan = _plan(files, kind, precision, first_pass, recall, held)
        index, trained_on = Index(*map_items(folder)), 0
        if not plan.exact(files.dim):
            index, trained_on = _with_first_pass(index, plan, folder, seed)
            index = raise_effort(index, held, recall)
        manifest = _describe(index, plan, files, held, recall) | {"trained_on": trained_on, "seed": seed}
        manifest["asked"] = {"kind": kind, "recall": recall, "precision": precision, "first_pass": first_pass}
        manifest["build_seconds"] = round(time.perf_counter() - started, 2)
        _finish(folder, index, manifest)
    return manifest


def _check(kind: str, precision: str, recall: float, first_pass: int | None, seed: int) -> None:
    if kind not in ("auto", *KINDS):
        raise ValueError(f"kind={kind} is unknown; there are auto, {', '.join(KINDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is unknown; there are {', '.join(PRECISIONS)}")
    if kind in ("ivf-pq", "opq") and precision != "float32":
        raise ValueError(f"{kind} has product codes already; precision={precision} goes with flat, ivf or hnsw")
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall} must be above 0 and at most 1")
    if first_pass is not None and first_pass < 1:
        raise ValueError(f"first_pass={first_pass} must be at least 1")
    if not 0 <= seed <= LAST_SEED:
        raise ValueError(f"seed={seed} cannot be; --seed takes 0 to {LAST_SEED}")


def _replaceable(out: Path) -> tuple[str, ...]:
    """Files of an index, if there is one, be it broken."""
    manifest = out / MANIFEST
    ours = manifest.is_file() and f'"format": "{FORMAT}"' in manifest.read_text(encoding="utf-8", errors="replace")
    return (VECTORS, IDS, ID_ENDS, FIRST, MANIFEST) if ours else ()


# --- vectors and ids on disk ----------------------------------------------------------------------------------------


def _copy(files: EmbeddingFiles, folder: Path) -> None:
    """Unit vectors and ids as flat arrays that can be memory-mapped."""
    with (folder / VECTORS).open("wb") as out:  # written, not mapped: mapped pages would count as memory of ours
        _header(out, "<f4", (files.ok, files.dim))
        with tqdm(total=files.ok, desc="read", unit="item") as bar:
            for batch in files.vectors():
                out.write(unit(batch).data)
                bar.update(len(batch))
            if bar.n != files.ok:
                raise ValueError(f"{files.place} changed while it was read; wait until `sail encode` is done")
    size = sum(pc.sum(pc.binary_length(batch)).as_py() for batch in files.ids())
    with (folder / IDS).open("wb") as text, (folder / ID_ENDS).open("wb") as ends:
        _header(text, "|u1", (size,))
        _header(ends, "<i8", (files.ok + 1,))
        end = np.zeros(1, np.int64)
        ends.write(end.data)
        for batch in files.ids():
            lengths = pc.binary_length(batch).to_numpy()
            text.write("".join(batch.to_pylist()).encode())
            here = end[-1] + np.cumsum(lengths, dtype=np.int64)
            ends.write(here.data)
            end = here


def _header(file: BinaryIO, kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})


def _finish(folder: Path, index: Index, manifest: dict[str, Any]) -> None:
    """Write the first pass and the manifest."""
    if index.first is not None:
        write = faiss.write_index_binary if index.first.binary else faiss.write_index
        write(index.first.index, str(folder / FIRST))
    manifest["first"] = index.first and {"binary": index.first.binary, "dim": index.first.dim}
    manifest["files"] = describe_files(folder)
    sizes = {name: about["bytes"] for name, about in manifest["files"].items()}
    sizes = {"searched": sizes[FIRST if index.first else VECTORS], "disk": sum(sizes.values())}
    manifest["bytes_per_item"] = {name: round(size / len(index), 1) for name, size in sizes.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    load_index(folder)  # what cannot be opened does not replace what can


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(files: EmbeddingFiles, kind: str, precision: str, first_pass: int | None, recall: float, held: Held) -> Plan:
    if kind == "auto":
        large = "ivf" if files.ok <= IVF_UP_TO or precision != "float32" else "opq"
        kind = "flat" if files.ok <= FLAT_UP_TO else large
    if first_pass is None:
        whole = precision == "binary" or (kind == "flat" and precision == "float32")
        first_pass = files.dim if whole else _fewest_dims(files.dim, held, recall)
    # 4 sqrt(N) lists, as FAISS's guidelines have it, and 39 items or more to train each.
    num_lists = max(1, min(round(4 * files.ok**0.5), files.ok // 39)) if kind in ("ivf", "ivf-pq", "opq") else 0
    return Plan(kind, precision, min(first_pass, files.dim), num_lists)


def _fewest_dims(dim: int, held: Held, recall: float) -> int:
    """The shortest of 128, 256 ... whose exact first pass keeps the nearest 10 among its candidates; else D."""
    depth, length = min(NEAR, held.nearest.shape[1]), SHORTEST
    while length < dim and depth:
        count = min(depth * FACTOR + 1, len(np.load(held.path, mmap_mode="r")))
        found, _ = exact_search(held.path, held.queries, count, length)
        kept = (found[:, :, None] == held.nearest[:, None, :depth]).any(axis=1).mean()
        if kept >= (1 + recall) / 2:
            return length
        length *= 2
    return dim


# --- the first pass -------------------------------------------------------------------------------------------------


def _with_first_pass(exact: Index, plan: Plan, folder: Path, seed: int) -> tuple[Index, int]:
    """The index with a trained and filled first pass; and how many items it was trained on."""
    first = FirstPass(plan.empty_index(), plan.first_pass)
    rows = 0 if first.index.is_trained else _train(first, plan, folder / VECTORS, len(exact), seed)
    threads = faiss.omp_get_max_threads()
    if plan.kind == "hnsw":
        faiss.omp_set_num_threads(1)  # with more, links depend on which thread came first
    try:
        for _, block in tqdm(blocks(folder / VECTORS), total=-(-len(exact) // BLOCK), desc=f"add to {plan.kind}"):
            first.index.add(first.view(block))
    finally:
        faiss.omp_set_num_threads(threads)
    return replace(exact, first=first, factor=1 if plan.precision == "float32" else FACTOR // 2), rows


def _train(first: FirstPass, plan: Plan, path: Path, items: int, seed: int) -> int:
    wanted = min(items, max(TRAIN_ROWS[0], min(64 * plan.num_lists, TRAIN_ROWS[1])))
    rows = np.sort(np.random.default_rng(seed + 1).choice(items, wanted, replace=False))
    parts = []
    for start, block in blocks(path):
        low, high = np.searchsorted(rows, [start, start + len(block)])
        parts.append(first.view(block[rows[low:high] - start]))
    sample = np.concatenate(parts)
    if plan.product:  # 256 centroids a byte need as many rows, also of a few items
        sample = np.resize(sample, (max(len(sample), CODE_ROWS), sample.shape[1]))
    _set_training(first, plan, seed)
    first.index.train(sample)
    return wanted


def _set_training(first: FirstPass, plan: Plan, seed: int) -> None:
    """Seeds; and fewer rows and rounds for product codes than FAISS's own, which take minutes."""
    lists = inverted_lists(first)
    if lists is not None:
        lists.cp.seed = seed + 1
    if plan.product:
        training: Any = lists.pq.cp  # type: ignore[union-attr]
        training.seed, training.niter, training.max_points_per_centroid = seed + 1, 12, CODE_ROWS // 256
    if plan.kind == "opq":
        rotation: Any = faiss.downcast_VectorTransform(first.index.chain.at(0))
        rotation.niter, rotation.niter_pq, rotation.niter_pq_0, rotation.max_train_points = 10, 2, 12, CODE_ROWS


def _describe(index: Index, plan: Plan, files: EmbeddingFiles, held: Held, asked: float) -> dict[str, Any]:
    """What the manifest says of an index: what it is, what it reaches, what it costs."""
    at_10, at_100 = held.recall(index, NEAR), held.recall(index, FAR)
    knob = effort_of(index.first) if index.first else None
    parameters: dict[str, Any] = {"factor": index.factor, "num_lists": plan.num_lists}
    if knob is not None:
        parameters[knob[1]] = getattr(*knob[:2])
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": files.model,
        "items": files.ok,
        "left_out": files.errors,
        "dim": files.dim,
        "kind": plan.kind,
        "precision": plan.precision,
        "first_pass": plan.first_pass,
        "parameters": parameters,
        "recall": {"at_10": at_10, "at_100": at_100, "queries": len(held.queries)},
        "recall_reached": at_10 is None or at_10 >= asked,
        "ms_per_query": milliseconds(index, held.queries[:50]),
    }


def summary(manifest: dict[str, Any]) -> str:
    """A manifest in one line."""
    recall, size = manifest["recall"], manifest["bytes_per_item"]
    numbers = ",".join(f" @{depth} {recall[f'at_{depth}']:.3f}" for depth in (NEAR, FAR) if recall["at_10"] is not None)
    asked = manifest["asked"]["recall"]
    reached = "" if manifest["recall_reached"] else f" (asked {asked}: NOT reached)"
    parameters = ", ".join(f"{name} {value}" for name, value in manifest["parameters"].items())
    return (
        f"{manifest['items']} items ({manifest['left_out']} left out), {manifest['kind']} {manifest['precision']} on "
        f"{manifest['first_pass']} of {manifest['dim']} dims, {parameters}; recall{numbers or ' not measurable'}"
        f"{reached}; {size['searched']} bytes an item searched, {size['disk']} on disk; "
        f"{manifest['ms_per_query']} ms a query"
    )
