"""The recommenders beside ours: what is popular, and SASRec, a Transformer over the items' IDs.

Room: evaluation. Unusual: SASRec is trained with the full softmax over the items, not with the original's one negative,
which makes it a stronger peer; both learn from events before a split only and refuse others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ..training.recommendation.behaviour import Interactions, check_before, check_whole
from .metrics import recall_at

NO_TARGET = -1  # what targets are padded with
ROWS_AT_ONCE = 256
VALIDATION_K = 10


def popularity(before: Interactions, num_items: int, *, split_time: float) -> np.ndarray:
    """Positive events of each item before a split.

    Args:
        before: events before the split, such as ``split_by_time(...).before``.
        num_items: I.
        split_time: unix seconds.

    Returns:
        (I,) int64.

    Raises:
        ValueError: an event at the split time or later, an event that lacks a part, or an item beyond ``num_items``.
    """
    check_before(before, split_time)
    check_whole(before)
    if before.item.max(initial=-1) >= num_items:
        raise ValueError(f"num_items={num_items}, but an event is of item {before.item.max()}; give their number.")
    return np.bincount(before.item[before.counts > 0], minlength=num_items)


# --- SASRec ---------------------------------------------------------------------------------------------------------


class Epoch(NamedTuple):
    """What one epoch of `train_sasrec` came to on the held-out items.

    Attributes:
        recall: recall@10 of the held-out item among all items.
        loss: cross-entropy in nats.
    """

    recall: float
    loss: float


class SASRec(nn.Module):
    """Self-attentive sequential recommendation (Kang & McAuley, arXiv 1808.09781, section III).

    As there: learned positions, causal self-attention over the newest ``length`` items, a feed-forward part as wide as
    the embeddings, which serve as input and as output. Otherwise than there: a start token, so that a user without a
    history gets scores, too, and torch's layers, norm first, with a projection behind the attention.

    Args:
        seen: (I,) bool, items that have an event to learn from; the others score -inf.
        dim: of the embeddings.
        layers, heads: of the Transformer.
        length: items, with the start token, that it looks at.
        dropout: in [0, 1).

    Attributes:
        validation: one `Epoch` for each epoch trained, filled by `train_sasrec`.
        best_epoch: the place there whose weights these are.

    Raises:
        ValueError: no item is seen, or ``dim`` is no multiple of ``heads``.
    """

    seen: Tensor
    closed: Tensor

    def __init__(
        self,
        seen: np.ndarray,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        length: int = 50,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if not seen.any() or dim % heads or length < 1:
            raise ValueError(
                f"{int(seen.sum())} seen items, dim={dim}, heads={heads}, length={length}: at least one item, a dim "
                "that the heads divide and a length of at least 1 are needed."
            )
        self.num_items, self.length = len(seen), length
        self.register_buffer("seen", torch.from_numpy(np.asarray(seen, dtype=bool).copy()))
        self.register_buffer("closed", torch.zeros(len(seen)).masked_fill(~self.seen, float("-inf")))
        self.items = nn.Embedding(self.num_items + 1, dim)  # the last one is the start token
        self.positions = nn.Embedding(length, dim)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=dim**-0.5)
        layer = nn.TransformerEncoderLayer(dim, heads, dim, dropout, "relu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.validation: list[Epoch] = []
        self.best_epoch = -1

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L) places, padded behind, to (B, L, D): what is expected after each; nothing looks ahead, at padding."""
        num_places = inputs.shape[1]
        embedded = self.items(inputs) + self.positions.weight[:num_places]  # (B, L, D)
        mask = nn.Transformer.generate_square_subsequent_mask(num_places)
        return self.encoder(self.dropout(embedded), mask=mask, is_causal=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, D) to (T, I); -inf for items that are not seen."""
        return torch.addmm(self.closed, hidden, self.items.weight[:-1].T)

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Score every item as the next one of each sequence.

        Args:
            sequences: Q sequences of places of items, oldest first, each perhaps empty. Items that are not seen are
                passed over: nothing is known of them.

        Returns:
            (Q, I) float32, the higher the likelier; -inf for items that have no event before the split. Items of the
            sequence are scored like any other.

        Raises:
            ValueError: a place that is none of the I items'.
        """
        self.eval()
        known = [self._known(sequence) for sequence in sequences]
        found = [np.empty((0, self.num_items), dtype=np.float32)]
        for start in range(0, len(known), ROWS_AT_ONCE):
            inputs, last = self._batch(known[start : start + ROWS_AT_ONCE])
            found.append(self.logits(self(inputs)[torch.arange(len(last)), last]).numpy())
        return np.concatenate(found)

    def _known(self, sequence: Sequence[int]) -> np.ndarray:
        items = np.asarray(sequence, dtype=np.int64)
        bad = items[(items < 0) | (items >= self.num_items)]
        if len(bad):
            raise ValueError(f"A sequence holds item {bad[0]}; places from 0 to {self.num_items - 1} are needed.")
        return items[self.seen.numpy()[items]]

    def _batch(self, sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Newest items behind the start token, (B, L), and the place of each one's last, (B,)."""
        newest = [np.concatenate([[self.num_items], some])[-self.length :] for some in sequences]
        return _padded(newest, self.num_items), torch.tensor([len(some) - 1 for some in newest])


def train_sasrec(
    before: Interactions,
    *,
    split_time: float,
    dim: int = 64,
    layers: int = 2,
    heads: int = 2,
    length: int = 50,
    epochs: int = 30,
    patience: int = 6,
    dropout: float = 0.2,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> SASRec:
    """Train `SASRec` on each user's positive items in the order of time, by cross-entropy over all seen items.

    The last positive item of each user with two or more is held out; after each epoch its recall@10 (of equal ones, its
    cross-entropy) decides whose weights are kept. The softmax over all items in place of the original's binary
    cross-entropy with one negative is what later comparisons found to make SASRec strong (Klenitskiy & Vasilev, arXiv
    2309.07602). What is held out is not learned from afterwards either.

    Args:
        before: validated events before the split; what comes later is refused.
        split_time: unix seconds.
        dim, layers, heads, length, dropout: of `SASRec`.
        epochs: at most.
        patience: epochs without a better one after which it stops.
        batch_size: windows of up to ``length`` items. Small ones: MovieLens-100K has but 1,700 of
            them, and at 128 more than 25 epochs are too few steps.
        learning_rate: Adam's.
        seed: the same seed (and number of threads) gives the same weights; the caller's random state is left as it is.
        progress: show a bar.

    Returns:
        The model of the best epoch, in evaluation mode.

    Raises:
        ValueError: an event at the split time or later, no user with two positive items, or settings below 1.
    """
    check_before(before, split_time)
    if min(epochs, patience, batch_size) < 1:
        raise ValueError(f"epochs={epochs}, patience={patience}, batch_size={batch_size} must be at least 1.")
    sequences = positive_sequences(before)
    held_out = [some for some in sequences if len(some) > 1]
    if not held_out:
        raise ValueError(f"None of {before.num_users} users has two positive items in a row; nothing can be held out.")
    seen = np.bincount(before.item, minlength=len(before.item_ids)) > 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SASRec(seen, dim=dim, layers=layers, heads=heads, length=length, dropout=dropout)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))  # the original's
        learned = [some[:-1] if len(some) > 1 else some for some in sequences]
        pairs = [pair for some in learned for pair in windows(some, length, model.num_items)]
        bar = tqdm(range(epochs), "sasrec", unit="epoch", disable=not progress)
        best: dict[str, Tensor] = {}
        for epoch in bar:
            _train_epoch(model, optimizer, pairs, batch_size)
            model.validation.append(_validate(model, held_out))
            if _key(model, epoch) > _key(model, model.best_epoch):
                best, model.best_epoch = {name: value.clone() for name, value in model.state_dict().items()}, epoch
            bar.set_postfix(recall=f"{model.validation[-1].recall:.4f}", best=model.best_epoch)
            if epoch - model.best_epoch >= patience:
                break
    model.load_state_dict(best)
    return model.eval()


def positive_sequences(interactions: Interactions) -> list[np.ndarray]:
    """Items of each user's positive events, oldest first, users in the order of their names.

    An item right after itself counts once: in logs with one event for each behaviour it would only teach to repeat.

    Raises:
        ValueError: an event lacks its user, its item or its time.
    """
    check_whole(interactions)
    positive = interactions.take(interactions.counts > 0)
    return [some.items[np.diff(some.items, prepend=-1) != 0] for some in positive.histories()]


def windows(items: np.ndarray, length: int, start: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut a sequence, behind a start token, into pairs of inputs and targets: the item after each input.

    Args:
        items: (n,) places; each is the target once.
        length: of the pairs, counted from the end; the oldest may be shorter.
        start: the start token's place.
    """
    inputs = np.concatenate([[start], items])
    ends = range(len(items), 0, -length)
    return [(inputs[max(0, end - length) : end], items[max(0, end - length) : end]) for end in ends]


def _train_epoch(
    model: SASRec, optimizer: torch.optim.Optimizer, pairs: list[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> None:
    model.train()
    for chosen in torch.randperm(len(pairs)).split(batch_size):
        inputs, targets = zip(*(pairs[place] for place in chosen.tolist()), strict=True)
        wanted = _padded(targets, NO_TARGET)  # (B, L)
        there = wanted != NO_TARGET
        hidden = model(_padded(inputs, model.num_items))[there]  # (T, D)
        optimizer.zero_grad()
        cross_entropy(model.logits(hidden), wanted[there]).backward()
        optimizer.step()


def _validate(model: SASRec, held_out: Sequence[np.ndarray]) -> Epoch:
    """The last item of each sequence, from those before it."""
    targets = torch.tensor([some[-1] for some in held_out])  # (Q,)
    scores = torch.from_numpy(model.scores([some[:-1] for some in held_out]))  # (Q, I)
    relevant = torch.arange(model.num_items) == targets[:, None]  # (Q, I)
    return Epoch(recall_at(scores, relevant, VALIDATION_K), float(cross_entropy(scores, targets)))


def _key(model: SASRec, epoch: int) -> tuple[float, float]:
    """What makes an epoch the best; none yet is the worst."""
    return (model.validation[epoch].recall, -model.validation[epoch].loss) if epoch >= 0 else (-1.0, 0.0)


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """(B, L), padded behind."""
    tensors = [torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
