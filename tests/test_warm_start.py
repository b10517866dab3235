"""The warm start: the shortcut beside the perceiver, heads that learn, decoders that speak to the backbone."""

from __future__ import annotations

import random

import pytest
import torch
from modeling_sail.training.build import build_tiny
from modeling_sail.training.warm_start import distil_heads, embed_tokens, text_encoder, warm_vision
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from modeling_sail import SailEmbeddingConfig
from modeling_sail.perceiver_sail import VisualPerceiver, VisualShortcut
from modeling_sail.processing_sail import Layout

WORDS = ["red bird", "oak", "a boat", "seven", "quiet", "moon", "glass", "tiger lily"]


@pytest.fixture
def config(tiny) -> SailEmbeddingConfig:
    fields = tiny[0].config.to_dict()
    return SailEmbeddingConfig(**{**fields, "shortcut_size": 24, "shortcut_memory": len(WORDS)})


def test_the_shortcut_gives_every_latent_the_token_of_the_items_mean(config) -> None:
    torch.manual_seed(0)
    perceiver = VisualPerceiver(config, 12).eval()
    torch.nn.init.normal_(perceiver.latents)
    features, group = torch.randn(4, 5, 12), torch.tensor([0, 1, 1, 1])
    with_it = perceiver(features, torch.tensor([0, 0, 1, 2]), group)
    shortcut, perceiver.shortcut = perceiver.shortcut, None
    without = perceiver(features, torch.tensor([0, 0, 1, 2]), group)
    means = torch.stack([features[0].mean(dim=0), features[1:].mean(dim=(0, 1))])
    torch.testing.assert_close(with_it - without, shortcut(means)[:, None].expand_as(without), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(8, 0), (0, 8), (8, -1), (-1, 0)])
def test_a_shortcut_is_there_whole_or_not_at_all(tiny, sizes) -> None:
    fields = tiny[0].config.to_dict() | {"shortcut_size": sizes[0], "shortcut_memory": sizes[1]}
    with pytest.raises(ValueError, match="shortcut_(size|memory)=-?[0-9]+ cannot be; it must be"):
        SailEmbeddingConfig(**fields)


def test_the_head_learns_names_on_features_of_any_scale(config) -> None:
    torch.manual_seed(0)
    known = dict(zip(WORDS, F.normalize(torch.randn(len(WORDS), config.hidden_size), dim=-1), strict=True))
    kinds = torch.randn(len(WORDS), 12) * 30 + 100  # far from the unit scale: the scaling must be folded in
    label = torch.arange(160) % len(WORDS)
    features = kinds[label] + torch.randn(160, 12)
    shortcut = VisualShortcut(config, 12)
    captions = torch.full((160, len(WORDS)), 1 / len(WORDS)), torch.stack(list(known.values()))
    classifier = torch.zeros(len(WORDS), 12), torch.zeros(len(WORDS))  # knows nothing: the MLP has to learn
    texts = [[WORDS[index]] for index in label.tolist()]
    encode = lambda words: torch.stack([known[word] for word in words])  # noqa: E731
    warm_vision(shortcut, features, texts, encode, captions, classifier, steps=400)
    found = shortcut.embed(features, features) @ captions[1].T
    assert (found.argmax(dim=1) == label).float().mean() > 0.9


def test_the_memory_alone_names_what_the_classifier_knows(config) -> None:
    shortcut = VisualShortcut(config, len(WORDS))
    with torch.no_grad():
        for parameter in (*shortcut.down.parameters(), shortcut.keys.bias):
            parameter.zero_()
        shortcut.keys.weight.copy_(50 * torch.eye(len(WORDS)))
        shortcut.values.weight.copy_(F.normalize(torch.randn(config.hidden_size, len(WORDS)), dim=0))
    seen = torch.eye(len(WORDS))
    torch.testing.assert_close(shortcut.embed(seen, seen), shortcut.values.weight.T, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def distilled():
    """A random backbone and decoders that learned to say what ten pictures and sounds hold."""
    torch.manual_seed(0)
    random.seed(0)
    model, processor = build_tiny(shortcut_size=24, shortcut_memory=len(WORDS))
    model.requires_grad_(False)
    encode = text_encoder(model, processor)
    decoders = (model.perceiver.shortcut.decoder, model.audio_adapter.decoder)
    for decoder in decoders:
        decoder.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".decoder." not in name}
    heads = {"vision": encode(WORDS), "audio": encode(WORDS)}
    pairs = torch.arange(len(WORDS))[:, None].expand(-1, 2)
    distil_heads(model, processor, heads, pairs, WORDS, encode, steps=150, batch_size=16)
    distil_heads(model, processor, heads, pairs, WORDS, encode, steps=20, batch_size=16, learning_rate=1e-4, blur=True)
    return model, processor, encode, before


@pytest.mark.parametrize("names", [("vision",), ("audio",), ("vision", "audio")])
def test_distilled_decoders_make_the_backbone_say_the_words(distilled, names) -> None:
    model, processor, encode, _ = distilled
    decoders = {"vision": model.perceiver.shortcut.decoder, "audio": model.audio_adapter.decoder}
    tokens = {name: decoders[name](encode(WORDS)) for name in names}
    found = F.normalize(embed_tokens(model, processor, tokens), dim=-1)
    batch = processor.pad([processor.sequence(Layout({"text": word})) for word in WORDS])
    wanted = F.normalize(model(**batch).embeddings, dim=-1)
    right = (found @ wanted.T).argmax(dim=1) == torch.arange(len(WORDS))
    assert right.sum() >= 6  # of 8; by chance 1


def test_distillation_leaves_everything_but_the_decoders_alone(distilled) -> None:
    model, _, _, before = distilled
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_tokens_stand_where_the_model_itself_puts_them(distilled) -> None:
    model, processor, _, _ = distilled
    torch.nn.init.zeros_(model.perceiver.output.weight)
    torch.nn.init.zeros_(model.perceiver.output.bias)
    pictures = torch.randn(2, 3, model.perceiver.input.in_features)
    windows = torch.randn(2, 4, model.audio_adapter.up.in_features)
    owner = torch.arange(2)
    batch = processor.pad([processor.sequence(Layout({}, 1, True), "Find:")] * 2)
    media = {"image_features": pictures, "image_owner": owner, "audio_features": windows, "audio_owner": owner}
    tokens = {"vision": model.perceiver.shortcut(pictures.mean(dim=1)), "audio": model.audio_adapter(windows, owner)}
    direct = model(**batch, **media).embeddings
    torch.testing.assert_close(embed_tokens(model, processor, tokens, "Find:"), direct, atol=1e-5, rtol=0)
