"""The house holds: one import name, who may import whom, what the Hub can load, no host names, no unsafe loading."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("training", "evaluation", "model_cards")  # below modeling_sail, by setup.py
FOLDERS = ("modeling_sail", *MAPPED)
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = [ROOT / "setup.py", *sorted((ROOT / "tests").rglob("*.py"))]
HUB = sorted((ROOT / "modeling_sail").glob("*_sail.py"))
# Rule 2 gives evaluation `training.data` only. The retrieval scripts read what mini cached, three benchmarks measure
# the training itself, and the sequence tests, the recommenders beside ours and the ranker are of behaviour, which
# training.recommendation reads; reports are written whole by training's helper, comparisons train what they compare:
# they may more.
EVALUATION_MAY_READ_TRAINING = {
    "tuxpaint_retrieval.py",
    "loss.py",
    "cache.py",
    "mine.py",
    "train.py",
    "gpu.py",
    "peers.py",
    "sequences.py",
    "item_to_item.py",
    "cre.py",
    "recommenders.py",
    "ranker.py",
    "reports.py",
    "feature_encoder.py",
    "comparison.py",
    "kept_scores.py",
    "robustness.py",
}
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
    found = []
    for level, module, node in imports(path):
        if level:
            module = ".".join([*parts[: len(parts) - level], *module.split(".")]).rstrip(".")
        found.append(module)
        if isinstance(node, ast.ImportFrom):  # `from . import cli` names a module too
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


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


def test_hub_files_import_each_other_without_a_circle() -> None:
    siblings = {
        path.stem: {module.partition(".")[0] for level, module, _ in imports(path) if level and module} for path in HUB
    }
    assert len(siblings) > 1 and any(siblings.values())
    TopologicalSorter(siblings).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.name)
def test_no_other_line_of_a_hub_file_looks_like_an_import(path) -> None:
    real = {node.lineno for _, _, node in imports(path)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if re.match(r"\s*(from\s+\.|import\s+\.)", line):
            assert number in real, f"{path.name}:{number}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_know_only_the_ones_before_them(path) -> None:
    room = path.relative_to(ROOT).parts[0]
    pure = path.name in ("losses.py", "contrastive.py", "balancing.py", "metrics.py", "similarity.py")
    for module in resolved(path):
        assert module.split(".")[0] not in MAPPED, "import modeling_sail.training"
        assert not module.endswith(".cli") or path.name == "__main__.py", "nothing imports the command line"
        if room != "model_cards" and path.name != "cli.py":
            assert not module.startswith("modeling_sail.model_cards"), (
                "cards come last: the command line alone asks for them"
            )
        if room == "training":
            assert not module.startswith("modeling_sail.evaluation"), module
        if room == "evaluation" and path.name not in EVALUATION_MAY_READ_TRAINING:
            data_only = module in ("modeling_sail", "modeling_sail.training") or re.match(
                r"modeling_sail\.training\.data(\.|$)", module
            )
            assert data_only or not module.startswith("modeling_sail.training"), module
        if pure and not (path.name == "similarity.py" and module.startswith("modeling_sail.evaluation.metrics")):
            assert not module.startswith("modeling_sail"), f"{path.name} must know nothing of ours"
        if module.split(".")[0] == "mteb":
            assert path.name in ("mteb_encoder.py", "mteb_tasks.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_by_saying_what_it_is_and_stays_small(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a file opens with what it does"
    assert len(text.splitlines()) <= 700


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_tests_know_one_import_name_too(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, "a file opens with what it does"
    for level, module, node in imports(path):
        assert level or module.split(".")[0] not in MAPPED, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_loaded_unchecked(path) -> None:
    for module in resolved(path):
        assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib", "shelve"), module
        assert module != "torch.load", "write torch.load(..., weights_only=True), so that this test sees it"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            assert given.get("weights_only") == "True", f"line {node.lineno}"


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
    source = tmp_path / "source"  # a copy: building writes next to setup.py
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
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
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"modeling_sail"}
    data = [path for folder in ("weights", "recipes") for path in (ROOT / "training" / folder).glob("**/*.*")]
    data += [ROOT / "model_cards" / name for name in ("template.md", "facts.yaml")]
    for path in [*SOURCES, *data]:
        name = path.relative_to(ROOT).as_posix()
        assert f"modeling_sail/{name.removeprefix('modeling_sail/')}" in names, f"{name} is not in the wheel"
    assert any(name.startswith("modeling_sail/training/weights/mini/") for name in names), "mini's weights are missing"
