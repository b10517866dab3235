"""From a step's embeddings to its loss: the weighted sum of section 3.3.2, every term by its name, over all ranks.

To add a loss: a pure function (losses.py, contrastive.py), a term here, and its name in ``TERMS``. Unusual: a term is
scaled so that the mean of the ranks' values is the value over the global batch; DDP's mean of gradients is then exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the field's own abbreviation

from ..behaviour_heads_sail import BehaviourHeads
from .contrastive import matryoshka_nce
from .distributed import counts_of, gather, rank, world_size
from .losses import cosent, listwise_divergence, ranknet, relational_divergence
from .patterns import LETTERS, PARTS, PATTERNS, valid_rows

KINDS = ("fused", "vision", "text", "audio", "late_fusion")

# Of the kinds that are encoded without the other modalities: the field of the model's output.
ALONE = {"vision": "vision_embeddings", "text": "text_embeddings", "audio": "audio_embeddings"}


@dataclass(frozen=True)
class Options:
    """Settings of the terms.

    Attributes:
        matryoshka: NCE at every Matryoshka length; False at the whole length alone.
        symmetric: contrast targets with queries too, and take the mean of both ways.
        margin: targets that score above the positive by more than this are no negatives; None keeps all.
        micl_audio: mICL over isolated sound embeddings too (section 3.3.2 has vision and text).
        cosent_temperature: of CoSENT.
        teacher_temperature: of the teacher's softmax over its scores.
        student_temperature: of the model's, in both preference terms.
        relation_temperature: of both softmaxes in the relations of ID embeddings.
    """

    matryoshka: bool = True
    symmetric: bool = True
    margin: float | None = None
    micl_audio: bool = False
    cosent_temperature: float = 0.05
    teacher_temperature: float = 1.0
    student_temperature: float = 0.05
    relation_temperature: float = 0.1


@dataclass
class Step:
    """One rank's embeddings and labels of a step.

    Attributes:
        items: by kind, (U, D) of the items that were encoded.
        batch: as `Collator` gives it.
        dims: Matryoshka lengths.
        temperature: of the batch's dataset.
        options: of the terms.
        heads: what sequences and ID embeddings go through; None takes the mean of a sequence.
        details: what a term wants logged besides its value.
        embeddings: by kind, (M, D) of [queries, targets, negatives]: the items, or what their sequences become.
    """

    items: Mapping[str, Tensor]
    batch: Mapping[str, Any]
    dims: Sequence[int]
    temperature: Tensor
    options: Options
    heads: BehaviourHeads | None = None
    details: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.embeddings = self.items
        if "members" in self.batch:
            heads = BehaviourHeads(self.dims[-1]) if self.heads is None else self.heads
            where = self.batch["members"], self.batch["owners"], self.batch["sequences"]
            self.embeddings = {kind: in_places(values, *where, heads) for kind, values in self.items.items()}

    @property
    def size(self) -> int:
        """B, the rows of this rank."""
        return len(self.batch["target_ids"])

    def query(self, kind: str) -> Tensor:
        """(B, D) embeddings of the queries."""
        return self.embeddings[kind][: self.size]

    def target(self, kind: str) -> Tensor:
        """(B, D) embeddings of the targets."""
        return self.embeddings[kind][self.size : 2 * self.size]

    def negatives(self, kind: str) -> tuple[Tensor, Tensor] | None:
        """(B, K, D) embeddings of the hard negatives and (B, K) which of them count; None where there is none."""
        slots, embeddings = self.batch["negative_slots"], self.embeddings[kind][2 * self.size :]
        if not len(slots):
            return None
        width = int(slots[:, 1].max()) + 1
        place = (slots[:, 0], slots[:, 1])
        values = embeddings.new_zeros(self.size, width, embeddings.shape[1]).index_put(place, embeddings)
        mask = torch.zeros(self.size, width, dtype=torch.bool, device=values.device)
        return values, mask.index_put(place, self.batch["negative_mask"])

    def parts(self) -> tuple[Tensor, Tensor]:
        """(B, 5) what queries and targets have, as patterns.py says."""
        return self.batch["parts"][: self.size], self.batch["parts"][self.size : 2 * self.size]


def in_places(items: Tensor, members: Tensor, owners: Tensor, sequences: Tensor, heads: BehaviourHeads) -> Tensor:
    """(U, D) items to (M, D) embeddings of the places that they belong to.

    Args:
        items: encoded once each.
        members: (S,) items.
        owners: (S,) the place in [0, M) of each member, rising; the members of a sequence are oldest first.
        sequences: (B,) which of the first B places are sequences; every other place has one member.
        heads: encode sequences.
    """
    sizes = torch.bincount(owners)  # (M,)
    first = sizes.cumsum(0) - sizes
    places = items[members[first]]  # (M, D)
    rows = sequences.nonzero()[:, 0]
    if not len(rows):
        return places
    offsets = torch.arange(int(sizes.max()), device=items.device)
    mask = offsets[None] < sizes[rows, None]  # (B', L)
    where = torch.where(mask, first[rows, None] + offsets[None], 0)
    encoded = heads.encode_sequence(items[members[where]], mask)  # (B', D)
    return places.index_copy(0, rows, encoded.to(places.dtype))


# --- terms: each a scalar, or None where no row of any rank has what it needs ---------------------------------------


def contrast(step: Step, query_kind: str, target_kind: str, valid: Tensor, hard: bool = False) -> Tensor | None:
    """NCE-MRL of the valid rows over all ranks' targets.

    Args:
        step: of this rank.
        query_kind, target_kind: which embeddings.
        valid: (B,) booleans; the other rows stay out, as negatives too.
        hard: add the mined negatives.
    """
    query, target = step.query(query_kind)[valid], step.target(target_kind)[valid]
    mined = step.negatives(target_kind) if hard else None
    more = {} if mined is None else {"hard_negatives": mined[0][valid], "hard_mask": mined[1][valid]}
    return nce_of_pairs(step, query, target, step.batch["target_ids"][valid], **more)


def nce_of_pairs(step: Step, query: Tensor, target: Tensor, ids: Tensor, **more: Tensor) -> Tensor | None:
    """NCE-MRL of pairs over all ranks' targets, by the step's options; every rank must call it.

    Args:
        step: of this rank.
        query, target: (b, D) of this rank, b may be 0.
        ids: (b,) of the targets; those with the same are no negatives of each other.
        more: mined negatives, as `matryoshka_nce` takes them.
    """
    counts = counts_of(len(ids), ids.device)
    if not sum(counts):
        return None
    options: dict[str, Any] = {
        "dims": step.dims if step.options.matryoshka else step.dims[-1:],
        "temperature": step.temperature,
        "target_ids": gather(ids, counts, differentiable=False),
        "offset": sum(counts[: rank()]),
        "margin": step.options.margin,
        "count": sum(counts) / world_size(),
    }
    loss = matryoshka_nce(query, gather(target, counts), **options, **more)
    if step.options.symmetric:
        loss = (loss + matryoshka_nce(target, gather(query, counts), **options)) / 2
    return loss


def nce_term(step: Step) -> Tensor | None:
    """NCE-MRL of the whole items, with in-batch and mined negatives."""
    return contrast(step, "fused", "fused", _all(step), hard=True)


def late_fusion_term(step: Step) -> Tensor | None:
    """NCE-MRL of the late-fusion embeddings."""
    return contrast(step, "late_fusion", "late_fusion", _all(step), hard=True)


def micl_term(step: Step) -> Tensor | None:
    """mICL: NCE of each modality with itself, every modality encoded alone."""
    query, target = (_modalities(parts) for parts in step.parts())
    names = ("vision", "text", "audio") if step.options.micl_audio else ("vision", "text")
    terms = [contrast(step, name, name, query[name] & target[name]) for name in names]
    found = [term for term in terms if term is not None]
    return torch.stack(found).sum() if found else None


def patterns_term(step: Step) -> Tensor | None:
    """Mean of the NCE of the dataset's patterns, each over the rows that have both parts (section 3.3.4)."""
    query_parts, target_parts = step.parts()
    found = {}
    for name in step.batch["patterns"]:
        query, target = (PARTS[letter] for letter in PATTERNS[name])
        loss = contrast(step, query, target, valid_rows(name, query_parts, target_parts))
        if loss is not None:
            found[name] = loss
    step.details.update({f"patterns/{name}": loss.detach() for name, loss in found.items()})
    return torch.stack(list(found.values())).mean() if found else None


def cosent_term(step: Step) -> Tensor | None:
    """CoSENT over the rows that have a score, of all ranks."""
    valid = step.batch["scores"].isfinite()
    counts = counts_of(int(valid.sum()), valid.device)
    if not sum(counts):
        return None
    cosine = F.cosine_similarity(step.query("fused")[valid].float(), step.target("fused")[valid].float(), dim=1)
    scores = gather(step.batch["scores"][valid], counts, differentiable=False)
    return cosent(gather(cosine, counts), scores, temperature=step.options.cosent_temperature)


def listwise_term(step: Step) -> Tensor | None:
    """Listwise divergence from the teacher's scores."""
    options = {"teacher_temperature": step.options.teacher_temperature}
    return _preference(step, listwise_divergence, options)


def ranknet_term(step: Step) -> Tensor | None:
    """RankNet over the teacher's scores."""
    return _preference(step, ranknet, {})


def _preference(step: Step, loss: Callable[..., Tensor], options: dict[str, float]) -> Tensor | None:
    scores = step.batch["teacher_scores"]  # (B, C)
    mask = scores.isfinite()
    useful = int((mask.sum(dim=1) > 1).sum())
    total = sum(counts_of(useful, scores.device))
    if not total:
        return None
    query = F.normalize(step.query("fused").float(), dim=-1)
    candidates = step.target("fused")[:, None].float()
    mined = step.negatives("fused")
    if mined is not None:
        candidates = torch.cat([candidates, mined[0].float()], dim=1)
    cosine = (query[:, None] * F.normalize(candidates, dim=-1)).sum(dim=-1)  # (B, C)
    filled = torch.where(mask, scores, 0.0)
    options = options | {"temperature": step.options.student_temperature, "count": total / world_size()}
    return loss(cosine, filled, mask, **options)


def id2item_term(step: Step) -> Tensor | None:
    """ID-to-item: mean over the tables of the NCE-MRL between items and their projected ID embeddings (section 3.3.5).

    Items without a row in a table stay out of its term, as negatives too.
    """
    if step.batch["tables"] and step.heads is None:
        raise ValueError("Tables of ID embeddings need the model's heads to project them: attach BehaviourHeads.")
    found = {}
    for name, vectors in step.batch["tables"].items():
        rows = _rows_of(step, name)
        projected = step.heads.project(name, vectors[rows])
        loss = nce_of_pairs(step, step.items["fused"][rows], projected, step.batch["item_ids"][rows])
        if loss is not None:
            found[name] = loss
    step.details.update({f"id2item/{name}": loss.detach() for name, loss in found.items()})
    return torch.stack(list(found.values())).mean() if found else None


def id_relations_term(step: Step) -> Tensor | None:
    """Mean over the tables of the divergence between an item's neighbours by its embedding and by its ID embedding."""
    found = [_relations(step, vectors, _rows_of(step, name)) for name, vectors in step.batch["tables"].items()]
    there = [loss for loss in found if loss is not None]
    return torch.stack(there).mean() if there else None


def _relations(step: Step, vectors: Tensor, rows: Tensor) -> Tensor | None:
    counts = counts_of(len(rows), rows.device)
    if sum(counts) < 2:
        return None
    own, wanted, ids = step.items["fused"][rows], vectors[rows], step.batch["item_ids"][rows]
    every = gather(ids, counts, differentiable=False)
    return relational_divergence(
        own,
        gather(own, counts),
        wanted,
        gather(wanted, counts, differentiable=False),
        ids[:, None] != every[None],
        temperature=step.options.relation_temperature,
        count=sum(counts) / world_size(),
    )


def _rows_of(step: Step, name: str) -> Tensor:
    """(b,) this rank's items that have a row in a table.

    What is encoded twice, with one instruction, by several ranks or for several rows, counts once.
    """
    rows = step.batch["table_rows"][name].nonzero()[:, 0]
    counts = counts_of(len(rows), rows.device)
    every = gather(step.batch["said_ids"][rows], counts, differentiable=False)
    _, group = every.unique(return_inverse=True)
    place = torch.arange(len(every), device=every.device)
    first = torch.full_like(place, len(every)).scatter_reduce(0, group, place, "amin")[group]
    start = sum(counts[: rank()])
    return rows[(first == place)[start : start + len(rows)]]


def _all(step: Step) -> Tensor:
    return torch.ones(step.size, dtype=torch.bool, device=step.batch["target_ids"].device)


def _modalities(parts: Tensor) -> dict[str, Tensor]:
    """(B,) booleans for each modality, from (B, 5) parts."""
    has = {letter: parts[:, place] for place, letter in enumerate(LETTERS)}
    return {"vision": has["I"] | has["V"], "text": has["T"], "audio": has["A"]}


TERMS: dict[str, Callable[[Step], Tensor | None]] = {
    "nce": nce_term,
    "cosent": cosent_term,
    "micl": micl_term,
    "late_fusion": late_fusion_term,
    "patterns": patterns_term,
    "listwise": listwise_term,
    "ranknet": ranknet_term,
    "id2item": id2item_term,
    "id_relations": id_relations_term,
}


@dataclass(frozen=True)
class Objective:
    """The weighted sum (section 3.3.2): L = nce + lambda * cosent + alpha * micl + beta * late_fusion + ...

    Attributes:
        weights: of each term; a term that is not named, or has 0, is not computed. A dataset's own weights come first.
        options: settings of the terms.

    Raises:
        ValueError: an unknown term, or a weight below 0.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"nce": 1.0})
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def weights_for(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Weights above 0 for a batch's dataset."""
        merged = {**self.weights, **batch["losses"]}
        return {name: weight for name, weight in merged.items() if weight > 0}

    def kinds(self, batch: Mapping[str, Any]) -> set[str]:
        """Embeddings that the batch's terms need; what the model is asked for."""
        weights = self.weights_for(batch)
        kinds = {"fused"} | ({"late_fusion"} & set(weights))
        if "micl" in weights:
            kinds |= {"vision", "text"} | ({"audio"} if self.options.micl_audio else set())
        if "patterns" in weights:
            kinds |= {PARTS[letter] for name in batch["patterns"] for letter in PATTERNS[name]}
        return kinds

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the value of every term before its weight; zero and nothing where no term applies."""
        weights = self.weights_for(step.batch)
        terms = {name: TERMS[name](step) for name in TERMS if name in weights}
        found = {name: term for name, term in terms.items() if term is not None}
        if not found:  # for example a batch without a picture, where ITC is the only term
            return 0.0 * (step.temperature + torch.stack([one.sum() for one in step.embeddings.values()]).sum()), {}
        loss = torch.stack([weights[name] * term for name, term in found.items()]).sum()
        return loss, {name: term.detach() for name, term in found.items()} | step.details


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError where a term is unknown or its weight is below 0."""
    for name, weight in weights.items():
        if name not in TERMS:
            raise ValueError(f"There is no loss term {name!r}; there are {', '.join(TERMS)}.")
        if not weight >= 0:
            raise ValueError(f"The weight of {name!r} is {weight}; it must be >= 0.")
