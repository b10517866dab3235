"""What a model's configuration says in words: summary, tags, names of parts, examples, limits; no number is among them.

Room: Model -> **Card**. Unusual: nothing here is a fixed sentence about "the" model: what has no tower is not promised,
shown in an example, or tagged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint

PARTS = {
    "text_tower": "fusion backbone",
    "vision_tower": "vision tower",
    "audio_tower": "audio tower",
    "perceiver": "Visual Perceiver, from the picture's tokens to a few",
    "audio_adapter": "from the sound's features to a token",
    "late_fusion_gate": "gate between what is seen and the whole (§3.2)",
    "temperatures": "of the training datasets",
    "all": "all",
}
# By the towers beside the text's: what goes into a vector, and what is left out.
KINDS = {
    ("vision", "audio"): "An omni-modal item embedding: text, pictures, video and sound in one vector.",
    ("vision",): "An item embedding: text, pictures and video in one vector. It has no audio tower.",
    ("audio",): "An item embedding: text and sound in one vector. It has no vision tower.",
    (): "A text embedding: the text fields of an item in one vector. It has neither a vision nor an audio tower.",
}
FIELDS = {
    ("vision", "audio"): "any of text fields, pictures, a video and a sound",
    ("vision",): "any of text fields, pictures and a video",
    ("audio",): "any of text fields and a sound",
    (): "text fields",
}
DUAL = (
    "It is a dual tower: no backbone reads several modalities at once; each is encoded by itself, and the embedding is "
    "the mean of their normalised embeddings."
)
UNTRAINED = (
    "**Untrained**: its weights are as they were drawn at random. It serves to test code; its vectors say nothing of "
    "an item."
)
PARTLY = "**Not trained yet**: the weights of {} are as they were drawn at random; what goes through them says little."


def modalities(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of vision and audio a configuration has a tower for."""
    return tuple(name for name in ("vision", "audio") if config.get(f"{name}_config") is not None)


def is_dual(config: Mapping[str, Any]) -> bool:
    """Whether several modalities never meet in the backbone."""
    return config.get("fusion") == "separate" and bool(modalities(config))


def part_name(part: str, config: Mapping[str, Any]) -> str:
    """What a part is; a backbone that reads text alone fuses nothing."""
    if part == "text_tower" and (is_dual(config) or not modalities(config)):
        return "text tower"
    return PARTS.get(part, "")


def summary(checkpoint: Checkpoint) -> str:
    """What the model is; and whether it was trained, where nobody trained it."""
    said = [KINDS[modalities(checkpoint.config)], *([DUAL] if is_dual(checkpoint.config) else [])]
    new = checkpoint.new_parts
    if new and set(new) >= {part for part in checkpoint.parameters if part.endswith("_tower")}:
        said.append(UNTRAINED)
    elif new:
        said.append(PARTLY.format(", ".join(f"`{part}`" for part in new)))
    return " ".join(said)


def limits(config: Mapping[str, Any]) -> list[str]:
    """What no model of this form can do."""
    has = modalities(config)
    media = {"vision": "a picture", "audio": "a sound"}
    never = f"; never {' or '.join(media[name] for name in has)}" if has else ""
    said = [f"An item that is longer than the model's sequence loses text, from `asr` first{never}."]
    if "vision" not in has:
        said.append("Pictures and the frames of videos are not looked at; an item of nothing else is refused.")
    if "audio" not in has:
        said.append("Sound is not listened to; an item of nothing else is refused.")
    return said


def tags(config: Mapping[str, Any]) -> list[str]:
    """The Hub's tags."""
    kinds = {"vision": ["image", "video"], "audio": ["audio"]}
    found = [tag for name in modalities(config) for tag in kinds[name]]
    first = ["sentence-transformers", "transformers", "sail-embedding"]
    return [*first, *(["multimodal", *found] if found else []), "text", "mteb"]


def pipeline(config: Mapping[str, Any]) -> str:
    """The Hub's task: it has none for vectors of several modalities but the general one."""
    return "feature-extraction" if modalities(config) else "sentence-similarity"


def examples(config: Mapping[str, Any], model_id: str, name: str) -> dict[str, str]:
    """The template's places inside its examples; strings are quoted as Python reads them."""
    has = modalities(config)
    picture = ', "image": Image.new("RGB", (224, 224), "red")' if "vision" in has else ""
    sound = '{"audio": (np.zeros(16_000, dtype=np.float32), 16_000)},  # samples and their rate; or a path'
    items = [f'{{"title": "A red kangaroo", "tags": ["animal"]{picture}}},', *([sound] if "audio" in has else [])]
    imports = {"audio": "import numpy as np\n", "vision": "from PIL import Image\n"}
    return {
        "fields": FIELDS[has],
        "missing": "mean" if is_dual(config) else "sequence",
        "media_imports": "".join(line for key, line in imports.items() if key in has),
        "picture_import": imports["vision"] if "vision" in has else "",
        "items": "\n".join(f"        {line}" for line in [*items, '"a bare string is a text",']),
        "cat": f'{{"title": "a cat"{picture}}}',
        "task": "TuxPaintNameToItem" if has else "MovieLensCoConsumption",
        "model_id": _quoted(model_id),
        "name": _quoted(name),
    }


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
