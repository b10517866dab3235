"""`sail push`: what of a model's folder goes up to the Hub, and what stays, told before anything is sent.

Room: Card -> the Hub. Unusual: a list of what may go up, not of what may not; the upload gets exactly the names that
the dry run prints. Tokens are huggingface_hub's business: none is read or asked for here.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..evaluation.reports import file_sha256
from .checkpoint import PACKAGE, below
from .trace import read_json, read_object, read_text

ALLOWED = (
    "config.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "modules.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "behaviour_heads*",
    "semantic_ids*",
    "*_sail.py",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "README.md",
    "LICENSE*",
    "*.svg",
)
SUFFIXES = {".json", ".safetensors", ".py", ".jinja", ".txt", ".model", ".md", ".svg", ""}
PICTURES = "figures/*.svg"
# Of a name, why it stays; the first that fits.
REASONS = (
    (r"(^|/)\.", "hidden: it may hold secrets"),
    (r"(^|/)(checkpoint|optimizer|scheduler|rng_state|trainer_state|training_args|adapter)", "state of a training"),
    (r"\.(pt|pth|bin|pkl|pickle|ckpt|npy|npz)$", "may be a pickle: only safetensors go up"),
    (r"\.trace\.json$", "where the card's numbers come from: for your repository"),
)
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{24,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
LFS_BYTES = 10_000_000  # the Hub takes larger files by LFS only, and safetensors always
NEEDED = {
    "config.json": "`sail build` or `sail train` makes a model",
    "processor_config.json": "`sail build` or `sail train` makes a model",
    "modules.json": "`sail build` or `sail train` makes a model",
    "README.md": "`{card}` writes it",
}
LOADED = re.compile(r"""(?:SentenceTransformer|from_pretrained)\(\s*(["'])(.+?)\1""")  # by an example of a card


@dataclass(frozen=True)
class File:
    """A file that goes up: its place in the folder and on the Hub, bytes, sha256, whether by LFS."""

    name: str
    size: int
    sha256: str
    lfs: bool


@dataclass(frozen=True)
class Plan:
    """What a push does.

    Attributes:
        folder, repo: from where to where.
        files: what goes up.
        left_out: what stays, and why; a folder of nothing else is one entry.
        notes: what to look at before it is public.
    """

    folder: Path
    repo: str
    files: Sequence[File]
    left_out: Sequence[tuple[str, str]]
    notes: Sequence[str]

    @property
    def patterns(self) -> list[str]:
        """``allow_patterns`` of the upload: these names and no other."""
        return [re.sub(r"([*?\[])", r"[\1]", file.name) for file in self.files]

    def __str__(self) -> str:
        width = max(len(file.name) for file in self.files)
        lines = [
            f"{file.name:{width}}  {file.size:>13,}  {file.sha256}  {'LFS' if file.lfs else '-'}" for file in self.files
        ]
        total = f"{len(self.files)} files, {sum(file.size for file in self.files):,} bytes, to {self.repo}"
        stays = [f"stays: {name} ({reason})" for name, reason in self.left_out]
        return "\n".join([*lines, total, *stays, *(f"look: {note}" for note in self.notes)])


def plan_push(folder: str | Path, repo: str) -> Plan:
    """What would go up; nothing is sent.

    Args:
        folder: of the model, with its card.
        repo: ``USER/NAME``.

    Raises:
        ValueError: no such name of a repository; something is missing, of another form, older than the weights, or
            looks like a secret; a card whose examples load another place.
    """
    folder = Path(folder)
    check_repo(repo)
    going, left_out = _sorted_out(folder)
    if "config.json" not in going and not (folder / "config.json").exists():
        raise ValueError(f"There is no model in {folder} (no config.json): {below(folder)}")
    card = f"sail card {shlex.quote(str(folder))} --repo {repo}"
    missing = list(_missing(folder, set(going), card))
    if missing:
        raise ValueError(f"{folder} cannot be pushed: {'; '.join(missing)}.")
    files = []
    for name in going:
        path = folder / name
        size = path.stat().st_size
        files.append(File(name, size, file_sha256(path), path.suffix == ".safetensors" or size > LFS_BYTES))
    _check_contents(folder, files, repo, card)
    return Plan(folder, repo, files, left_out, _notes(folder, going))


def check_repo(repo: str) -> None:
    """Refuse what is no repository of a user.

    Raises:
        ValueError: says what is needed.
    """
    try:
        validate_repo_id(repo)
        whole = repo.count("/") == 1
    except HFValidationError:
        whole = False
    if not whole:
        raise ValueError(
            f"--repo is {repo!r}; USER/NAME is needed: one slash, and letters, digits, '-', '_', '.' on both sides."
        )


def push(folder: str | Path, repo: str, *, dry_run: bool, private: bool = False, api: Any = None) -> Plan:
    """Put a model on the Hub: a repository where there is none, and one commit with the files of `plan_push`.

    Args:
        folder, repo: as there.
        dry_run: True sends nothing.
        private: of a new repository.
        api: a `huggingface_hub.HfApi`, by default one with the machine's login.

    Raises:
        ValueError: as `plan_push`. OSError: of the Hub.
    """
    plan = plan_push(folder, repo)
    if dry_run:
        return plan
    api = HfApi() if api is None else api
    api.create_repo(repo_id=repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo, folder_path=str(plan.folder), allow_patterns=plan.patterns, commit_message="Model and card"
    )
    return plan


# --- what goes, what stays --------------------------------------------------------------------------------------------


def _sorted_out(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Names that go up, and the others with the reason; links stay, as what they point to may lie anywhere."""
    going, stays = [], {}
    readme = folder / "README.md"
    card = read_text(readme) if readme.is_file() else ""
    for name in _names(folder):
        reason = _reason(folder / name, name, card)
        if reason is None:
            going.append(name)
        else:
            top = name.split("/")[0]
            shown = name if top == name or top == "figures" else f"{top}/"
            stays.setdefault(shown, reason)
    return going, sorted(stays.items())


def _names(folder: Path) -> list[str]:
    found = []
    for place, _, files in os.walk(folder):  # links to folders are not followed
        found += [(Path(place) / file).relative_to(folder).as_posix() for file in files]
    return sorted(found)


def _reason(path: Path, name: str, card: str) -> str | None:
    """Why a file stays; None if it goes up. A picture goes if the card shows it: one of before may still lie there."""
    for pattern, reason in REASONS:
        if re.search(pattern, name):
            return reason
    flat = "/" not in name and path.suffix in SUFFIXES and any(fnmatch.fnmatch(name, one) for one in ALLOWED)
    if not flat and not fnmatch.fnmatch(name, PICTURES):
        return "no part of a model"
    if not flat and name not in card:
        return "a picture that the card does not show"
    return "a link: put the file itself here" if path.is_symlink() else None


# --- what must be there -----------------------------------------------------------------------------------------------


def _missing(folder: Path, going: set[str], card: str) -> Iterator[str]:
    """What a model on the Hub needs and the folder lacks, with what to do."""
    for name, remedy in NEEDED.items():
        if name not in going:
            yield f"{name} is missing ({remedy.format(card=card)})"
    if not any(name.endswith(".safetensors") and name.startswith("model") for name in going):
        yield "model.safetensors is missing (`sail build` or `sail train` writes it)"
    if "model.safetensors.index.json" in going:
        index = folder / "model.safetensors.index.json"
        shards = set(_texts(index, read_object(index).get("weight_map"), "weight_map"))
        yield from (f"{name} is missing (a shard of the weights)" for name in sorted(shards - going))
    if "tokenizer.json" not in going and "tokenizer_config.json" not in going:
        yield "the tokenizer is missing (`processor.save_pretrained` writes it)"
    for name in sorted(_code(folder, going) - going):
        ours = f"copy it from {PACKAGE}" if (PACKAGE / name).is_file() else "copy it from where the model was made"
        yield f"{name} is missing (code that the model needs: {ours})"


def _code(folder: Path, going: set[str]) -> set[str]:
    """Modules that configurations name, and what those import from beside them."""
    named: set[str] = set()
    for name in ("config.json", "processor_config.json"):
        if name in going:
            classes = _texts(folder / name, read_object(folder / name).get("auto_map") or {}, "auto_map")
            named |= {one.split(".")[0] for one in classes}
    if "modules.json" in going:
        path = folder / "modules.json"
        modules = read_json(path)
        if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
            raise ValueError(f"{path} is no list of modules; `sail build` or `sail train` writes one.")
        types = _texts(path, {str(n): one.get("type") for n, one in enumerate(modules)}, "type")
        named |= {one.split(".")[0] for one in types if not one.startswith("sentence_transformers.")}
    found: set[str] = set()
    while named:
        file = f"{named.pop()}.py"
        if file not in found and file in going:
            named |= set(re.findall(r"^from \.(\w+) import", read_text(folder / file), re.MULTILINE))
        found.add(file)
    return found


def _texts(path: Path, found: Any, what: str) -> list[str]:
    """The values of an object, which must be texts.

    Raises:
        ValueError: they are not; names the file.
    """
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ValueError(f"{path}: {what} is {str(found)[:80]}; names are needed: save the model again.")
    return list(found.values())


# --- what is in them --------------------------------------------------------------------------------------------------


def _check_contents(folder: Path, files: Sequence[File], repo: str, command: str) -> None:
    """Refuse secrets, and a card of other weights or with examples that load another place.

    Raises:
        ValueError: says which file, and the command that writes the card.
    """
    card = read_text(folder / "README.md")
    elsewhere = sorted({found[2] for found in LOADED.finditer(card)} - {repo})
    if elsewhere:
        raise ValueError(
            f"The examples of README.md in {folder} load {', '.join(map(repr, elsewhere))}, not {repo!r}; write it "
            f"again with `{command}`, and the --results that it had."
        )
    for file in files:
        if file.name.endswith(".safetensors"):
            if file.name.startswith("model") and file.sha256 not in card:
                raise ValueError(
                    f"README.md in {folder} is about other weights: the sha256 of {file.name} is not in it; write it "
                    f"again with `{command}`."
                )
        elif SECRET.search((folder / file.name).read_text(encoding="utf-8", errors="replace")):
            raise ValueError(
                f"{folder / file.name} holds what looks like a secret; take it out, and revoke it if it is one."
            )


def _notes(folder: Path, names: Sequence[str]) -> list[str]:
    """Folders of this machine that a configuration names, and code that is not the installed package's."""
    found = []
    for name in names:
        if name.endswith(".json") and not name.startswith("tokenizer"):
            for text in _strings(read_json(folder / name)):
                if re.match(r"/[\w.-]+/|[A-Za-z]:\\", text):
                    found.append(f"{name} names a folder of this machine, {text!r}: nobody else needs it")
        ours = PACKAGE / name
        if name.endswith("_sail.py") and ours.is_file() and ours.read_bytes() != (folder / name).read_bytes():
            found.append(f"{name} is not the installed package's: save the model again if it shall be")
    return found


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for one in content.values() if isinstance(content, dict) else content:
            yield from _strings(one)
