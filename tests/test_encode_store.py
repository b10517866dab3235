"""`sail encode --engine ray` to an object store, without a cluster: the actor's code runs here, one shard at a time.

The store is fsspec's least: keys and whole objects, no folders, listings that are kept, a bucket that `makedirs` makes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.registry import known_implementations
from modeling_sail.training.build import build

from modeling_sail.cli import main
from modeling_sail.encode_job import Options, encode

from . import encode_jobs
from .encode_jobs import content

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from modeling_sail import encode_ray  # noqa: E402 - needs Ray

items, run, small_windows = encode_jobs.items, encode_jobs.run, encode_jobs.small_windows
OPTIONS = Options(shard_size=6, device="cpu", workers=1)


class NoCredentialsError(Exception):
    """As botocore's: neither an OSError nor a ValueError."""


class Store(fsspec.AbstractFileSystem):
    protocol = "store"
    objects: ClassVar[dict[str, bytes]] = {}
    buckets: ClassVar[set[str]] = set()
    fails: ClassVar[set[str]] = set()  # names of operations

    def _refuse(self, operation: str, path: str) -> None:
        if operation in self.fails:
            raise NoCredentialsError("unable to locate\ncredentials")
        if path.split("/")[0] not in self.buckets:
            raise FileNotFoundError(path)

    def mkdir(self, path, create_parents=True, **kwargs):
        if create_parents:
            self.buckets.add(path.split("/")[0])
        self._refuse("mkdir", path)

    def makedirs(self, path, exist_ok=False):
        self.mkdir(path)

    def ls(self, path, detail=True, **kwargs):
        self._refuse("ls", path)
        if path not in self.dircache:
            below = {name[len(path) + 1 :].split("/")[0] for name in self.objects if name.startswith(f"{path}/")}
            self.dircache[path] = [self._entry(f"{path}/{name}") for name in sorted(below)]
        if path in self.objects:
            return [self._entry(path)] if detail else [path]
        if not self.dircache[path]:
            raise FileNotFoundError(path)
        return self.dircache[path] if detail else [each["name"] for each in self.dircache[path]]

    def _entry(self, path):
        known = path in self.objects
        return {"name": path, "size": len(self.objects.get(path, b"")), "type": "file" if known else "directory"}

    def invalidate_cache(self, path=None):
        self.dircache.clear()

    def _open(self, path, mode="rb", **kwargs):
        self._refuse("open", path)
        assert mode == "rb"
        if path not in self.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self.objects[path])

    def pipe_file(self, path, value, **kwargs):
        self._refuse("pipe_file", path)
        self.objects[path] = value

    def put_file(self, lpath, rpath, **kwargs):
        self._refuse("put_file", rpath)
        self.objects[rpath] = Path(lpath).read_bytes()

    def rm_file(self, path):
        self._refuse("rm_file", path)
        self.objects.pop(path, None)  # as S3: what is not there is removed, too

    def rmdir(self, path):
        """There are no folders."""


@pytest.fixture(autouse=True)
def store(monkeypatch):
    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setattr(Store, "objects", {})
    monkeypatch.setattr(Store, "buckets", {"bucket"})
    monkeypatch.setattr(Store, "fails", set())
    Store.clear_instance_cache()
    return Store


def at(folder: str) -> dict[str, bytes]:
    """The objects of a folder."""
    return {name[len(folder) + 1 :]: value for name, value in Store.objects.items() if name.startswith(f"{folder}/")}


def encode_to(url: str, model: Path, source: Path, shards: int = 99) -> dict:
    """`encode_on_ray` with actors that run here; after some shards, as if it were killed."""

    def engine(plan, out, missing, bar):
        actor = encode_ray._ShardEncoder(plan, out.url, out.work)
        try:
            for shard in missing[:shards]:
                (said,) = actor({"index": [shard.index]})["said"]
                said = encode_ray.said_by({"said": said})
                bar.update(said["items"])
                yield said
            if shards < len(missing):
                raise KeyboardInterrupt
        finally:
            if actor.encoder is not None:
                actor.encoder.__exit__()

    return encode(model, source, encode_ray.RemoteOutput(url), OPTIONS, engine)


def test_an_object_store_gets_the_bytes_of_a_local_folder_also_after_a_kill(run, items, tiny_folder, tmp_path):
    run(tmp_path / "local")
    with pytest.raises(KeyboardInterrupt):
        encode_to("store://bucket/x", tiny_folder, items, shards=1)
    assert sorted(at("bucket/x")) == [".work/plan.json", "manifest.json", "part-00000.parquet"]
    first = at("bucket/x")["part-00000.parquet"]
    Store.objects["bucket/x/part-00001.parquet"] = first[:-9]  # of a store that shows what is not whole
    assert encode_to("store://bucket/x", tiny_folder, items)["new"] == encode_jobs.ITEMS - 6
    assert at("bucket/x") == content(tmp_path / "local")
    assert encode_to("store://bucket/x", tiny_folder, items)["new"] == 0
    del Store.objects["bucket/x/part-00000.parquet"]
    assert encode_to("store://bucket/x", tiny_folder, items)["new"] == 6
    assert at("bucket/x") == content(tmp_path / "local")


def test_another_model_is_refused_at_a_url_by_its_name(items, tiny_folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_to("store://bucket/x", tiny_folder, items, shards=0)
    before = dict(Store.objects)
    build("tiny", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"^store://bucket/x is of another job \(other model\)"):
        encode_to("store://bucket/x", tmp_path / "other", items)
    assert Store.objects == before


@pytest.mark.parametrize("url", ["store://buckte/x", "store://buckte/x/y", "store://buckte"])
def test_a_bucket_of_a_mistyped_name_is_not_made(url, items, tiny_folder):
    with pytest.raises(OSError, match=f"^--out {url}: .*buckte"):
        encode_to(url, tiny_folder, items)
    assert Store.buckets == {"bucket"} and not Store.objects


@pytest.mark.parametrize("operation", ["ls", "mkdir", "pipe_file", "open", "put_file", "rm_file"])
def test_what_a_store_raises_is_one_line_that_names_the_url(operation, items, tiny_folder):
    Store.fails.add(operation)
    with pytest.raises((OSError, RuntimeError), match="--out store://bucket/x: unable to locate credentials$"):
        encode_to("store://bucket/x", tiny_folder, items)


def test_a_model_that_a_node_does_not_have_is_said_in_one_line(items, tiny_folder, monkeypatch):
    def absent(*_: object, **__: object) -> None:
        raise ValueError("/shared/tiny holds no model")

    monkeypatch.setattr(encode_ray, "Encoder", absent)
    with pytest.raises(RuntimeError, match="^on a node of the cluster: /shared/tiny holds no model$"):
        encode_to("store://bucket/x", tiny_folder, items)


def test_a_scheme_whose_package_is_missing_says_what_to_install(items, tiny_folder, monkeypatch, capsys):
    missing = {"class": "no_such_package.Store", "err": "Install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "absent", missing)
    arguments = ["encode", str(items), "--model", str(tiny_folder), "--out", "absent://bucket/x", "--engine", "ray"]
    assert main(arguments) == 2
    said = "sail encode: --out absent://bucket/x: Install no_such_package to access it\n"
    assert capsys.readouterr().err == said
