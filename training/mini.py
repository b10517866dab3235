"""The recipe of `mini`: train the connectors between frozen towers, in-batch NCE, on a laptop.

    python -m modeling_sail.training.mini --work runs/mini

Pictures and names of Tux Paint, openclipart, emoji; Tux Paint's recorded speech, and emoji names spoken by espeak-ng.
Unusual: towers run once, into a cache; and EfficientNet's own classifier is a teacher: its class names, drawn by its
probabilities, caption pictures. No held-out Tux Paint name is seen: rows of any source that carry one are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from .build import WEIGHTS, assemble, weights_hash
from .data.emoji import load_emoji
from .data.openclipart import load_openclipart
from .data.tuxpaint import load_tuxpaint, name_key, split_by_name
from .feature_cache import FeatureCache, tower_features
from .pairs import CachedCollator, Item, PairBatches, PairDataset, Row
from .towers import imagenet_class_names, load_lite0_classifier
from .trainer import ContrastiveTrainer
from .warm_start import into_tokens, text_encoder, warm_audio, warm_vision

logger = logging.getLogger(__name__)

SPOKEN = ("fr", "es", "en")  # languages that espeak-ng speaks emoji names in
READABLE = ("en", "fr", "es", "ca", "ro", "pt", "it", "de", "nl", "da")  # names that an English tokenizer can spell
TASKS = (None, "cls", "q2i")


# --- sources --------------------------------------------------------------------------------------------------------


def load_sources(work: Path, limit: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Every training row of the three sources, without the held-out names; "test" and "validation" are Tux Paint's."""
    parts = split_by_name(load_tuxpaint())
    held_out = {name_key(row["names"]["en"]) for part in ("test", "validation") for row in parts[part]}
    openclipart = [row for row in load_openclipart() if name_key(row["title"]) not in held_out]
    emoji = [row for row in load_emoji() if name_key(row["names"]["en"]) not in held_out]
    for row in emoji:
        row["speech"] = speak(row, work / "speech")
    rows = {"tuxpaint": parts["train"], "openclipart": few_per_title(openclipart), "emoji": emoji}
    rows = {name: part[:limit] for name, part in rows.items()}
    return rows | {"test": parts["test"], "validation": parts["validation"]}


def few_per_title(rows: list[dict[str, Any]], most: int = 3) -> list[dict[str, Any]]:
    """At most ``most`` rows of each title: openclipart has titles with a hundred near-copies."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        key = name_key(row["title"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= most:
            kept.append(row)
    return kept


def speak(row: dict[str, Any], folder: Path) -> dict[str, str]:
    """``{language: path}`` of one of the row's names, spoken by espeak-ng; made once, then found.

    The language is drawn by the row's id: one clip a row costs a third of the tower's time, and every name is heard.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError(
            "espeak-ng is not installed; `apt-get install espeak-ng`, it speaks part of the training data."
        )
    folder.mkdir(parents=True, exist_ok=True)
    language = random.Random(row["id"]).choice([language for language in SPOKEN if row["names"].get(language)])
    text = row["names"][language]
    path = folder / f"{language}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.wav"
    if not path.exists():
        partial = path.with_suffix(".partial")
        voice = random.Random(text).choice(["", "+f2", "+m3", "+f4", "+m7"])
        subprocess.run([program, "-v", language + voice, "-w", str(partial), text], check=True, capture_output=True)
        partial.replace(path)
    return {language: str(path)}


def cache_features(
    model: SailEmbeddingModel, processor: SailEmbeddingProcessor, sources: dict[str, list[dict[str, Any]]], work: Path
) -> tuple[FeatureCache, FeatureCache]:
    """Tower features of every picture and sound of the sources; resumes where it was stopped."""
    images, sounds = FeatureCache(work / "images"), FeatureCache(work / "sounds")
    rows = [row for part in sources.values() for row in part]
    model.vision_tower.to(memory_format=torch.channels_last)
    images.add([row["image"] for row in rows], tower_features(model, processor, "image"), "pictures")
    spoken = [path for row in rows for path in row.get("speech", {}).values()]
    sounds.add(spoken, tower_features(model, processor, "audio"), "sounds")
    return images, sounds


# --- datasets -------------------------------------------------------------------------------------------------------


def mini_datasets(
    sources: dict[str, list[dict[str, Any]]], images: FeatureCache, sounds: FeatureCache, teacher: dict[str, Tensor]
) -> list[PairDataset]:
    """What a step of `mini` may be drawn from."""
    rows = {name: [row for row in part if row["image"] in images] for name, part in sources.items()}
    for row in (row for part in rows.values() for row in part):
        row["speech"] = {language: path for language, path in row.get("speech", {}).items() if path in sounds}
    spoken = [row for row in rows["tuxpaint"] if row["speech"]], [row for row in rows["emoji"] if row["speech"]]
    pictures = [row for name in ("tuxpaint", "openclipart", "emoji") for row in rows[name]]
    words = imagenet_class_names()
    return [
        PairDataset("openclipart", [_titled(row) for row in rows["openclipart"]], 5, TASKS),
        PairDataset("emoji", [_named(row) for row in rows["emoji"]], 2, TASKS),
        PairDataset("tuxpaint", [_named(row) for row in rows["tuxpaint"]], 2, TASKS),
        PairDataset(
            "teacher", [_captioned(row, teacher, words) for row in pictures if row["image"] in teacher], 4, TASKS
        ),
        PairDataset("tuxpaint-speech", _spoken(spoken[0]), 3, TASKS),
        PairDataset("emoji-speech", _spoken(spoken[1]), 3, TASKS),
        PairDataset("both", [_both(row) for part in spoken for row in part], 3, TASKS),
        PairDataset("cross", [_cross(row) for part in spoken for row in part], 2, (None, "i2i")),
    ]


def _titled(row: dict[str, Any]) -> Row:
    def make(generator: random.Random) -> tuple[Item, Item, str]:
        text = row["title"]
        if row["tags"] and generator.random() < 0.4:
            tags = generator.sample(row["tags"], min(len(row["tags"]), generator.randint(1, 4)))
            text = ", ".join(tags if generator.random() < 0.4 else [row["title"], *tags])
        return {"image": row["image"]}, {"text": text}, name_key(text)

    return make


def _named(row: dict[str, Any]) -> Row:
    def make(generator: random.Random) -> tuple[Item, Item, str]:
        readable = [language for language in READABLE if row["names"].get(language)]
        language = "en" if generator.random() < 0.7 else generator.choice(readable)
        return {"image": row["image"]}, {"text": row["names"][language]}, name_key(row["names"]["en"])

    return make


def _captioned(row: dict[str, Any], teacher: dict[str, Tensor], words: list[str]) -> Row:
    def make(generator: random.Random) -> tuple[Item, Item, str]:
        word = words[generator.choices(range(len(words)), teacher[row["image"]].tolist())[0]]
        return {"image": row["image"]}, {"text": word}, word

    return make


def said_name(row: dict[str, Any], language: str) -> str:
    """The name as it is spoken, where the tokenizer can spell the language; else the English name."""
    return row["names"].get(language, row["names"]["en"]) if language in READABLE else row["names"]["en"]


def _spoken(rows: Iterable[dict[str, Any]]) -> list[Row]:
    def row_of(row: dict[str, Any], language: str, path: str) -> Row:
        def make(generator: random.Random) -> tuple[Item, Item, str]:
            text = said_name(row, language) if generator.random() < 0.7 else row["names"]["en"]
            return {"audio": path}, {"text": text}, name_key(row["names"]["en"])

        return make

    return [row_of(row, language, path) for row in rows for language, path in row["speech"].items()]


def _both(row: dict[str, Any]) -> Row:
    def make(generator: random.Random) -> tuple[Item, Item, str]:
        language, english = generator.choice(sorted(row["speech"])), row["names"]["en"]
        said = said_name(row, language)
        text = generator.choice([english, said, f"{english} {said}"])
        return {"image": row["image"], "audio": row["speech"][language]}, {"text": text}, name_key(english)

    return make


def _cross(row: dict[str, Any]) -> Row:
    def make(generator: random.Random) -> tuple[Item, Item, str]:
        path = row["speech"][generator.choice(sorted(row["speech"]))]
        return {"image": row["image"]}, {"audio": path}, name_key(row["names"]["en"])

    return make


@torch.inference_mode()
def teacher_probabilities(images: FeatureCache, paths: Iterable[str], temperature: float = 0.7) -> dict[str, Tensor]:
    """(1000,) class probabilities of each picture by EfficientNet-lite0's own classifier, from the cached features."""
    weight, bias = load_lite0_classifier()
    features = {path: images[path][0].float().mean(dim=0) for path in paths if path in images}
    return {path: ((weight @ mean + bias) / temperature).softmax(dim=0) for path, mean in features.items()}


# --- warm start ---------------------------------------------------------------------------------------------------


def warm_up(
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    sources: dict[str, list[dict[str, Any]]],
    images: FeatureCache,
    sounds: FeatureCache,
    teacher: dict[str, Tensor],
) -> None:
    """Bring the connectors from noise to useful tokens (warm_start.py), on the rows that `mini_datasets` trains on."""
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


# --- training -------------------------------------------------------------------------------------------------------


def trainable(model: SailEmbeddingModel, text_layers: int) -> list[dict[str, Any]]:
    """Freeze the towers but the backbone's last layers; the parameter groups and learning rates of what is left."""
    model.requires_grad_(False)
    new = [model.perceiver, model.audio_adapter, model.temperatures]
    fitted = [module for name, module in model.perceiver.shortcut.named_children() if name != "decoder"]
    top = list(model.text_tower.encoder.layer[len(model.text_tower.encoder.layer) - text_layers :])
    for module in (*new, *top):
        module.requires_grad_(True)
    for module in fitted:  # by the warm start; a few hundred names would only be learned by heart
        module.requires_grad_(False)
    groups = [{"params": [p for p in module.parameters() if p.requires_grad], "lr": 1e-4} for module in new]
    return groups + [{"params": list(layer.parameters()), "lr": 2e-5} for layer in top]


def train(
    model: SailEmbeddingModel, batches: PairBatches, groups: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    """Run the Trainer; a checkpoint every tenth of the run, and resume from the last one."""
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    arguments = TrainingArguments(
        output_dir=str(args.work / "checkpoints"),
        max_steps=args.steps,
        logging_steps=max(1, args.steps // 100),
        save_steps=max(1, args.steps // 10),
        save_total_limit=1,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        report_to=[],
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = ContrastiveTrainer(model, arguments, train_dataset=batches, optimizers=(optimizer, schedule))
    last = sorted((args.work / "checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if last:
        batches.start = int(last[-1].name.split("-")[1])
        arguments.ignore_data_skip = True
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    (args.work / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")


def export(model: SailEmbeddingModel, base: SailEmbeddingModel, out: Path, notes: dict[str, Any]) -> None:
    """Write what training changed, in float16, and a manifest with every hash (read by `build.apply_trained`)."""
    before = base.state_dict()
    towers = ("text_tower.", "vision_tower.", "audio_tower.")
    changed = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(towers) or not torch.equal(tensor, before[name])
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
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="caches, checkpoints, log")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "mini", help="where the trained tensors go")
    parser.add_argument("--steps", type=int, default=400, help="of joint training, after the warm start")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--text-layers", type=int, default=2, help="last layers of the backbone that train too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="rows of each source, for a trial")
    parser.add_argument("--cache-only", action="store_true", help="fill the feature cache and stop")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    begun = time.time()
    model, processor = assemble("mini")
    sources = load_sources(args.work, args.limit)
    images, sounds = cache_features(model, processor, sources, args.work)
    if args.cache_only:
        return
    base = assemble("mini")[0]
    pictures = [row["image"] for name in ("tuxpaint", "openclipart", "emoji") for row in sources[name]]
    teacher = teacher_probabilities(images, pictures)
    datasets = mini_datasets(sources, images, sounds, teacher)
    collate = CachedCollator(processor, images, sounds)
    batches = PairBatches(datasets, collate, args.batch_size, args.seed)
    model.vision_tower = model.audio_tower = None  # the cache stands for them, and checkpoints stay small
    groups = trainable(model, args.text_layers)
    warm = args.work / "warm.safetensors"
    if not warm.exists():
        random.seed(args.seed)
        warm_up(model.eval(), processor, sources, images, sounds, teacher)
        save_file(model.state_dict(), warm.with_suffix(".partial"))
        warm.with_suffix(".partial").replace(warm)
    model.load_state_dict(load_file(warm))
    train(model, batches, groups, args)
    model.vision_tower, model.audio_tower = base.vision_tower, base.audio_tower
    notes = {
        "recipe": {name: value for name, value in vars(args).items() if name in ("steps", "batch_size", "text_layers")},
        "seed": args.seed,
        "seconds": round(time.time() - begun),
        "rows": {dataset.name: len(dataset.rows) for dataset in datasets},
        "torch": torch.__version__,
    }
    export(model, base, args.out, notes)
    shutil.copy(args.work / "log.json", args.out / "log.json")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
