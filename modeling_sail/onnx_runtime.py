"""`OnnxSail`: items to vectors with onnxruntime, from a folder that `sail export` wrote; never uploaded.

The model runs without torch. The processor does not: it makes torch tensors, so torch must be installed, but no weight
is loaded into it and no operation of the model runs there. Unusual: the graphs do not count which picture is whose;
that is done here, in numpy, and pictures and windows are padded to the item of a pass that has most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checked_files import check_files
from .configuration_sail import AUDIO, VISION
from .items_sail import ItemStatus
from .processing_sail import SailEmbeddingProcessor

MANIFEST = "onnx_manifest.json"
NEEDED = "onnxruntime is not installed; pip install 'sail-embedding[onnx]'"
TOWER_BATCH = 8  # pictures or windows of one run: they stay in the processor's cache, as in the model itself


class OnnxSail:
    """Embeds items as `SentenceTransformer(folder).encode` does, with onnxruntime on the CPU.

    >>> OnnxSail("out").encode([{"title": "a red kangaroo", "image": "kangaroo.png"}], task="i2i", side="target").shape
    (1, 384)

    Reads what was exported: without the vision part pictures count as they do for a model without a vision tower.
    Calls from several threads are fine.

    Args:
        folder: what `sail export` wrote.
        threads: of one operation; all cores by default.
        verify: hash all files, also the weights beyond 64 MiB, which are else told by their size and places spread
            over them (see `checked_files`).

    Raises:
        ValueError: the folder holds no export, or one that is not whole. ImportError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, threads: int | None = None, verify: bool = False) -> None:
        self.folder = Path(folder)
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} cannot be; give 1 or more, or None for all cores.")
        self.manifest = read_manifest(self.folder)
        try:
            check_files(self.folder, self.manifest["files"], verify)
        except ValueError as error:
            raise ValueError(f"{error}; copy or export the folder again.") from error
        self.processor = SailEmbeddingProcessor.from_pretrained(self.folder / "processor")
        # The first call takes the truncation and padding off that a tokenizer may be saved with. If another thread
        # read text at that moment, tokenizers before 0.23 would raise "Already borrowed".
        self.processor.tokenizer("")
        self.config: dict[str, Any] = self.manifest["config"]
        names = [
            name for name in self.manifest["graphs"] if not (name == "text" and "fusion" in self.manifest["graphs"])
        ]
        if not {"text", "fusion"} & set(names):
            raise ValueError(f"{folder} has neither the part text nor fusion, so it cannot embed; export one of them.")
        self._sessions = {name: open_session(self.folder / f"{name}.onnx", threads) for name in names}

    def encode(self, items: Sequence[Any], **options: Any) -> np.ndarray:
        """(N, D) float32, L2-normalised, one row an item; NaN in the rows of bad items with ``errors="skip"``.

        Args:
            items: dicts, strings or PIL images in any mix. All of them are decoded before the first is embedded: give
                some hundreds at a time.
            options: as `encode_with_statuses` takes them.
        """
        return self.encode_with_statuses(items, **options)[0]

    def encode_with_statuses(
        self,
        items: Sequence[Any],
        task: str | None = None,
        side: str = "query",
        errors: str = "raise",
        *,
        instruction: str | None = None,
        dim: int | None = None,
        token_budget: int | None = None,
        allow_urls: bool = False,
        use_video_audio: bool = True,
    ) -> tuple[np.ndarray, list[ItemStatus]]:
        """As `encode`, and an `ItemStatus` for every item.

        Args:
            items: as for `encode`.
            task, side, errors, instruction, allow_urls, use_video_audio: as the processor takes them.
            dim: keep this many leading dimensions, normalised again.
            token_budget: padded tokens of one pass.

        Raises:
            ItemsError: bad items, with errors="raise". ValueError: a bad option. TypeError: one item, not a list.
        """
        width = self.config["hidden_size"]
        if dim is not None and not 1 <= dim <= width:
            raise ValueError(f"dim={dim} cannot be; embeddings have {width} dimensions.")
        told = self.processor.instruction_for(task, side, instruction)
        loaded, statuses = self.processor.load(items, errors, allow_urls, use_video_audio, told)
        vectors = np.full((len(statuses), width), np.nan, np.float32)
        for places, batch in self.processor.batches(loaded, told, token_budget):
            vectors[[loaded[place].index for place in places]] = self._embed(batch)
        vectors = vectors[:, :dim]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12), statuses

    def _embed(self, batch: Any) -> np.ndarray:
        """(B, D), not normalised."""
        arrays = {name: value.numpy() for name, value in batch.items()}
        if "text" in self._sessions:
            given = {name: arrays[name] for name in self.manifest["graphs"]["text"]["inputs"]}
            return self._run("text", **given)
        media = self._media(arrays)
        ids, segments = arrays["input_ids"], arrays["modality_ids"]
        return self._run("fusion", input_ids=ids, modality_ids=segments, media_tokens=media)

    def _media(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """(P, D) tokens of pictures and sounds in the order of their placeholders, row by row."""
        flat = arrays["modality_ids"].ravel()
        media = np.zeros((len(flat), self.config["hidden_size"]), np.float32)
        if "pixel_values" in arrays:
            media[flat == VISION] = self._visual_tokens(arrays).reshape(-1, media.shape[1])
        if "input_features" in arrays:
            media[flat == AUDIO] = self._audio_tokens(arrays)
        return media[(flat == VISION) | (flat == AUDIO)]

    def _visual_tokens(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        positions, owner = arrays["frame_positions"], arrays["image_owner"]
        most = int(positions.max()) + 1
        if most > self.config["max_frames"]:
            limit = self.config["max_frames"]
            raise ValueError(f"An item has {most} pictures and frames; max_frames={limit}. Sample fewer.")
        if self.config["latents_per_frame"]:  # every frame is a group of its own
            owner = np.arange(len(owner))
        features, present = pad_groups(self._tower("vision", pixel_values=arrays["pixel_values"]), owner)
        places, _ = pad_groups(positions, owner)
        return self._run("visual_tokens", image_features=features, frame_positions=places, present=present)

    def _audio_tokens(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        heard = self._tower("audio", input_features=arrays["input_features"])
        features, present = pad_groups(heard, arrays["audio_owner"])
        return self._run("audio_tokens", audio_features=features, present=present)

    def _tower(self, name: str, **values: np.ndarray) -> np.ndarray:
        ((field, array),) = values.items()
        starts = range(0, len(array), TOWER_BATCH)
        return np.concatenate([self._run(name, **{field: array[start : start + TOWER_BATCH]}) for start in starts])

    def _run(self, name: str, **inputs: np.ndarray) -> np.ndarray:
        return self._sessions[name].run(None, inputs)[0]


def pad_groups(values: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay the entries of each owner side by side, padded with zeros to the owner that has most.

    Args:
        values: (N, ...).
        owner: (N,), rising; owners may be missing.

    Returns:
        (G, F, ...) values of G owners, and (G, F) booleans, True where a value is real.
    """
    _, counts = np.unique(owner, return_counts=True)
    present = np.arange(counts.max()) < counts[:, None]
    padded = np.zeros((*present.shape, *values.shape[1:]), values.dtype)
    padded[present] = values
    return padded, present


def open_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        ImportError: onnxruntime is not installed. ValueError: onnxruntime cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(NEEDED) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # what it warns of is not in a reader's hands
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class but this one
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"onnxruntime {onnxruntime.__version__} cannot read {path}: {reason}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `sail export` wrote about a folder.

    Raises:
        ValueError: there is no manifest, or it is broken.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        read = {name: dict(manifest[name]) for name in ("files", "graphs", "config")}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder} holds no {MANIFEST}; export a model: sail export MODEL --out {folder}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}); export the model again.") from error
    return manifest | read
