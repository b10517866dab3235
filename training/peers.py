"""Where comparisons start: the paper's peers and the rungs of its ladder, as configurations of our own model.

The peers of Tables 2 and 3 start from the warm model of `mini` with one thing changed; the rungs of Figures 9 and 10
from pretrained backbones with heads that are fitted in minutes. Unusual: a decoder that has never seen a picture reads
one at once, because heads are fitted in the space of its own input embeddings: a picture is a soft bag of its words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from ..configuration_sail import SailEmbeddingConfig
from ..modeling_sail import SailEmbeddingModel
from ..perceiver_sail import TokenDecoder
from ..processing_sail import SailEmbeddingProcessor
from .build import assemble, load_built, save
from .data.mini_pairs import load_sources, said_name, teacher_probabilities
from .feature_cache import FeatureCache
from .towers import imagenet_class_names, load_lite0_classifier
from .warm_start import Encode, text_encoder, warm_audio, warm_vision

# What a decoder's connectors are: those of `mini`, with few visual tokens, so that a rung takes minutes on two cores.
CONNECTORS = {
    "latent_size": 128,
    "perceiver_heads": 4,
    "num_latents": 4,
    "shortcut_size": 640,
    "shortcut_memory": 1000,
}


# --- one thing changed ------------------------------------------------------------------------------------------------


def dual_tower(folder: Path, out: Path) -> None:
    """The CLIP-style peer: the same parts, but no backbone reads several modalities at once (``fusion="separate"``)."""
    _changed(folder, out, ("perceiver.shortcut.decoder.", "audio_adapter.decoder."), fusion="separate")


def without_audio(folder: Path, out: Path) -> None:
    """The VLM-style peer: pictures and text through one backbone, no sound."""
    _changed(folder, out, ("audio_tower.", "audio_adapter."), audio_config=None)


def other_attention(folder: Path, out: Path, causal: bool) -> None:
    """The same weights with the backbone's attention causal, or both ways."""
    _changed(folder, out, (), causal=causal)


def _changed(folder: Path, out: Path, left_out: tuple[str, ...], **changes: Any) -> None:
    """Save a model again with a changed configuration; only the weights under ``left_out`` may go.

    Raises:
        ValueError: others would go, or some would be new.
    """
    model, processor = load_built(folder)
    config = SailEmbeddingConfig.from_dict({**model.config.to_dict(), **changes})
    changed = SailEmbeddingModel(config)
    missing, unused = changed.load_state_dict(model.state_dict(), strict=False)
    lost = [name for name in unused if not name.startswith(left_out)]
    if missing or lost:
        raise ValueError(f"{changes} does not fit {folder}: missing {missing[:5]}, left over {lost[:5]}.")
    if config.audio_config is None:
        processor.modalities = [name for name in processor.modalities if name != "audio"]
    save(changed, processor, out)


# --- rungs of the ladder ----------------------------------------------------------------------------------------------


def encoder_start(out: Path, images: FeatureCache, sounds: FeatureCache) -> None:
    """The first rung: `mini`'s towers as a dual tower, heads fitted in the text encoder's own embedding space."""
    model, processor = assemble("mini")
    model = _with_config(model, **CONNECTORS, fusion="separate")
    processor.num_latents = model.config.num_latents
    _fit_heads(model, images, sounds, text_encoder(model, processor))
    save(model, processor, out)


def decoder_start(out: Path, images: FeatureCache, sounds: FeatureCache, num_layers: int, causal: bool) -> None:
    """The second rung: `small`'s towers, its decoder cut to the first layers, heads fitted in its input embeddings.

    Args:
        out: folder to write.
        images, sounds: tower features of the training rows.
        num_layers: of the decoder that stay.
        causal: as it was pretrained; else both ways.
    """
    model, processor = assemble("small")
    text = {**model.config.text_config.to_dict(), "num_hidden_layers": num_layers}
    model = _with_config(model, **CONNECTORS, text_config=text, causal=causal, matryoshka_dims=[128, 384, 576])
    processor.num_latents = model.config.num_latents
    processor.prompt_format = "plain"  # the chat form is four times as many tokens as the items here
    encode, centre, scale = bag_of_tokens(model, processor)
    _fit_heads(model, images, sounds, encode)
    for decoder in (model.perceiver.shortcut.decoder, model.audio_adapter.decoder):
        pass_through(decoder, scale, centre)
    save(model, processor, out)


def _with_config(model: SailEmbeddingModel, **changes: Any) -> SailEmbeddingModel:
    """The same towers under a changed configuration, with new connectors; layers that it lacks go."""
    changed = SailEmbeddingModel(SailEmbeddingConfig.from_dict({**model.config.to_dict(), **changes}))
    for name in ("text_tower", "vision_tower", "audio_tower"):
        missing, _ = getattr(changed, name).load_state_dict(getattr(model, name).state_dict(), strict=False)
        assert not missing, f"{name} lacks {missing[:5]}"
    return changed.eval()


def bag_of_tokens(model: SailEmbeddingModel, processor: SailEmbeddingProcessor) -> tuple[Encode, Tensor, float]:
    """Texts as the mean of their tokens' input embeddings, less the vocabulary's mean, normalised.

    Returns:
        The encoder, texts to (N, D); the (D,) mean of the vocabulary; and the usual length before normalising.
    """
    table = model.get_input_embeddings().weight.detach()
    centre = table.mean(dim=0)

    @torch.no_grad()
    def raw(texts: list[str]) -> Tensor:
        ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return torch.stack([table[part].mean(dim=0) for part in ids]) - centre

    scale = float(raw(imagenet_class_names()).norm(dim=1).mean())
    return lambda texts: F.normalize(raw(texts), dim=-1), centre, scale


@torch.no_grad()
def pass_through(decoder: TokenDecoder, scale: float, centre: Tensor) -> None:
    """Make a token decoder x -> scale * x + centre, exactly: gelu(x) - gelu(-x) = x."""
    one = torch.eye(decoder.up.in_features)
    decoder.up.weight.copy_(torch.cat([one, -one]))
    decoder.down.weight.copy_(scale * torch.cat([one, -one], dim=1))
    decoder.up.bias.zero_()
    decoder.down.bias.copy_(centre)


def _fit_heads(model: SailEmbeddingModel, images: FeatureCache, sounds: FeatureCache, encode: Encode) -> None:
    """Fit the shortcut and the audio adapter on Tux Paint's training rows; the perceiver's own tokens start at zero."""
    rows = [row for row in load_sources()["tuxpaint"] if row["image"] in images]
    pictures = torch.stack([images[row["image"]][0].float().mean(dim=0) for row in rows])
    probabilities = teacher_probabilities(images, [row["image"] for row in rows])
    captions = torch.stack([probabilities[row["image"]] for row in rows]), encode(imagenet_class_names())
    names = [[row["names"]["en"]] for row in rows]
    shortcut, adapter = model.perceiver.shortcut, model.audio_adapter
    warm_vision(shortcut, pictures, names, encode, captions, load_lite0_classifier())
    clips = [(path, row, said) for row in rows for said, path in row["speech"].items() if path in sounds]
    windows = torch.stack([sounds[path][0] for path, _, _ in clips])
    warm_audio(adapter, windows, [[said_name(row, said), row["names"]["en"]] for _, row, said in clips], encode)
    with torch.no_grad():
        model.perceiver.output.weight.zero_()
        model.perceiver.output.bias.zero_()
