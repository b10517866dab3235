"""Validation of behaviour data: what cannot be is dropped, counted by its reason and reported with examples.

Room: recommendation, after behaviour. Unusual: nothing is repaired, but an item that is there under two ids is one item
afterwards: its twin in a sequence would be the target itself.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..rows import item_key
from .behaviour import Interactions, Items

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 5

# Why an event is dropped, in the order of the checks: an event that is wrong in two ways is counted under the first.
REASONS = (
    "missing_user",
    "unknown_item",
    "item_without_content",
    "invalid_time",
    "before_release",
    "in_the_future",
    "duplicate",
)


@dataclass(frozen=True)
class Report:
    """What `validate` found; `as_dict` is for JSON.

    Attributes:
        events, kept: before and after.
        dropped: events by the reason, one of `REASONS`; each event is counted once.
        users, empty_users: with events, and left without one.
        items, unused_items: in the table, and without an event.
        repeated_pairs: pairs of a user and an item with more than one event; all are kept.
        same_content: items whose content an earlier item has under another id.
        examples: up to 5 for each of the above that is not 0.
    """

    events: int
    kept: int
    dropped: dict[str, int]
    users: int
    empty_users: int
    items: int
    unused_items: int
    repeated_pairs: int
    same_content: int
    examples: dict[str, list[Any]]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count) or "none"
        return (
            f"{self.kept} of {self.events} events kept (dropped: {reasons}); {self.users} users, {self.empty_users} "
            f"left empty; {self.items} items, {self.unused_items} unused, {self.same_content} with the content of an "
            "earlier one"
        )


def validate(
    interactions: Interactions, items: Items, *, now: float | None = None, merge: bool = True
) -> tuple[Interactions, Report]:
    """Drop and count what cannot be: no user, no such item, no time, time travel, the same event twice, empty users.

    Two events of a user with an item at different times are two events; an event whose ``behaviours`` differ, too.

    Args:
        interactions: as loaded.
        items: as loaded; places in the result are places among them.
        now: unix seconds; later events are dropped. None: nothing is in the future.
        merge: events of an item with an earlier item's content become that item's: no model can tell the two apart.

    Returns:
        The events that are left, with ``item_ids`` of ``items``, and the report; it is logged, too.

    Raises:
        ValueError: nothing is left.
    """
    first = _first_of_content(items)
    place_of = dict(zip(items.ids, first.tolist() if merge else range(len(items)), strict=True))
    place_of |= {record["id"]: -2 for record in items.records if len(record) == 1}
    found = np.array([*(place_of.get(name, -1) for name in interactions.item_ids), -1])
    placed = replace(interactions, item_ids=items.ids, item=found[interactions.item])  # -1 looks at the last
    reasons = _reasons(placed, items, now)
    kept, empty = _without_empty_users(placed.take(reasons < 0))
    report = _report(interactions, reasons, kept, empty, items, first)
    if not len(kept):
        raise ValueError(
            f"No event is left: {report}. Are the items of both tables named alike, and are times in seconds? First "
            f"examples: {report.examples}"
        )
    logger.log(logging.WARNING if report.kept < report.events else logging.INFO, "Behaviour data: %s.", report)
    return kept, report


def _first_of_content(items: Items) -> np.ndarray:
    """(I,) place of the first item with the same content: of most items, and of those without content, their own."""
    first: dict[str, int] = {}
    found = []
    for place, record in enumerate(items.records):
        content = {name: value for name, value in record.items() if name != "id"}
        found.append(first.setdefault(item_key(content), place) if content else place)
    return np.array(found, dtype=np.int64)


def _reasons(placed: Interactions, items: Items, now: float | None) -> np.ndarray:
    """(N,) place in `REASONS` of the first thing that is wrong with each event, -1 for none."""
    time = placed.time
    with np.errstate(invalid="ignore"):  # NaN is neither before nor after
        wrong = {
            "missing_user": placed.user < 0,
            "unknown_item": placed.item == -1,
            "item_without_content": placed.item == -2,
            "invalid_time": ~(np.isfinite(time) & (time >= 0)),
            "before_release": time < items.released[np.maximum(placed.item, 0)],
            "in_the_future": time > (math.inf if now is None else now),
        }
    wrong["duplicate"] = _duplicates(placed)
    reasons = np.full(len(placed), -1)
    for reason in reversed(REASONS):  # the first is written last
        reasons[wrong[reason]] = REASONS.index(reason)
    return reasons


def _duplicates(placed: Interactions) -> np.ndarray:
    """(N,) True where an earlier event has the same user, item, time and behaviours."""
    columns = [*np.packbits(placed.behaviours, axis=1).T, placed.time, placed.item, placed.user]
    order = np.lexsort(columns)  # stable: of equal events the first comes first
    same = np.zeros(len(placed), dtype=bool)
    same[order[1:]] = np.all([column[order[1:]] == column[order[:-1]] for column in columns], axis=0)
    return same


def _without_empty_users(kept: Interactions) -> tuple[Interactions, list[str]]:
    """The same events with the names of their users only, and the names that are gone."""
    used, user = np.unique(kept.user, return_inverse=True)
    there = set(used.tolist())
    gone = [name for place, name in enumerate(kept.user_ids) if place not in there]
    return replace(kept, user_ids=tuple(kept.user_ids[place] for place in used), user=user), gone


def _report(
    given: Interactions, reasons: np.ndarray, kept: Interactions, empty: list[str], items: Items, first: np.ndarray
) -> Report:
    places = {reason: np.flatnonzero(reasons == number) for number, reason in enumerate(REASONS)}
    pairs, times = np.unique(np.stack([kept.user, kept.item]), axis=1, return_counts=True)
    repeated = pairs[:, times > 1].T  # (P, 2)
    same = np.flatnonzero(first != np.arange(len(items)))
    examples: dict[str, list[Any]] = {
        **{reason: [_example(given, place) for place in some[:MAX_EXAMPLES]] for reason, some in places.items()},
        "empty_users": empty[:MAX_EXAMPLES],
        "repeated_pairs": [[kept.user_ids[user], items.ids[item]] for user, item in repeated[:MAX_EXAMPLES]],
        "same_content": [[items.ids[place], items.ids[first[place]]] for place in same[:MAX_EXAMPLES]],
    }
    return Report(
        events=len(given),
        kept=len(kept),
        dropped={reason: len(some) for reason, some in places.items()},
        users=kept.num_users,
        empty_users=len(empty),
        items=len(items),
        unused_items=len(items) - len(np.unique(kept.item)),
        repeated_pairs=len(repeated),
        same_content=len(same),
        examples={name: some for name, some in examples.items() if some},
    )


def _example(given: Interactions, place: int) -> dict[str, Any]:
    """An event as JSON can hold it: no NaN."""
    user, item, time = given.user[place], given.item[place], float(given.time[place])
    shown = [name for name, there in zip(given.behaviour_names, given.behaviours[place], strict=True) if there]
    return {
        "user": given.user_ids[user] if user >= 0 else None,
        "item": given.item_ids[item] if item >= 0 else None,
        "time": time if math.isfinite(time) else None,
        "behaviours": shown,
    }
