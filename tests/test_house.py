"""The house holds: one import name, who may import whom, what the Hub can load, no host names, no unsafe loading."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("modeling_sail", "training", "evaluation") for path in (ROOT / folder).rglob("*.py")
)
HUB = sorted((ROOT / "modeling_sail").glob("*_sail.py"))
HUB_NEEDS = {"av", "numpy", "PIL", "safetensors", "soundfile", "soxr", "torch", "transformers"}


def imports(path: Path) -> list[tuple[int, str, ast.stmt]]:
    """(level, module, node) of every import statement; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", node))
    return found


def resolved(path: Path) -> list[str]:
    """Modules that a file imports, as absolute names."""
    parts = ("modeling_sail", *path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[1] == "modeling_sail" else parts
    return [".".join([*parts[: len(parts) - level], module]) if level else module for level, module, _ in imports(path)]


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.name)
def test_a_hub_file_imports_flat_siblings_and_listed_packages_only(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, (ast.If, ast.Try)))]
    top = {node.lineno for block in blocks for node in block}
    for level, module, node in imports(path):
        assert node.lineno in top, (
            f"{path.name}:{node.lineno}: an import inside a function is not found by the Hub's loader"
        )
        if level:
            assert level == 1, f"{path.name}:{node.lineno}: only siblings"
            assert module.endswith("_sail"), f"{path.name}:{node.lineno}: `from .x import name` of a Hub file only"
        else:
            package = module.split(".")[0]
            allowed = HUB_NEEDS | ({"sentence_transformers"} if path.name == "sentence_transformer_sail.py" else set())
            assert package in allowed or package in sys.stdlib_module_names, f"{path.name}: {package}"


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.name)
def test_no_other_line_of_a_hub_file_looks_like_an_import(path) -> None:
    real = {node.lineno for _, _, node in imports(path)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if re.match(r"\s*(from\s+\.|import\s+\.)", line):
            assert number in real, f"{path.name}:{number}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_know_only_the_ones_before_them(path) -> None:
    room = path.relative_to(ROOT).parts[0]
    pure = path.name in ("losses.py", "contrastive.py", "balancing.py", "metrics.py")
    for module in resolved(path):
        assert module.split(".")[0] not in ("training", "evaluation"), "import modeling_sail.training"
        assert not module.endswith(".cli") or path.name == "__main__.py", "nothing imports the command line"
        if room == "training":
            assert not module.startswith("modeling_sail.evaluation"), module
        if pure:
            assert not module.startswith("modeling_sail"), f"{path.name} must know nothing of ours"
        if module.startswith("mteb"):
            assert path.name == "mteb_encoder.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_by_saying_what_it_is_and_stays_small(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a file opens with what it does"
    assert len(text.splitlines()) <= 700


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_loaded_unchecked(path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)


def test_no_registry_host_and_no_path_of_a_machine_is_written_anywhere() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    hosts = ["pypi" + ".org", "python" + "hosted", "npm" + "js", "debian" + ".org", "npm" + "mirror"]
    places = ["/ro" + "ot/", "/wo" + "rk/main", "/tmp" + "/dl"]
    pattern = re.compile("|".join(map(re.escape, hosts + places)))
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".png") or not path.is_file():
            continue
        match = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
        assert match is None, f"{name}: {match[0]}"


@pytest.mark.slow
def test_the_wheel_installs_one_top_level_name(tmp_path) -> None:
    source = tmp_path / "source"
    # A copy: building writes next to setup.py.
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"modeling_sail"}
    for wanted in ("training/build.py", "training/data/tuxpaint.py", "evaluation/metrics.py", "cli.py"):
        assert f"modeling_sail/{wanted}" in names
    assert any(name.startswith("modeling_sail/training/weights/mini/") for name in names)
