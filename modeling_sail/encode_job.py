"""`sail encode`: items of any number to Parquet files of embeddings; never uploaded.

Unusual: the job may be killed at any moment and be run again; what was done is not done again, and the files come out
byte for byte as without the kill. A bad item is a row with its reason, never the end of the job. What is in memory is a
few windows of items, whatever the source.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor, BatchFeature

from .encode_files import table_of
from .encode_output import FORMAT, Job, Output, WindowFiles, shard_name
from .encode_source import Shard, Source, open_source, stretches
from .encode_window import Cost, Prepared, Window, cut_windows
from .encode_workers import ITEM_SECONDS, PreparerSettings, Workers, default_workers
from .fingerprints import model_hash
from .items_sail import ItemStatus
from .kernels_sail import PACKED, small_caches
from .processing_sail import SailEmbeddingProcessor
from .sentence_transformer_sail import SailSentenceTransformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_SIZE = 16_384
WINDOW = 256  # items at most: what a kill can cost, and within which items are sorted by length
WINDOW_BYTES = 1 << 27  # of raw items and the tensors made of them, at most: of these a few windows are in memory
IN_MEMORY = 64  # items of a window of `encode_items`
MOST_SECONDS = 1_000_000  # eleven days; the system's own clock of waiting ends not much later
MOST_THREADS = 1024  # more than machines have cores; with a few thousand torch may end the process


@dataclass(frozen=True)
class Options:
    """How to encode.

    Attributes:
        task: family of the instruction, None for no instruction.
        side: "query" or "target".
        dim: leading dimensions to keep, normalised again; all by default.
        dtype: "float32" or "bfloat16", of the model; the vectors are float32.
        packed: lay the rows of a pass end to end, without padding, on CUDA as well (packing_sail.py).
        token_budget: padded tokens of one pass of the model; what suits the device by default.
        shard_size: items of one file.
        device: as torch names it; by default "cuda" where there is one, else "cpu".
        workers: processes that decode (0: none but this one); with Ray, actors. By default by the number of cores.
        item_seconds: an item that takes longer to decode becomes a row with that reason; not with 0 workers.
        threads: of torch in each process that holds the model, which decide the last bits; by default as torch has them
            here, with Ray 1.
    """

    task: str | None = "q2i"
    side: str = "target"
    dim: int | None = None
    dtype: str = "float32"
    packed: bool = False
    token_budget: int | None = None
    shard_size: int = SHARD_SIZE
    device: str | None = None
    workers: int | None = None
    item_seconds: float = ITEM_SECONDS
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}.")
        for name, least in (("dim", 1), ("token_budget", 1), ("shard_size", 1), ("workers", 0), ("threads", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= least) and (value is not None or name == "shard_size"):
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"threads={self.threads} must be at most {MOST_THREADS}.")
        if not isinstance(self.item_seconds, (int, float)) or not 0 < self.item_seconds <= MOST_SECONDS:
            raise ValueError(f"item_seconds={self.item_seconds!r} must be a number above 0, at most {MOST_SECONDS}.")

    @property
    def place(self) -> str:
        """The device, where none was named."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def budget(self) -> int:
        """The token budget, where none was named."""
        return self.token_budget or SailEmbeddingProcessor.default_token_budget(self.place)


@dataclass(frozen=True)
class Plan:
    """A job and its items: what engines are given.

    Attributes:
        model: the model's folder.
        source: the items.
        options: how to encode them.
        job: what decides the result besides the items.
        cost: bytes that an item holds.
        shards: all of them, in order.
    """

    model: Path
    source: Source
    options: Options
    job: Job
    cost: Cost
    shards: Sequence[Shard]

    def windows(self, shards: Sequence[Shard]) -> Iterator[Window]:
        """The windows of some of the shards: the same wherever and however often they are cut."""
        for shard, items in stretches(self.source, shards):
            yield from cut_windows(items, self.cost, self.job["settings"]["window"], shard.index)


Engine = Callable[[Plan, Output, Sequence[Shard], Any], Iterator[dict[str, Any]]]


def encode(model: Path, source: Path, out: Output, options: Options, engine: Engine) -> dict[str, Any]:
    """Embed every item of a source. Run again, it goes on where it was stopped, or says that nothing is left to do.

    Args:
        model: the model's folder.
        source: what `open_source` takes.
        out: where to.
        options: how.
        engine: `encode_here`, or Ray's.

    Returns:
        Counts "ok" and "error", "new" (items that were encoded now) and "seconds" it took.

    Raises:
        ValueError: nothing to encode, a bad option, or the result of another job, model or items in the way.
        OSError: a full disk, or no right to write; what is done stays.
    """
    items = open_source(source, (out.out, out.folder))
    job, cost = _described(model, options)
    done = out.finished(job)
    if done and out.whole(done):
        shards = items.shards(options.shard_size)
        out.refuse_other_items(done, {**items.identity()[0], "items": shards[-1].first + shards[-1].items})
        _refuse_changed(Plan(model, items, options, job, cost, shards), dict(enumerate(done["shards"])))
        out.clear()
        return {"ok": done["ok"], "error": done["error"], "new": 0, "seconds": 0.0}
    with out.locked():
        shards, identity, known = out.plan(items, options.shard_size)
        out.claim(job, identity)
        there = ((shard.index, out.shard_done(shard, len(shards), job)) for shard in shards)
        done_shards = {index: said for index, said in there if said}
        plan = Plan(model, items, options, job, cost, shards)
        if not known:
            _refuse_changed(plan, done_shards)
            out.keep_plan(items, options.shard_size, shards)
        return _run(plan, out, done_shards, identity, engine)


def _run(
    plan: Plan, out: Output, done: dict[int, dict[str, Any]], identity: dict[str, Any], engine: Engine
) -> dict[str, Any]:
    begun, before = time.perf_counter(), sum(said["items"] for said in done.values())
    bar = tqdm(total=identity["items"], initial=before, unit="item", desc="encode", smoothing=0.05)
    missing = [shard for shard in plan.shards if shard.index not in done]
    with bar:
        for said in engine(plan, out, missing, bar):
            done[said["index"]] = said
        new = bar.n - bar.initial
    shards = [{**done[shard.index], "file": shard_name(shard.index, len(plan.shards))} for shard in plan.shards]
    counts = {name: sum(shard[name] for shard in shards) for name in ("ok", "error")}
    out.finish({**plan.job, "source": identity, **counts, "shards": shards, "finished": True})
    return {**counts, "new": new, "seconds": time.perf_counter() - begun}


def _described(model: Path, options: Options) -> tuple[Job, Cost]:
    """The job, and what items cost."""
    require_folder(model)
    width = AutoConfig.from_pretrained(model).hidden_size
    if options.dim is not None and options.dim > width:
        raise ValueError(f"dim={options.dim} must not be above the model's {width}.")
    processor = AutoProcessor.from_pretrained(model)
    settings = {
        "instruction": processor.instruction_for(options.task, options.side),
        "dim": options.dim or width,
        "dtype": options.dtype,
        "packed": options.packed,
        "token_budget": options.budget,
        "shard_size": options.shard_size,
        "device": torch.device(options.place).type,
        "threads": options.threads or torch.get_num_threads(),
        "window": [WINDOW, WINDOW_BYTES],
        **_versions(),
    }
    return {"format": FORMAT, "model": model_hash(model), "settings": settings}, Cost(processor)


def _versions() -> dict[str, str]:
    """Of what computes the vectors and decodes the text: with others, the last bits may come out otherwise."""
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def _refuse_changed(plan: Plan, done: dict[int, dict[str, Any]]) -> None:
    """Read the items of shards that are done once more, undecoded: names and sizes may be equal by chance."""
    digests: dict[int, list[str]] = {index: [] for index in done}
    for window in plan.windows([shard for shard in plan.shards if shard.index in done]):
        digests[window.shard].append(window.digest)
    for index, found in digests.items():
        if _joined(found) != done[index]["digest"]:
            shard = plan.shards[index]
            raise ValueError(
                f"items {shard.first} to {shard.first + shard.items - 1} of {plan.source.path} have changed since they "
                "were encoded; put them back as they were, or name another --out."
            )


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# --- the local engine -----------------------------------------------------------------------------------------------


def encode_here(plan: Plan, out: Output, missing: Sequence[Shard], bar: Any) -> Iterator[dict[str, Any]]:
    """The engine of one machine: processes decode, this one runs the model."""
    device, workers = plan.options.place, plan.options.workers
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA device here; take cpu.")
    workers = default_workers(device) if workers is None else workers
    if missing:
        with Encoder(plan, workers) as encoder:
            yield from encoder.shards(missing, out.folder, out.work, bar)


class Encoder:
    """The model and the processes that decode for it: what every engine encodes shards with.

    Args:
        plan: of which job.
        workers: processes that decode.
    """

    def __init__(self, plan: Plan, workers: int) -> None:
        self.plan = plan
        said = plan.job["settings"]
        if other := [f"{name} {here}, not {said[name]}" for name, here in _versions().items() if here != said[name]]:
            raise ValueError(f"this machine has {' and '.join(other)}, which the job began with; install the same.")
        settings = PreparerSettings(plan.model, said["instruction"], said["token_budget"])
        with ExitStack() as opened:
            opened.enter_context(small_caches())
            # Its imports and the model's weights come at the same time.
            self.pool = opened.enter_context(Workers(settings, workers, plan.options.item_seconds))
            attention = PACKED if plan.options.packed else None
            self.module = load_module(plan.model, plan.options.place, DTYPES[plan.options.dtype], attention)
            opened.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(said["threads"])  # the job's, whatever this machine or Ray would take
            self.opened = opened.pop_all()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def shards(self, shards: Sequence[Shard], folder: Path, work: Path, bar: Any = None) -> Iterator[dict[str, Any]]:
        """Write shards to a folder, their windows to another meanwhile.

        Yields:
            What is said of each shard, once its file is there.
        """
        files = WindowFiles(work, self.plan.job)
        windows = ((window, files.done(window) is None) for window in self.plan.windows(shards))
        by_index = {shard.index: shard for shard in shards}
        said: list[dict[str, Any]] = []  # of the windows of the shard at hand
        left = 0  # items of it that are to come
        for window, prepared in self.pool.prepared(windows):
            shard = by_index[window.shard]
            if window.number == 0:
                self._refuse_fewer(left)
                left = shard.items
            if prepared is not None:
                self._write(files, window, prepared)
            said.append(files.done(window) or {})
            _show(bar, said[-1], prepared is not None)
            left -= len(window.names)
            if not left:
                yield _finish_shard(files, shard, said, folder / shard_name(shard.index, len(self.plan.shards)))
                del by_index[window.shard]
                said = []
        self._refuse_fewer(left + len(by_index))

    def _refuse_fewer(self, left: int) -> None:
        if left:
            raise ValueError(f"{self.plan.source.path} has fewer items than at the start: it changed meanwhile.")

    def _write(self, files: WindowFiles, window: Window, prepared: Prepared) -> None:
        vectors = embed(self.module, prepared, self.plan.job["settings"]["dim"])
        finite = np.isfinite(vectors).all(axis=1)
        reasons = [
            reason or ("" if good else "embedding: the model's numbers are not finite")
            for reason, good in zip(prepared.reasons, finite, strict=True)
        ]
        bad = sum(map(bool, reasons))
        said = {"digest": window.digest, "items": len(reasons), "ok": len(reasons) - bad, "error": bad}
        files.write(window, table_of(window.names, vectors, reasons), said)


def _finish_shard(files: WindowFiles, shard: Shard, windows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    said = {
        "index": shard.index,
        "first": shard.first,
        "items": shard.items,
        "ok": sum(window["ok"] for window in windows),
        "error": sum(window["error"] for window in windows),
        "digest": _joined([window["digest"] for window in windows]),
    }
    files.join(said, len(windows), path)
    return said


def _show(bar: Any, said: dict[str, Any], new: bool) -> None:
    if bar is None:
        return
    if not new:
        bar.initial += said["items"]  # what was there before says nothing of the speed
    bar.errors = getattr(bar, "errors", 0) + said["error"]
    bar.set_postfix(errors=bar.errors, refresh=False)
    bar.update(said["items"])


@torch.inference_mode()
def embed(module: SailSentenceTransformer, prepared: Prepared, dim: int) -> np.ndarray:
    """(N, dim) float32 normalised vectors of a window; NaN in the row of an item that could not be read."""
    pinned = module.model.device.type == "cuda"

    def tensors(batch: dict[str, np.ndarray]) -> BatchFeature:
        made = {name: torch.from_numpy(values) for name, values in batch.items()}
        return BatchFeature({name: value.pin_memory() if pinned else value for name, value in made.items()})

    passes = ((places, tensors(batch)) for places, batch in prepared.passes)
    rows = list(range(len(prepared.reasons)))
    found = module({"passes": passes, "rows": rows, "statuses": prepared.reasons})["sentence_embedding"]
    return torch.nn.functional.normalize(found[:, :dim].float(), dim=-1).cpu().numpy()


# --- in memory ------------------------------------------------------------------------------------------------------


def encode_items(
    module: SailSentenceTransformer, items: Sequence[tuple[str, Any]], instruction: str = "", progress: str = ""
) -> tuple[np.ndarray, list[ItemStatus]]:
    """Embed (id, item) pairs in memory.

    Returns:
        (G, D) float32 vectors of the G good items in order, and a status for each item.
    """
    vectors, statuses = [], []
    for start in tqdm(range(0, len(items), IN_MEMORY), desc=progress, disable=not progress):
        chunk = [item for _, item in items[start : start + IN_MEMORY]]
        with torch.inference_mode():
            features = module.preprocess(chunk, prompt=instruction, errors="skip")
            found = module(features)["sentence_embedding"].float().cpu().numpy()
        good = [status.status == "ok" for status in features["statuses"]]
        vectors.append(found[good])
        statuses += [replace(status, index=start + status.index) for status in features["statuses"]]
    return np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32), statuses


def load_module(
    folder: Path, device: str = "cpu", dtype: torch.dtype | None = None, attention: str | None = None
) -> SailSentenceTransformer:
    """The model of a folder, ready to encode, with the installed code; ``attention`` as transformers names it.

    Raises:
        ValueError: the folder is not one that `sail build` or ``save_pretrained`` wrote.
    """
    require_folder(folder)
    asked = {"dtype": dtype, "attn_implementation": attention}
    kwargs = {name: value for name, value in asked.items() if value is not None}
    return SailSentenceTransformer.load(str(folder), model_kwargs=kwargs).to(device).eval()


def require_folder(folder: Path) -> None:
    """Refuse what is no model, before anything is begun with it.

    Raises:
        ValueError: the folder has no config.json.
    """
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds only an adapter; merge it into its base model (PEFT: merge_and_unload), save that with "
            "its processor (save_pretrained of both) in a folder of its own, and name that folder."
        )
    raise ValueError(f"{folder} holds no model; build one: sail build --preset mini --out {folder}")
