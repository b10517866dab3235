"""The recipe of `mini`: a warm start for the connectors, then the stages of ``recipes/mini.yaml``, then what ships.

    python -m modeling_sail.training.mini --work runs/mini

The sources are in data/mini_pairs.py. Unusual: towers run once, into a cache; and the connectors first learn in
embedding space (warm_start.py), where a step is a small matrix product.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from .build import WEIGHTS, assemble, weights_hash
from .data.mini_pairs import SOURCES, Source, load_sources, said_name, save_teacher
from .feature_cache import FeatureCache, cache_media
from .recipe import load_recipe
from .rows import TrainingDataset
from .stages import run_recipe, save_whole
from .towers import imagenet_class_names, load_lite0_classifier
from .warm_start import into_tokens, text_encoder, warm_audio, warm_vision

logger = logging.getLogger(__name__)

_TRAINING_ONLY = {"temperatures.log"}  # of these sources; another training brings its own


def cache_features(
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    work: Path,
    sources: dict[str, list[dict[str, Any]]] | None = None,
) -> tuple[FeatureCache, FeatureCache]:
    """Tower features of every picture and sound of the sources, by default `load_sources`, test and validation too."""
    rows = [row for part in (sources or load_sources()).values() for row in part]
    return cache_media(model, processor, [TrainingDataset("mini", Source([None], rows))], work)


# --- warm start ---------------------------------------------------------------------------------------------------


def warm_up(
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    sources: dict[str, list[dict[str, Any]]],
    images: FeatureCache,
    sounds: FeatureCache,
    teacher: dict[str, Tensor],
) -> None:
    """Bring the connectors from noise to useful tokens (warm_start.py), on the rows of the sources."""
    encode = text_encoder(model, processor)
    rows = [row for name in (*["tuxpaint"] * 6, "openclipart", "emoji") for row in sources[name]]
    rows = [row for row in rows if row["image"] in images]
    named = [_texts_of(row) for row in rows]
    pictures = torch.stack([images[row["image"]][0].float().mean(dim=0) for row in rows])
    captions = torch.stack([teacher[row["image"]] for row in rows]), encode(imagenet_class_names())
    warm_vision(model.perceiver.shortcut, pictures, named, encode, captions, load_lite0_classifier())
    clips = [
        (path, [said_name(row, language)] * 2 + [row["names"]["en"]], row["image"])
        for name in ("tuxpaint", "emoji")
        for row in sources[name]
        for language, path in row["speech"].items()
        if path in sounds
    ]
    windows = torch.stack([sounds[path][0] for path, _, _ in clips])
    said = [texts for _, texts, _ in clips]
    warm_audio(model.audio_adapter, windows, said, encode)
    place = {row["image"]: index for index, row in enumerate(rows)}
    pairs = torch.tensor([(place[picture], index) for index, (_, _, picture) in enumerate(clips) if picture in place])
    known = sorted({text for part in (*named, *said) for text in part} | set(imagenet_class_names()))
    into_tokens(model, processor, pictures, windows, pairs, known, encode)


def _texts_of(row: dict[str, Any]) -> list[str]:
    """What a picture may be called; a title or name more often than a tag."""
    if "title" in row:
        return [row["title"]] * 2 + row["tags"][:6]
    return [row["names"]["en"]] * 3 + row.get("tags", [])[:6]


# --- the whole of it --------------------------------------------------------------------------------------------------


def export(model: SailEmbeddingModel, base: SailEmbeddingModel, out: Path, notes: dict[str, Any]) -> None:
    """Write what training changed, in float16, and a manifest with every hash (read by `build.apply_trained`)."""
    before = base.state_dict()
    towers = ("text_tower.", "vision_tower.", "audio_tower.")
    changed = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in _TRAINING_ONLY and (not name.startswith(towers) or not torch.equal(tensor, before[name]))
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(changed, out / "trained.safetensors")
    manifest = {
        "sha256": hashlib.sha256((out / "trained.safetensors").read_bytes()).hexdigest(),
        "towers": {name[:-1]: weights_hash(getattr(base, name[:-1])) for name in towers},
        **notes,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe: stages.joint.steps=100")
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="caches, stages, logs")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "mini", help="where the trained tensors go")
    parser.add_argument("--recipe", default="mini", help="a recipe whose stages train the warm model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-only", action="store_true", help="fill the feature cache and stop")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    begun, warm = time.time(), args.work / "warm"
    model, processor = assemble("mini")
    images, sounds = cache_features(model, processor, args.work)
    teacher = save_teacher(images)
    if args.cache_only:
        return
    if not (warm / "config.json").is_file():
        random.seed(args.seed)
        unfreeze_top(model)
        warm_up(model.eval(), processor, load_sources(), images, sounds, teacher)
        save_whole(model, processor, warm)
    places = [f"model={warm}", f"output={args.work / 'stages'}", f"defaults.feature_cache={args.work}"]
    recipe = load_recipe(args.recipe, [*places, f"seed={args.seed}", *args.overrides])
    trained = SailEmbeddingModel.from_pretrained(run_recipe(recipe))
    notes = {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "seed": args.seed,
        "seconds": round(time.time() - begun),
        "rows": {name: len(SOURCES[spec.path.partition(":")[2]]()) for name, spec in recipe.datasets.items()},
        "torch": torch.__version__,
    }
    export(trained, assemble("mini")[0], args.out, notes)
    logs = {name: json.loads((args.work / "stages" / name / "log.json").read_text()) for name in recipe.stages}
    (args.out / "log.json").write_text(json.dumps(logs) + "\n", encoding="utf-8")


def unfreeze_top(model: SailEmbeddingModel, layers: int = 2) -> None:
    """Let the backbone's last layers train in the warm start, as they do in the recipe; all else is its own matter."""
    model.requires_grad_(False)
    encoder: Any = model.text_tower.encoder
    for layer in encoder.layer[len(encoder.layer) - layers :]:
        layer.requires_grad_(True)
    for part in (model.perceiver, model.audio_adapter):
        part.requires_grad_(True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
