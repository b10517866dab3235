"""What the recommenders beside ours promise: nothing of the future or unseen, the same for a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from modeling_sail.evaluation.recommenders import (
    SASRec,
    popularity,
    positive_sequences,
    train_sasrec,
    windows,
)
from modeling_sail.training.recommendation.behaviour import Interactions

BEHAVIOURS = ("liked", "loved")
SMALL = {"dim": 16, "layers": 1, "heads": 2, "length": 6, "batch_size": 8, "learning_rate": 1e-2, "progress": False}


def log_of(*events: tuple[int, int, float, int], num_items: int = 0) -> Interactions:
    """Events (user, item, time, positive behaviours)."""
    events = sorted(events, key=lambda event: (event[0], event[2]))  # stable
    user, item, time, counts = (np.array(column) for column in zip(*events, strict=True))
    users, items = (tuple(map(str, range(n))) for n in (user.max() + 1, max(num_items, item.max() + 1)))
    behaviours = np.arange(len(BEHAVIOURS)) < counts[:, None]
    return Interactions(users, items, BEHAVIOURS, user, item, time.astype(float), behaviours)


def cycles(num_users: int = 24, steps: int = 9, num_items: int = 3) -> Interactions:
    """Each user goes a -> b -> c -> a, each from another start."""
    walks = [(user, (user + step) % 3, float(step), 1) for user in range(num_users) for step in range(steps)]
    return log_of(*walks, num_items=num_items)


@pytest.fixture(scope="module")
def cyclist() -> SASRec:
    """Trained on the cycle, of 5 items of which two are never seen."""
    return train_sasrec(cycles(num_items=5), split_time=100.0, epochs=12, dropout=0.0, seed=1, **SMALL)


# --- popularity -----------------------------------------------------------------------------------------------------


def test_popularity_counts_positive_events() -> None:
    log = log_of((0, 0, 1, 1), (0, 2, 2, 2), (1, 2, 1, 1), (1, 1, 3, 0))
    assert popularity(log, 4, split_time=4.0).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("split_time", [3.0, 2.5, float("nan")])
def test_nothing_learns_from_events_after_the_split(split_time: float) -> None:
    log = log_of((0, 0, 1, 1), (0, 1, 2, 1), (0, 2, 3, 1))
    with pytest.raises(ValueError, match="would leak"):
        popularity(log, 3, split_time=split_time)
    with pytest.raises(ValueError, match="would leak"):
        train_sasrec(log, split_time=split_time, epochs=1, **SMALL)


def test_popularity_refuses_items_beyond_their_number() -> None:
    with pytest.raises(ValueError, match="num_items=2"):
        popularity(log_of((0, 2, 1, 1)), 2, split_time=4.0)


# --- what SASRec reads ----------------------------------------------------------------------------------------------


def test_sequences_hold_positive_items_in_time_without_immediate_repetition() -> None:
    log = log_of((0, 3, 1, 1), (0, 3, 2, 2), (0, 1, 3, 0), (0, 0, 5, 1), (0, 3, 9, 1), (1, 1, 0, 0), (2, 2, 1, 1))
    assert [some.tolist() for some in positive_sequences(log)] == [[3, 0, 3], [2]]


@pytest.mark.parametrize(("num_items", "length"), [(1, 1), (1, 4), (4, 4), (5, 4), (9, 4), (10, 3)])
def test_windows_have_each_item_once_as_the_target_of_the_one_before(num_items: int, length: int) -> None:
    items = np.arange(num_items) + 10
    found = windows(items, length, start=99)
    targets = np.concatenate([some for _, some in found[::-1]])
    inputs = np.concatenate([some for some, _ in found[::-1]])
    assert targets.tolist() == items.tolist()
    assert inputs.tolist() == [99, *items[:-1].tolist()]
    assert all(len(one) == len(other) <= length for one, other in found)
    assert len(found[0][0]) == min(length, num_items), "the newest window is the full one"


def test_no_state_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = SASRec(np.ones(7, dtype=bool), dim=16, layers=2, heads=2, length=6, dropout=0.0)
    inputs = torch.randint(0, 7, (4, 6))
    changed = inputs.clone()
    changed[:, 3:] = (inputs[:, 3:] + 1) % 7
    with torch.no_grad():
        assert torch.allclose(model(inputs)[:, :3], model(changed)[:, :3], atol=1e-6)
        assert not torch.allclose(model(inputs)[:, 3:], model(changed)[:, 3:], atol=1e-2)


def test_each_parameter_has_a_gradient() -> None:
    torch.manual_seed(0)
    model = SASRec(np.ones(7, dtype=bool), dim=16, layers=2, heads=2, length=6, dropout=0.0)
    model.logits(model(torch.randint(0, 8, (4, 6))).flatten(0, 1)).logsumexp(dim=1).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


# --- what SASRec promises -------------------------------------------------------------------------------------------


def test_sasrec_learns_a_cycle(cyclist: SASRec) -> None:
    asked = [[0], [1, 2], [2, 0, 1], [0, 1, 2] * 5]
    assert cyclist.scores(asked).argmax(axis=1).tolist() == [1, 0, 2, 0]
    scores = cyclist.scores([[0, 1, 2] * 5])[0, :3]
    assert np.exp(scores[0]) / np.exp(scores).sum() > 0.9


def test_items_without_an_event_score_minus_infinity_and_are_passed_over(cyclist: SASRec) -> None:
    scores = cyclist.scores([[0, 1], [0, 4, 1, 3], [], [4]])
    assert scores.shape == (4, 5) and scores.dtype == np.float32
    assert np.isneginf(scores[:, 3:]).all() and np.isfinite(scores[:, :3]).all()
    assert np.allclose(scores[0, :3], scores[1, :3], atol=1e-5)
    assert np.allclose(scores[2, :3], scores[3, :3], atol=1e-5)


def test_an_item_with_events_of_which_none_is_positive_is_seen() -> None:
    log = log_of((0, 0, 1, 1), (0, 1, 2, 1), (0, 2, 3, 0))
    model = train_sasrec(log, split_time=9.0, epochs=1, **SMALL)
    assert model.seen.tolist() == [True, True, True]


def test_a_sequence_scores_the_same_alone_and_among_others(cyclist: SASRec) -> None:
    sequences = [[0], [1, 2], [], [0, 1, 2] * 7, [2, 2]]
    together = cyclist.scores(sequences)
    alone = np.concatenate([cyclist.scores([some]) for some in sequences])
    assert np.allclose(together[:, :3], alone[:, :3], atol=1e-5)
    assert cyclist.scores([]).shape == (0, 5)


def test_only_the_newest_items_count(cyclist: SASRec) -> None:
    newest = [1, 2, 0, 1, 2, 0]  # as long as the model looks back
    assert np.array_equal(cyclist.scores([[2, 1, 1, *newest]]), cyclist.scores([[0, *newest]]))


def test_one_seed_gives_one_model_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (
        train_sasrec(cycles(6), split_time=100.0, epochs=2, dropout=0.3, seed=seed, **SMALL) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(one.scores([[0, 1]]), again.scores([[0, 1]]))
    assert not np.array_equal(one.scores([[0, 1]]), other.scores([[0, 1]]))


def test_the_best_epoch_is_kept_and_training_stops_after_it() -> None:
    settings = {**SMALL, "learning_rate": 0.3}  # so much that it falls apart
    model = train_sasrec(cycles(), split_time=100.0, epochs=30, patience=3, seed=0, **settings)
    keys = [(epoch.recall, -epoch.loss) for epoch in model.validation]
    assert model.best_epoch == keys.index(max(keys))
    assert len(keys) == min(30, model.best_epoch + 4) < 30
    held_out = positive_sequences(cycles())
    scores = torch.from_numpy(model.scores([some[:-1] for some in held_out]))
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor([int(some[-1]) for some in held_out]))
    assert float(loss) == pytest.approx(model.validation[model.best_epoch].loss, abs=1e-5)
    assert not model.training


def test_the_held_out_item_is_not_trained_on() -> None:
    """Logs that differ in each user's last item alone give the same weights after one epoch."""
    walks = [(user, (user + step) % 3, float(step), 1) for user in range(6) for step in range(4)]
    seen = [(6, item, 1.0, 0) for item in (3, 4)]  # by somebody who likes neither
    logs = [log_of(*walks, *((user, last, 9.0, 1) for user in range(6)), *seen) for last in (3, 4)]
    one, other = (train_sasrec(log, split_time=10.0, epochs=1, **SMALL) for log in logs)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.validation != other.validation


@pytest.mark.parametrize("sequence", [[3], [-1], [0, 99]])
def test_places_that_are_no_items_are_refused(sequence: list[int]) -> None:
    with pytest.raises(ValueError, match=r"places from 0 to 2"):
        SASRec(np.ones(3, dtype=bool), dim=8).scores([sequence])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"patience": 0}, "at least 1"),
        ({"dim": 15}, "divide"),
        ({"length": 0}, "length"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_sasrec(cycles(2), split_time=100.0, **{**SMALL, **changed})


def test_without_two_positive_items_of_anybody_nothing_can_be_held_out() -> None:
    with pytest.raises(ValueError, match="two positive items"):
        train_sasrec(log_of((0, 0, 1, 1), (1, 1, 1, 1)), split_time=9.0, **SMALL)
