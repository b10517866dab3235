"""`sail export`: a model's parts as ONNX files that onnxruntime serves on a CPU; never uploaded.

Unusual: every graph is run by onnxruntime on inputs of several sizes before it counts, and the export fails where it is
not the model; all graphs keep their weights in one file, each tensor once, so that text and fusion share the backbone
and no file meets protobuf's limit of 2 GB. The folder is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from .checked_files import describe_files
from .encode_job import load_module
from .fingerprints import model_hash
from .onnx_parts import PARTS, Graph, graphs_of
from .onnx_runtime import MANIFEST, OnnxSail, open_session, read_manifest
from .whole_folder import refuse_other_things, whole_folder

OPSET = 18  # the lowest that the exporter writes, so that old runtimes can read it
NEWEST_OPSET = 22  # at 23 the exporter writes a RotaryEmbedding that onnxruntime 1.31 refuses in batches
TOLERANCE = 1e-4  # of the vectors of whole items, in float32
# Of a graph's output; of values beyond 1, in parts of the largest. A deep tower's float32 is 6e-5 from its float64.
GRAPH_TOLERANCE = 5e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
WEIGHTS = "weights.data"
ALIGNMENT = 4096  # bytes: onnxruntime maps tensors that begin on a page
INLINE = 1024  # bytes: shorter tensors stay in the graph, where shapes are told from them


class NotTheModelError(RuntimeError):
    """onnxruntime computes something else than the model."""

    def __init__(self, said: str) -> None:
        super().__init__(
            f"{said}; {GRAPH_TOLERANCE:.0e} is allowed, so nothing was written. A little beyond may be rounding of a "
            "deep tower; much beyond is a fault: try another --opset or version of torch."
        )


def export_onnx(
    folder: str | Path,
    out: str | Path,
    parts: Sequence[str] | None = None,
    opset: int = OPSET,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write ``<graph>.onnx``, the weights, the processor and ``onnx_manifest.json``.

    Args:
        folder: of a model, as `sail build` or ``save_pretrained`` wrote it.
        out: folder to write; an export that is there already is replaced.
        parts: any of `PARTS`; by default all that the model has.
        opset: of the ONNX operators, 18 to 22.
        say: takes one line for each part.

    Returns:
        The manifest. ``not_exported`` holds the parts that could not be exported, with the reason.

    Raises:
        ValueError: an unknown part, a tower that the model lacks, a bad opset, no model, something else in ``out``,
            another process that writes it.
        ImportError: a package is not installed. RuntimeError: nothing could be exported, or a graph is not the model.
    """
    folder, out = Path(folder), Path(out)
    _check(parts, opset)
    with whole_folder(out) as partial:
        refuse_other_things(out, _replaceable(out), "export")
        module = load_module(folder)
        # Not the model's own `float`: it refuses where the configuration says that a tower once was quantised.
        torch.nn.Module.float(module.model)
        wanted = _present(module.model, parts)
        with torch.no_grad(), _quiet():
            manifest = _write(module, folder, partial, wanted, opset, say)
    return manifest


# --- what is asked for ----------------------------------------------------------------------------------------------


def _check(parts: Sequence[str] | None, opset: int) -> None:
    if unknown := [part for part in parts or () if part not in PARTS]:
        raise ValueError(f"there is no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    if not OPSET <= opset <= NEWEST_OPSET:
        raise ValueError(f"opset {opset} cannot be written; take one from {OPSET} to {NEWEST_OPSET}")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} not installed; pip install 'sail-embedding[onnx]'")


def _replaceable(out: Path) -> set[str]:
    """Files of an older export, if there is one."""
    try:
        return {MANIFEST, *read_manifest(out)["files"]}
    except ValueError:
        return set()


def _present(model: Any, parts: Sequence[str] | None) -> list[str]:
    """The parts to export, in the order of `PARTS`."""
    lacking = [name for name in ("vision", "audio") if getattr(model, f"{name}_tower") is None]
    if impossible := [part for part in parts or () if part in lacking]:
        raise ValueError(f"the model has no {' and no '.join(impossible)} tower; leave the part out")
    return [part for part in PARTS if part in (parts or PARTS) and part not in lacking]


# --- writing --------------------------------------------------------------------------------------------------------


def _write(
    module: Any, folder: Path, partial: Path, wanted: list[str], opset: int, say: Callable[[str], None]
) -> dict[str, Any]:
    manifest = _about(module.model, folder, opset)
    with (partial / WEIGHTS).open("wb") as file:
        weights = Weights(file)
        for part in wanted:
            started = time.perf_counter()
            try:
                graphs = _exported(graphs_of(part, module.model, module.processor), weights, partial, opset)
            except NotTheModelError:
                raise
            except Exception as error:  # exporter and runtime raise whatever a tower's code leads them to
                manifest["not_exported"][part] = _reason(error)
                say(f"{part}: cannot be exported: {_reason(error)}")
                continue
            manifest["parts"][part] = list(graphs)
            manifest["graphs"] |= graphs
            say(_line(part, graphs, time.perf_counter() - started))
    if not manifest["parts"]:
        raise RuntimeError("no part could be exported: " + "; ".join(manifest["not_exported"].values()))
    module.processor.modalities = _modalities(module.processor.modalities, manifest["parts"])
    module.processor.save_pretrained(partial / "processor")
    manifest["files"] = describe_files(partial)
    _write_manifest(partial, manifest)
    if {"text", "fusion"} & set(manifest["parts"]):
        manifest["encode"] = _compared_whole(module, partial)
        _write_manifest(partial, manifest)
    return manifest


def _exported(graphs: Iterable[Graph], weights: Weights, folder: Path, opset: int) -> dict[str, Any]:
    """Trace, write and compare the graphs of a part: all of them, or no file of them."""
    written: list[Path] = []
    about = {}
    try:
        for graph in graphs:
            written.append(folder / f"{graph.name}.onnx")
            weights.save(_traced(graph, opset), written[-1])
            about[graph.name] = _compared(graph, written[-1])
    except Exception:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return about


class Weights:
    """One file for the tensors of several graphs, each kept once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.places: dict[bytes, tuple[int, int]] = {}

    def save(self, program: Any, path: Path) -> None:
        """Write a traced program's graph, its tensors in this file. What says where the code lay is left out."""
        import onnx_ir

        for value in program.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes < INLINE:
                continue
            offset, length = self._place(tensor.tobytes())
            about = {"shape": tensor.shape, "name": value.name, "base_dir": path.parent}
            value.const_value = onnx_ir.ExternalTensor(WEIGHTS, offset, length, tensor.dtype, **about)
        self.file.flush()
        for scope in (program.graph, *program.functions.values()):
            scope.metadata_props.clear()
            for node in onnx_ir.traversal.RecursiveGraphIterator(scope):
                node.metadata_props.clear()
                node.doc_string = None
        onnx_ir.save(program, path)

    def _place(self, content: bytes) -> tuple[int, int]:
        key = hashlib.sha256(content).digest()
        if key not in self.places:
            self.file.seek(-(-self.file.tell() // ALIGNMENT) * ALIGNMENT)
            self.places[key] = (self.file.tell(), len(content))
            self.file.write(content)
        return self.places[key]


def _traced(graph: Graph, opset: int) -> Any:
    """The graph as onnx_ir's model; sizes that vary keep their names."""
    from torch.export import Dim

    names = {name for axes in graph.inputs.values() for name in axes.values()}
    dims = {name: Dim(name) for name in names}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in graph.inputs.values())
    program = torch.onnx.export(
        graph.module.eval(),
        graph.probes[0],
        input_names=list(graph.inputs),
        output_names=[graph.output],
        dynamic_shapes=shapes,
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    if opset not in program.model.opset_imports.values():
        raise RuntimeError(f"the exporter cannot write opset {opset} for this model; take {OPSET}")
    return program.model


# --- is it the model? -----------------------------------------------------------------------------------------------


def _compared(graph: Graph, path: Path) -> dict[str, Any]:
    """What the manifest says of a graph: its inputs, and how far onnxruntime is from the model on every probe."""
    session = open_session(path)
    differences, largest = [], 0.0
    for probe in graph.probes:
        given = {name: value.numpy() for name, value in zip(graph.inputs, probe, strict=True)}
        expected = graph.reference(*probe)
        differences.append(difference(session.run(None, given)[0], expected))
        largest = max(largest, float(expected.abs().max()))
    worst = float(np.max(differences))  # unlike max, it lets no NaN get lost
    if not worst <= GRAPH_TOLERANCE:
        raise NotTheModelError(f"{path.name} differs from the model by {worst:.1e}")
    return {
        "inputs": {value.name: [value.type, value.shape] for value in session.get_inputs()},
        "outputs": {value.name: [value.type, value.shape] for value in session.get_outputs()},
        "probes": [[list(value.shape) for value in probe] for probe in graph.probes],
        "largest_difference": worst,
        "largest_value": largest,
    }


def difference(found: np.ndarray, expected: Tensor) -> float:
    """Largest difference; of values beyond 1 in parts of the largest. Infinity where the shapes differ."""
    if found.shape != tuple(expected.shape):
        return float("inf")
    reference = expected.detach().numpy()
    return float(np.abs(found - reference).max() / max(1.0, np.abs(reference).max()))


def _compared_whole(module: Any, folder: Path) -> dict[str, Any]:
    """Items of every kind that the export reads, through onnxruntime and through the model."""
    items = _probe_items(module.processor)
    features = module.preprocess(items)
    expected = module(features)["sentence_embedding"]
    found = OnnxSail(folder).encode(items)
    worst = difference(found, expected)
    cosine = float((found * expected.numpy()).sum(axis=1).min())
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"vectors of whole items differ by {worst:.1e}, {TOLERANCE:.0e} is allowed; nothing was written"
        )
    return {"items": len(items), "largest_difference": worst, "smallest_cosine": cosine}


def _probe_items(processor: Any) -> list[dict[str, Any]]:
    """Ragged items of noise: 0 to 3 pictures, 0 to 2.5 windows of sound, some text or none."""
    random = np.random.default_rng(0)
    window, hz = processor.audio_window_seconds, processor.feature_extractor.sampling_rate
    fields: list[dict[str, Any]] = []
    for images, windows, words in (
        (0, 0, 3),
        (1, 0, 0),
        (0, 0.4, 0),
        (3, 2.5, 30),
        (2, 0, 9),
        (0, 1.0, 1),
        (1, 1.5, 0),
    ):
        item: dict[str, Any] = {"title": "a probe of words " * words} if words else {}
        if images and "vision" in processor.modalities:
            item["images"] = [Image.fromarray(random.integers(0, 255, (50, 70, 3), dtype=np.uint8))] * images
        if windows and "audio" in processor.modalities:
            item["audio"] = (random.normal(0, 0.1, int(windows * window * hz)).astype(np.float32), hz)
        fields.append(item)
    return [item for item in fields if item]


# --- what is said ---------------------------------------------------------------------------------------------------


def _about(model: Any, folder: Path, opset: int) -> dict[str, Any]:
    kept = ("hidden_size", "matryoshka_dims", "num_latents", "latents_per_frame", "max_frames", "fusion", "pool_prompt")
    return {
        "model": {
            "name": folder.resolve().name,
            "hash": model_hash(folder),
            "towers": {
                name: config.model_type
                for name in ("text", "vision", "audio")
                if (config := getattr(model.config, f"{name}_config")) is not None
            },
        },
        "config": {name: getattr(model.config, name) for name in kept},
        "dtype": "float32",
        "opset": opset,
        "tolerance": {"graphs": GRAPH_TOLERANCE, "vectors": TOLERANCE},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {name: version(name) for name in PACKAGES},
        "parts": {},
        "graphs": {},
        "not_exported": {},
    }


def _modalities(known: Sequence[str], parts: dict[str, list[str]]) -> list[str]:
    """What the exported processor reads: pictures and sound need their part, and text needs fusion."""
    if "text" in parts and "fusion" not in parts:
        return []
    return [name for name in known if name in parts]


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _line(part: str, graphs: dict[str, Any], seconds: float) -> str:
    worst = max(about["largest_difference"] for about in graphs.values())
    files = ", ".join(f"{name}.onnx" for name in graphs)
    return f"{part}: {files}; largest difference {worst:.1e}; {seconds:.0f} s"


def _reason(error: BaseException) -> str:
    """The first line of what the exporter met in the first place."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that nobody needs here, and of names of axes that it joins."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
