"""`sail encode --engine ray` on a local cluster of two workers: the bytes of the local engine, whoever is killed."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress

import psutil
import pytest

from modeling_sail.cli import main
from modeling_sail.encode_job import Options, encode, encode_here
from modeling_sail.encode_output import Output

from .conftest import picture

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

from modeling_sail import encode_ray  # noqa: E402 - needs Ray

OPTIONS = Options(shard_size=40, device="cpu", workers=2)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    picture(1).save(folder / "a.png")
    rows = [{"id": f"i{number}", "title": "many words " * (number % 9)} for number in range(200)]
    for number in range(0, 200, 7):
        rows[number]["image"] = "a.png" if number else "gone.png"
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "items.jsonl"


@pytest.fixture(scope="module")
def expected(items, tiny_folder, tmp_path_factory):
    """What the local engine writes, by name."""
    out = tmp_path_factory.mktemp("local") / "x"
    encode(tiny_folder, items, Output(out), Options(shard_size=40, device="cpu", workers=0), encode_here)
    return files(out)


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # by Ray's own, tests that run beside these leave its workers no core
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=encode_ray.STORE_BYTES, log_to_driver=False)
    yield
    ray.shutdown()


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_an_actor(folder, killed: list[int], over: threading.Event) -> None:
    """Once the first shard is there, kill -9 an actor that encodes; unless the job is over."""
    while not killed and not over.wait(0.01):
        if list(folder.glob("part-*.parquet")):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # one that ended meanwhile
                    if "MapWorker" in " ".join(process.cmdline()[:1]) and not killed:
                        process.kill()
                        killed.append(process.pid)


@pytest.mark.slow
def test_an_actor_that_is_killed_costs_a_retry_and_no_row(cluster, items, tiny_folder, expected, tmp_path) -> None:
    killed: list[int] = []
    over = threading.Event()
    watch = threading.Thread(target=kill_an_actor, args=(tmp_path / "x", killed, over))
    watch.start()
    try:
        done = encode_ray.encode_on_ray(tiny_folder, items, str(tmp_path / "x"), OPTIONS)
    finally:
        over.set()
        watch.join()
    assert killed, "the job was over before an actor was killed"
    assert (done["ok"], done["error"], done["new"]) == (180, 20, 200)
    assert files(tmp_path / "x") == expected


@pytest.mark.slow
def test_shards_go_to_a_url_and_those_that_are_there_are_not_made_again(
    cluster, items, tiny_folder, expected, tmp_path
) -> None:
    (tmp_path / "x").mkdir()
    for name, content in expected.items():
        if name != "part-00003.parquet":
            (tmp_path / "x" / name).write_bytes(content)
    url = f"file://{tmp_path}/x"
    assert encode_ray.encode_on_ray(tiny_folder, items, url, OPTIONS)["new"] == 40
    assert files(tmp_path / "x") == expected
    assert encode_ray.encode_on_ray(tiny_folder, items, url, OPTIONS)["new"] == 0


@pytest.mark.parametrize(
    ("out", "message"), [("memory://x", "one process only"), ("file:///x.parquet", "name a folder")]
)
def test_a_place_that_actors_cannot_share_is_refused_at_once(out, message, items, tiny_folder, capsys) -> None:
    arguments = ["encode", str(items), "--model", str(tiny_folder), "--out", out, "--engine", "ray"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_url_that_holds_other_things_is_not_written_to(tmp_path) -> None:
    (tmp_path / "photo.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds other things and no manifest.json; name a new or empty one"):
        encode_ray.RemoteOutput(f"file://{tmp_path}")
    with pytest.raises(ValueError, match="is a file"):
        encode_ray.RemoteOutput(f"file://{tmp_path}/photo.png")
    assert files(tmp_path) == {"photo.png": b"precious"}
    for place, ours in (("a", "manifest.json"), ("b", ".work/plan.json")):
        (tmp_path / place / ours).parent.mkdir(parents=True)
        (tmp_path / place / ours).write_text('{"finished": false}')
        assert encode_ray.RemoteOutput(f"file://{tmp_path / place}").root
    assert encode_ray.RemoteOutput(f"file://{tmp_path}/new/one").manifest() is None


@pytest.mark.parametrize(
    ("nodes", "actors", "gpu", "each"),
    [
        ([{"CPU": 8}], 2, False, 4),
        ([{"CPU": 2}], 3, False, 0.66),
        ([{"CPU": 4}, {"CPU": 8}], 1, False, 8),  # a last shard: all CPUs of the cluster are on no node
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}, {"CPU": 32, "GPU": 2}], 3, True, 8),
        ([{}, {"CPU": 4}], 8, False, 0.49),
    ],
)
def test_an_actor_asks_for_no_more_than_a_node_has(nodes, actors, gpu, each) -> None:
    assert encode_ray.cpus_each(nodes, actors, gpu) == pytest.approx(each, abs=0.011)
