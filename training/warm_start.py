"""A warm start for connectors before a frozen backbone: from nothing to useful tokens in minutes.

Unusual: nothing goes through backbone and connectors at once. Heads learn in embedding space, where a step is a small
matrix product; then small decoders learn which input token makes the frozen backbone say what a head says, by
distillation. Joint training starts from there instead of from noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation
from tqdm.auto import trange

from ..configuration_sail import SEGMENT_OF
from ..modeling_sail import AudioAdapter, SailEmbeddingModel
from ..perceiver_sail import VisualShortcut
from ..processing_sail import Layout, SailEmbeddingProcessor
from .contrastive import info_nce

Encode = Callable[[list[str]], Tensor]

TASKS = (None, "cls", "q2i", "i2i")
KINDS = ("vision", "vision", "audio", "both", "text")  # a batch is of one of them


def text_encoder(model: SailEmbeddingModel, processor: SailEmbeddingProcessor) -> Encode:
    """The published text backbone: mean of its last states, normalised, no tanh, no prompt. Each text is read once."""
    known: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        new = sorted({text for text in texts if text not in known}, key=len)  # of one length, little padding
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            batch = processor.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            hidden = model.text_tower(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            known.update(zip(part, F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1), strict=True))
        return torch.stack([known[text] for text in texts])

    return encode


def fit_head(
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    features: Tensor,
    texts: Sequence[Sequence[str]],
    encode: Encode,
    *,
    steps: int,
    batch_size: int,
    captions: tuple[Tensor, Tensor] | None = None,
    caption_share: float = 0.5,
    learning_rate: float = 1e-3,
) -> None:
    """Train a head to put each row's features near one of its texts, by InfoNCE in the text backbone's own space.

    Args:
        head: (B, ...) features to (B, E) embeddings.
        parameters: what is trained.
        features: (N, ...), in half or full precision.
        texts: N lists; one text is drawn each time a row is.
        encode: texts to (M, E) normalised embeddings.
        steps, batch_size, learning_rate: of AdamW with a cosine schedule.
        captions: (N, C) probabilities of C teacher captions and their (C, E) embeddings; ``caption_share`` of a batch
            is drawn from them instead of from the texts.
    """
    known = sorted({text for choices in texts for text in choices})
    row_of = {text: row for row, text in enumerate(known)}
    embeddings = encode(known)
    rows = [[row_of[text] for text in choices] for choices in texts]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="head"):
        index = torch.randint(len(features), (batch_size,))
        target = embeddings[[random.choice(rows[place]) for place in index.tolist()]]
        if captions is not None:
            share = round(caption_share * batch_size)
            target[:share] = captions[1][torch.multinomial(captions[0][index[:share]], 1)[:, 0]]
        ids = _same_ids(target)
        found = head(features[index].float())
        loss = info_nce(found, target, temperature=0.05, target_ids=ids)
        loss = (loss + info_nce(target, found, temperature=0.05, target_ids=ids)) / 2
        _step(optimizer, schedule, loss)


def _same_ids(target: Tensor) -> Tensor:
    """(B,) the first row that holds the same embedding: equal texts are no negatives of each other."""
    return (target @ target.T > 0.999).long().argmax(dim=1)


def distil_heads(
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    heads: dict[str, Tensor],
    pairs: Tensor,
    texts: Sequence[str],
    encode: Encode,
    *,
    steps: int,
    batch_size: int = 64,
    temperature: float = 0.05,
    learning_rate: float = 2e-3,
    blur: bool = False,
) -> None:
    """Train the token decoders until the frozen backbone ranks texts as the heads do.

    A batch is of pictures, sounds, both (the heads' normalised sum) or texts in their place (mixed by two, as what
    heads predict is blurred); the loss is the KL divergence of the softmax over texts, both ways, from the heads' to
    the model's, at every Matryoshka length.

    Args:
        model: ``perceiver.shortcut.decoder`` and ``audio_adapter.decoder`` are trained, and what of the backbone
            requires gradients; texts are held to the ranking that they give each other.
        processor: lays the sequences out, with the instructions of every task.
        heads: "vision" and "audio", each (N, E) normalised embeddings of the training rows, in the space of ``encode``.
        pairs: (P, 2), rows of vision and of audio that belong to one item.
        texts: what is ranked; 128 are drawn each time.
        encode: texts to (M, E) normalised embeddings.
        steps, batch_size: of AdamW with a cosine schedule.
        temperature: of both softmaxes.
        learning_rate: of the decoders; the backbone takes at most 1e-4.
        blur: mix the heads' embeddings by two as well and add noise. On unseen names heads are less sure than on
            the rows that they were fitted on, and the decoders have to say that too.
    """
    decoders = {"vision": model.perceiver.shortcut.decoder, "audio": model.audio_adapter.decoder}
    new = [parameter for decoder in decoders.values() for parameter in decoder.parameters()]
    top = [parameter for parameter in model.text_tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": new, "lr": learning_rate}, {"params": top, "lr": min(1e-4, learning_rate)}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    known = encode(list(texts))
    bar = trange(steps, desc="distil")
    for _ in bar:
        task, swapped = random.choice(TASKS), random.random() < 0.5
        sides = ("target", "query") if swapped else ("query", "target")
        ours, theirs = (processor.instruction_for(task, side) for side in sides)
        wanted, said = _draw(random.choice(KINDS), heads, pairs, known, batch_size, blur)
        bank = torch.randint(len(texts), (2 * batch_size,))
        batch = processor.pad([processor.sequence(Layout({"text": texts[place]}), theirs) for place in bank.tolist()])
        ranked = model(**batch).embeddings
        found = embed_tokens(model, processor, {name: decoders[name](said[name]) for name in said}, ours)
        teacher, among = wanted @ known[bank].T / temperature, known[bank] @ known[bank].T / temperature
        loss = torch.zeros(())
        for dim in model.config.matryoshka_dims:
            short, other = (F.normalize(part[:, :dim], dim=-1) for part in (found, ranked))
            student = short @ other.T / temperature
            loss = loss + (_divergence(student, teacher) + _divergence(student.T, teacher.T)) / 2
            loss = loss + _divergence(other @ other.T / temperature, among) / 4
        loss = loss / len(model.config.matryoshka_dims)
        _step(optimizer, schedule, loss)
        bar.set_postfix(kl=f"{loss.item():.3f}")


def _draw(
    kind: str, heads: dict[str, Tensor], pairs: Tensor, known: Tensor, size: int, blur: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, E) what a batch shall mean, and the (B, E) embedding that each modality contributes."""
    if kind == "both":
        rows = pairs[torch.randint(len(pairs), (size,))]
        said = {"vision": heads["vision"][rows[:, 0]], "audio": heads["audio"][rows[:, 1]]}
        said = {name: _blurred(part, heads[name]) if blur else part for name, part in said.items()}
        return F.normalize(said["vision"] + said["audio"], dim=-1), said
    if kind == "text":
        mixed = _blurred(known[torch.randint(len(known), (size,))], known, 0.0)
        return mixed, {random.choice(("vision", "audio")): mixed}
    embedding = heads[kind][torch.randint(len(heads[kind]), (size,))]
    embedding = _blurred(embedding, heads[kind]) if blur else embedding
    return embedding, {kind: embedding}


def _blurred(embedding: Tensor, others: Tensor, noise: float = 0.5) -> Tensor:
    """(B, E), each mixed with a random other one and with noise of up to ``noise`` of its length."""
    size, share = len(embedding), 0.5 + 0.5 * torch.rand(len(embedding), 1)
    mixed = share * embedding + (1 - share) * others[torch.randint(len(others), (size,))]
    random_direction = F.normalize(torch.randn_like(mixed), dim=-1)
    return F.normalize(F.normalize(mixed, dim=-1) + noise * torch.rand(size, 1) * random_direction, dim=-1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence of the rows' softmax, teacher from student, in nats."""
    return F.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="batchmean", log_target=True)


def embed_tokens(
    model: SailEmbeddingModel, processor: SailEmbeddingProcessor, tokens: dict[str, Tensor], instruction: str = ""
) -> Tensor:
    """(B, D) embeddings of items whose placeholders of "vision", "audio" or both hold one (B, D) token each."""
    batch = processor.pad([processor.sequence(Layout({}, int("vision" in tokens), "audio" in tokens), instruction)])
    size = len(next(iter(tokens.values())))
    segments = batch["modality_ids"].expand(size, -1)
    embeds = model.get_input_embeddings()(batch["input_ids"]).expand(size, -1, -1)
    for name, token in tokens.items():
        embeds = torch.where((segments == SEGMENT_OF[name])[..., None], token[:, None], embeds)
    return model(inputs_embeds=embeds, modality_ids=segments).embeddings


def _step(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


# --- mini's connectors ------------------------------------------------------------------------------------------------


def warm_vision(
    shortcut: VisualShortcut,
    features: Tensor,
    texts: Sequence[Sequence[str]],
    encode: Encode,
    captions: tuple[Tensor, Tensor],
    classifier: tuple[Tensor, Tensor],
    steps: int = 600,
) -> None:
    """Fit the perceiver's shortcut in embedding space; its memory is the tower's classifier.

    Args:
        shortcut: its decoder stays as it is.
        features: (N, V) mean visual tokens.
        texts, encode, captions, steps: as in `fit_head`.
        classifier: (C, V) weight and (C,) bias of the classifier over mean visual tokens.
    """
    for layer in (shortcut.up, shortcut.down):
        layer.reset_parameters()  # the backbone's small initial scale would only be slow here
    middle, scale = features.mean(dim=0), features.std(dim=0) + 0.1
    with torch.no_grad():
        shortcut.keys.weight.copy_(classifier[0])
        shortcut.keys.bias.copy_(classifier[1])
        shortcut.values.weight.copy_(captions[1].T)

    def head(part: Tensor) -> Tensor:
        return shortcut.embed(F.dropout((part - middle) / scale, 0.5), part)

    parameters = [*shortcut.up.requires_grad_().parameters(), *shortcut.down.requires_grad_().parameters()]
    options = {"steps": steps, "batch_size": 384, "captions": captions, "caption_share": 0.25}
    fit_head(head, parameters, features, texts, encode, **options)
    with torch.no_grad():  # fold the scaling into the first layer
        folded = shortcut.up.weight / scale
        shortcut.up.bias -= folded @ middle
        shortcut.up.weight.copy_(folded)
    shortcut.up.requires_grad_(False)
    shortcut.down.requires_grad_(False)


def warm_audio(
    adapter: AudioAdapter, features: Tensor, texts: Sequence[Sequence[str]], encode: Encode, steps: int = 350
) -> None:
    """Fit the audio adapter as a head in embedding space, on (N, T, A) windows; its pooling starts as the mean."""
    with torch.no_grad():
        adapter.score.weight.zero_()
        adapter.score.bias.zero_()
    adapter.up.reset_parameters()
    adapter.down.reset_parameters()

    def head(part: Tensor) -> Tensor:
        return project(adapter, F.dropout(part, 0.2))

    fit_head(head, list(adapter.parameters()), features, texts, encode, steps=steps, batch_size=128)


def project(adapter: AudioAdapter, features: Tensor) -> Tensor:
    """(B, T, A) windows, each an item of its own -> (B, D), before the decoder."""
    return adapter.project(features, torch.arange(len(features)))


@torch.no_grad()
def into_tokens(
    model: SailEmbeddingModel,
    processor: SailEmbeddingProcessor,
    pictures: Tensor,
    sounds: Tensor,
    pairs: Tensor,
    texts: Sequence[str],
    encode: Encode,
    steps: tuple[int, int] = (400, 1080),
) -> None:
    """Put the fitted heads before the backbone: distil them into the decoders; the perceiver starts from zero.

    Args:
        pictures: (N, V) mean visual tokens.
        sounds: (M, T, A) windows.
        model, processor, pairs, texts, encode: as in `distil_heads`.
        steps: of distillation as the heads are, then of it with blur.
    """
    shortcut, adapter = model.perceiver.shortcut, model.audio_adapter
    heard = [project(adapter, part.float()) for part in sounds.split(256)]
    heads = {"vision": shortcut.embed(pictures, pictures), "audio": F.normalize(torch.cat(heard), dim=-1)}
    model.perceiver.output.weight.zero_()
    model.perceiver.output.bias.zero_()
    for decoder in (shortcut.decoder, adapter.decoder):
        decoder.up.reset_parameters()
        decoder.down.reset_parameters()
    with torch.enable_grad():
        distil_heads(model, processor, heads, pairs, texts, encode, steps=steps[0])
        distil_heads(model, processor, heads, pairs, texts, encode, steps=steps[1], learning_rate=1e-3, blur=True)
