"""`sail encode --engine ray`: the same job on Ray Data, each shard by an actor that holds the model.

Unusual: a shard is made by the code of the local engine and is its bytes, so a shard that is made twice (its actor was
killed, or its node was thought dead) replaces itself; a shard that is there is not sent out again. The source, the
model and, where it is a path, the output must be reachable from every node by the same name.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec

from .encode_files import put_in_place, said_of
from .encode_job import Encoder, Options, Plan, encode
from .encode_output import PLAN, Output, shard_name
from .encode_source import Shard

try:
    import ray
except ImportError as error:
    raise ImportError("--engine ray needs Ray: pip install 'sail-embedding[ray]'") from error

STORE_BYTES = 128 << 20  # of Ray's object store: what travels are numbers of shards and what is said of them


def encode_on_ray(model: Path, source: Path, out: str, options: Options, address: str | None = None) -> dict[str, Any]:
    """`encode` on a Ray cluster.

    Args:
        model: the model's folder.
        source: what `open_source` takes.
        out: a path as for the local engine, or the URL of a folder that fsspec can write, such as ``s3://bucket/x``.
        options: how; ``workers`` are actors, of one thread each where ``threads`` does not say otherwise.
        address: of a running cluster; None starts one on this machine, unless Ray runs in this process already.

    Raises:
        ValueError: as `encode`; or a URL that actors cannot share.
    """
    options = replace(options, threads=options.threads or 1)  # not by the nodes' cores: they may differ
    place = RemoteOutput(out) if "://" in out else Output(Path(out).absolute())
    with _cluster(address):
        return encode(model.absolute(), source.absolute(), place, options, encode_with_actors)


def encode_with_actors(plan: Plan, out: Output, missing: Sequence[Shard], bar: Any) -> Iterator[dict[str, Any]]:
    """The engine: shards are rows of a dataset, mapped by a pool of actors; what is killed is done again."""
    if not missing:
        return
    gpu = plan.options.place.startswith("cuda")
    cluster = ray.cluster_resources()
    most = cluster.get("GPU", 0) if gpu else cluster.get("CPU", 1) // 2
    if gpu and not most:
        raise ValueError(f"device={plan.options.place!r}: the cluster has no GPU; take --device cpu.")
    actors = min(len(missing), plan.options.workers or max(1, int(most)))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shards = ray.data.from_items([{"index": shard.index} for shard in missing], override_num_blocks=len(missing))
    mapped = shards.map_batches(
        _ShardEncoder,
        fn_constructor_kwargs={"plan": plan, "url": getattr(out, "url", None), "work": out.work},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus_each(nodes, actors, gpu),
        num_gpus=1 if gpu else None,
    )
    try:
        for row in mapped.iter_rows():
            said = said_by(row)
            bar.update(said["items"])
            yield said
    except ray.exceptions.RayError as error:
        lines = [line for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
        raise RuntimeError(f"on a node of the cluster: {lines[-1] if lines else type(error).__name__}") from error


def cpus_each(nodes: Sequence[dict[str, float]], actors: int, gpu: bool) -> float:
    """CPUs of an actor: an equal share, but no more than a node has, since Ray waits for ever for what none has."""
    fit = [node.get("CPU", 0) / (node["GPU"] if gpu else 1) for node in nodes if not gpu or node.get("GPU")]
    share = min(sum(node.get("CPU", 0) for node in nodes) / actors, (min if gpu else max)(fit))
    return int(share) if share >= 1 else max(0.0, round(share - 0.005, 2))


class _ShardEncoder:
    """An actor: numbers of shards to what is said of their files, or to why there is none.

    A reason travels as a row: of what an actor raises, Ray tells with pages of its own, and its advice comes last.
    """

    def __init__(self, plan: Plan, url: str | None, work: Path) -> None:
        self.plan = plan
        self.url = url
        self.work = work
        self.encoder: Encoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"said": [json.dumps(self._said(self.plan.shards[index])) for index in batch["index"]]}

    def _said(self, shard: Shard) -> dict[str, Any]:
        try:
            return self._encode(shard)
        except Exception as error:
            return {"failed": one_line(error)}

    def _encode(self, shard: Shard) -> dict[str, Any]:
        if self.encoder is None:  # a process of its own decodes: a poisoned item must not end the actor
            self.encoder = Encoder(self.plan, workers=1)
        if self.url is None:
            self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work if self.url is None else None) as folder:
            (said,) = self.encoder.shards([shard], Path(folder), Path(folder))
            self._publish(Path(folder) / shard_name(shard.index, len(self.plan.shards)))
        return said

    def _publish(self, path: Path) -> None:
        """Put a shard where it belongs, whole: by a rename, or as one object."""
        if self.url is None:
            put_in_place(path, self.work.parent / path.name)
        else:
            with told(self.url):
                system, folder = fsspec.url_to_fs(self.url)
                system.put_file(str(path), f"{folder}/{path.name}")


def said_by(row: dict[str, Any]) -> dict[str, Any]:
    """What an actor says of a shard.

    Raises:
        RuntimeError: that it could not make it.
    """
    said: dict[str, Any] = json.loads(row["said"])
    if "failed" in said:
        raise RuntimeError(f"on a node of the cluster: {said['failed']}")
    return said


@contextmanager
def told(url: str) -> Iterator[None]:
    """What goes wrong at a URL as an OSError of one line: libraries of stores have classes of their own for it."""
    try:
        yield
    except Exception as error:
        raise OSError(f"--out {url}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says, or where it says nothing, what it is."""
    return " ".join(str(error).split()) or type(error).__name__


class RemoteOutput(Output):
    """A folder behind a URL of fsspec. There is no lock: two jobs at once write the same bytes twice.

    Raises:
        ValueError: one file is asked for, a place that only one process sees, one that holds other things, or a bucket
            that is not there.
        OSError: the URL cannot be reached; so do all methods.
    """

    def __init__(self, url: str) -> None:
        if url.endswith((".parquet", ".pq")):
            raise ValueError(f"--out {url}: at a URL the result is a folder of shards; name a folder.")
        if url.startswith("memory://"):
            raise ValueError("--out memory://... is seen by one process only; name a path or another URL.")
        self.url = url
        self.out = self.folder = Path(url)  # nothing is there: what a job on a disk would leave out of its source
        self.work = self.folder / ".work"
        self.single = False
        with told(url):
            self.system, self.root = fsspec.url_to_fs(url)
            is_file, names = self.system.isfile(self.root), self._names()
        if is_file:
            raise ValueError(f"--out {url}: this is a file; name another place.")
        self._refuse_foreign(url, names)
        self._make_root()

    def _names(self) -> set[str]:
        """What lies in the folder; object stores may list the folder itself, too."""
        self.system.invalidate_cache()  # some systems keep their listings
        try:
            paths = {path.rstrip("/") for path in self.system.ls(self.root, detail=False)}
        except FileNotFoundError:
            return set()
        return {path.rsplit("/", 1)[-1] for path in paths - {self.root.rstrip("/")}}

    def _make_root(self) -> None:
        """Make the folder, but no bucket: `makedirs` of a store makes one of a name that was mistyped, too."""
        parts = self.root.rstrip("/").split("/")
        if len(parts) == 1:  # a whole bucket
            return
        with told(self.url):
            try:
                if parts[0]:  # no root of a system with folders
                    self.system.mkdir("/".join(parts[:2]), create_parents=False)
            except FileExistsError:
                pass
            except FileNotFoundError as error:
                raise ValueError(f"there is no {parts[0]!r}; correct the name, or make it first") from error
            self.system.makedirs(self.root, exist_ok=True)

    @property
    def name(self) -> str:
        """The URL: of a path, one of its slashes would be lost."""
        return self.url

    def locked(self) -> Any:
        return nullcontext()

    def clear(self) -> None:
        with told(self.url):
            if self.system.exists(f"{self.root}/{PLAN}"):
                self.system.rm(f"{self.root}/{Path(PLAN).parent}", recursive=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        with told(self.url):
            try:
                found = json.loads(self.system.cat_file(f"{self.root}/{name}"))
            except (FileNotFoundError, ValueError):
                return None
        return found if isinstance(found, dict) else None

    def _write(self, name: str, content: Any) -> None:
        path = f"{self.root}/{name}"
        with told(self.url):
            if "/" in name:
                self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(path, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")

    def _said(self, name: str) -> dict[str, Any] | None:
        path = f"{self.root}/{name}"
        with told(self.url):
            if not self.system.exists(path):
                return None
            with self.system.open(path, "rb") as file:
                return said_of(file)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Ray, quiet: no usage reports, no dashboard, no logs of actors here. Ended if it was begun here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    begun = not ray.is_initialized()
    if begun:
        local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if begun:
            ray.shutdown()
