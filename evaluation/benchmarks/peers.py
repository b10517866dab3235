"""Other models of transformers at random weights, of their published sizes: what an item costs them.

Unusual: nothing is downloaded. Their tokenizers would be, so texts are ready ids of the items' length, and sound is
at the peer's rate already; both are in the peer's favour. Pictures and sounds go through the peer's own processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation
from transformers import (
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    CLIPConfig,
    CLIPModel,
    PretrainedConfig,
)

from ...training.towers import pil_image_processor
from .items import TOKENS
from .models import FIXED

CLIP_AND_CLAP = "CLIP ViT-B/32 + CLAP (HTSAT), batches of 32"
GEMMA = "EmbeddingGemma 2 (744M), one item a batch"


def clip_and_clap(clip: PretrainedConfig | None = None, clap: PretrainedConfig | None = None) -> Any:
    """A function of full items to (N, D) unit vectors: CLIP for picture and text, CLAP for sound, side by side.

    Args:
        clip, clap: other sizes, for tests; CLIP's default is ViT-B/32, CLAP's the HTSAT of laion/clap-htsat-unfused.
    """
    vision_and_text = CLIPModel(clip or CLIPConfig()).eval()
    audio = ClapAudioModelWithProjection(clap or ClapAudioConfig()).eval()
    size = vision_and_text.config.vision_config.image_size
    pictures = pil_image_processor(
        "CLIPImageProcessor", size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    sounds = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")  # as the checkpoint: 10 s, always
    ids = torch.randint(1000, (FIXED, TOKENS + 2)) % vision_and_text.config.text_config.vocab_size

    @torch.inference_mode()
    def run(items: list[dict[str, Any]]) -> Tensor:
        parts = []
        for start in range(0, len(items), FIXED):
            batch = items[start : start + FIXED]
            pixels = pictures([item["image"] for item in batch], return_tensors="pt")["pixel_values"]
            waves = [item["audio"][0] for item in batch]
            mel = sounds(waves, sampling_rate=sounds.sampling_rate, return_tensors="pt")["input_features"]
            seen = vision_and_text(input_ids=ids[: len(batch)], pixel_values=pixels)
            heard = audio(mel).audio_embeds
            parts.append(torch.cat([seen.image_embeds, seen.text_embeds, F.normalize(heard, dim=-1)], dim=1))
        return F.normalize(torch.cat(parts), dim=-1)

    return run


def at_rate(items: list[dict[str, Any]], hz: int = 48_000) -> list[dict[str, Any]]:
    """The items with their sounds at a peer's rate, by repeating samples: it is made before the clock starts."""
    return [
        {**item, "audio": (np.repeat(item["audio"][0], hz // item["audio"][1]), hz)} if "audio" in item else item
        for item in items
    ]


def embedding_gemma(dtype: torch.dtype, config: PretrainedConfig | None = None) -> Callable[[list[Any]], Tensor]:
    """A function of full items to (N, D) unit vectors, one by one, as sentence-transformers pools that model.

    Args:
        dtype: of its weights.
        config: another size, for tests.

    Raises:
        ValueError: this version of transformers does not have it.
    """
    if not hasattr(transformers, "EmbeddingGemma2Model"):
        raise ValueError(f"transformers {transformers.__version__} has no EmbeddingGemma 2; leave --slow-peers out.")
    config = config or gemma_config()
    model = transformers.EmbeddingGemma2Model(config).to(dtype).eval()
    pictures = pil_image_processor("Gemma4ImageProcessor")
    sounds = transformers.Gemma4AudioFeatureExtractor()

    @torch.inference_mode()
    def run(items: list[dict[str, Any]]) -> Tensor:
        found = []
        for item in items:
            seen = pictures([item["image"]], return_tensors="pt")
            heard = sounds([item["audio"][0]], return_tensors="pt")
            mask = torch.as_tensor(heard["input_features_mask"]).bool()
            ids = _gemma_ids(config, int(seen.pop("num_soft_tokens_per_image")[0]), int(mask[0, ::2][::2].sum()))
            hidden = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=seen["pixel_values"].to(dtype),
                image_position_ids=seen["image_position_ids"],
                input_features=torch.as_tensor(heard["input_features"]).to(dtype),
                input_features_mask=mask,
            ).last_hidden_state
            found.append(F.normalize(hidden.float().mean(dim=1), dim=-1))
        return torch.cat(found)

    return run


def gemma_config() -> PretrainedConfig:
    """Of transformers' default size, with the towers of pictures and of sound, which it leaves out by default."""
    towers = {f"{name}_config": {"model_type": f"gemma4_{name}"} for name in ("vision", "audio")}
    return transformers.EmbeddingGemma2Config(text_config={}, **towers)


def _gemma_ids(config: Any, pictures: int, sounds: int) -> Tensor:
    """(1, L): the placeholders between their brackets, then a text."""
    picture = [config.boi_token_id, *[config.image_token_id] * pictures, config.eoi_token_id]
    sound = [config.boa_token_id, *[config.audio_token_id] * sounds, config.eoa_token_index]
    return torch.tensor([[*picture, *sound, *range(1000, 1000 + TOKENS)]])
