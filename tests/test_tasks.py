"""Evaluation tasks: what is relevant is right, nothing answers itself, nothing that is trained on is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from modeling_sail.evaluation import tuxpaint_retrieval
from modeling_sail.evaluation.item_to_item import copair_targets
from modeling_sail.evaluation.sequences import filtered_cases, scores_of, sequence_recall, vanilla_cases
from modeling_sail.evaluation.tasks import (
    TASKS,
    classification,
    collaborative,
    content,
    find_tasks,
    held_out,
    names,
    pairs,
    queries,
    search,
    sequences,
)
from modeling_sail.evaluation.tasks.task import FAMILIES, Pairs, Retrieval, score, with_sequences
from modeling_sail.training.behaviour_job import read_behaviour
from modeling_sail.training.build import WEIGHTS
from modeling_sail.training.data import mini_pairs
from modeling_sail.training.data.tuxpaint import load_tuxpaint, name_key, split_by_name
from modeling_sail.training.recommendation.prepare import Settings, known_behaviour
from PIL import Image

from modeling_sail.items_sail import KNOWN_FIELDS

from .test_prepare import event_rows, known_of

MEDIA = {"image": "image", "audio": "audio", "video": "video"}  # field: modality; every other field is text
WITHOUT_BEHAVIOUR = [name for name in TASKS if not name.startswith("MovieLens")]


def stamp(path: str, name: str, french: str | None = None, *, speech: bool = True, effect: str | None = None) -> dict:
    """A row as `load_tuxpaint` gives it."""
    recorded = {"fr": f"{path}.fr.ogg"} if speech else {}
    given = {"en": name, "fr": french or f"le {name}"}
    row = {"id": f"tuxpaint/{path}", "category": path.rpartition("/")[0], "image": f"{path}.png", "effect": effect}
    return {**row, "names": given, "speech": recorded}


def drawing(path: str, title: str, *tags: str) -> dict:
    return {"id": f"openclipart/{path}", "title": title, "tags": list(tags), "image": f"{path}.png"}


def ids(data: Retrieval, query: str) -> set[str]:
    return {name.rpartition("/")[2] for name in data.relevant[query]}


# --- relations ------------------------------------------------------------------------------------------------------

STAMPS = [
    stamp("animals/cats/lion", "A lion."),
    stamp("animals/cats/cartoon/lion2", "The Lion"),
    stamp("animals/cats/tiger", "A tiger.", speech=False),
    stamp("animals/owl", "An owl.", effect="owl.ogg"),
    stamp("symbols/math/2", "Two.", effect="two.ogg"),
]


def test_pictures_of_one_name_find_each_other_and_never_themselves() -> None:
    data = content.same_name(STAMPS)
    assert {query: ids(data, query) for query in data.queries} == {
        "tuxpaint/animals/cats/lion": {"lion2"},
        "tuxpaint/animals/cats/cartoon/lion2": {"lion"},
    }
    assert data.excluded == {query: frozenset({query}) for query in data.queries}
    assert len(data.corpus) == 5  # who is like nobody can be found
    assert all(set(item) == {"image"} for item in data.corpus.values())


def test_a_category_is_two_levels_whatever_the_style() -> None:
    data = content.same_category(STAMPS)
    assert ids(data, "tuxpaint/animals/cats/tiger") == {"lion", "lion2"}
    assert set(data.queries) == {row["id"] for row in STAMPS[:3]}
    assert "audio" not in data.corpus["tuxpaint/animals/cats/tiger"]
    assert data.corpus["tuxpaint/animals/owl"] == {
        "title": "An owl.",
        "image": "animals/owl.png",
        "audio": "animals/owl.fr.ogg",
    }


def test_tags_are_alike_by_jaccard_whatever_their_case_and_without_upload_marks() -> None:
    rows = [
        drawing("a", "a", "Fruit", "food", "hash", "11"),
        drawing("b", "b", "fruit", "hash", "11"),
        drawing("c", "c", "hash", "11"),
        drawing("d", "d", "food", *"efghijkl"),
        drawing("e", "e", "food", "tree", "sea", "sky", "fog"),
    ]
    data = content.same_tags(rows, threshold=1 / 3)
    assert {name.rpartition("/")[2]: ids(data, name) for name in data.queries} == {
        "a": {"b", "d"},
        "b": {"a"},
        "d": {"a"},
    }
    assert len(content.same_tags(rows, threshold=0.51).queries) == 0


def test_a_picture_finds_all_recordings_of_its_name() -> None:
    data = content.picture_to_speech(STAMPS)
    assert data.relevant["tuxpaint/animals/cats/lion"] == {
        "tuxpaint/animals/cats/lion/speech",
        "tuxpaint/animals/cats/cartoon/lion2/speech",
    }
    assert "tuxpaint/animals/cats/tiger" not in data.queries and len(data.corpus) == 4
    assert data.corpus["tuxpaint/animals/owl/speech"] == {"audio": "animals/owl.fr.ogg"}


def test_a_picture_finds_the_sounds_of_its_thing_in_both_sources_but_no_digit_read_aloud() -> None:
    silent = stamp("animals/mammals/giraffe", "A giraffe.", effect="giraffe.ogg")
    named = [
        {"id": "gcompris/lang/owl", "names": {"en": "owl"}, "image": "owl.webp", "sound": "hoot.ogg"},
        {"id": "gcompris/lang/cow", "names": {"en": "cow"}, "image": "cow.webp", "sound": None},
    ]
    data = content.picture_to_sound([*STAMPS, silent], named)
    both = {"tuxpaint/animals/owl/sound", "gcompris/lang/owl/sound"}
    assert data.relevant == {"tuxpaint/animals/owl": both, "gcompris/lang/owl": both}
    assert {item["audio"] for item in data.corpus.values()} == {"owl.ogg", "hoot.ogg"}


def test_a_search_brings_together_what_shares_two_words_of_name_tags_and_emoji_keywords() -> None:
    emoji = {"id": "emoji/1f981", "title": "lion", "tags": ["feline", "zoo"], "image": "1f981.webp"}
    puma = drawing("puma", "puma", "feline", "zoo", "grey")
    mouse = drawing("mouse", "mouse", "grey", "zoo")
    data = search.same_search(STAMPS, [emoji, puma, mouse])
    assert set(data.corpus) == {
        STAMPS[0]["id"],
        STAMPS[1]["id"],
        "emoji/1f981",
        "openclipart/puma",
        "openclipart/mouse",
    }
    assert ids(data, "emoji/1f981") == {"puma"}  # of its own name are lion and lion2
    assert data.excluded["emoji/1f981"] == {"emoji/1f981", STAMPS[0]["id"], STAMPS[1]["id"]}
    assert ids(data, "openclipart/puma") == {"lion", "lion2", "1f981", "mouse"}
    assert ids(data, "openclipart/mouse") == {"puma"}


def test_a_tag_finds_all_its_pictures_if_two_agree() -> None:
    rows = [drawing("a", "a", "Fruit", "pear"), drawing("b", "b", "fruit", "fruit"), drawing("c", "c")]
    data = queries.tag_to_picture(rows)
    assert data.queries == {"tag/fruit": {"text": "fruit"}} and ids(data, "tag/fruit") == {"a", "b"}
    assert len(data.corpus) == 3


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_name_finds_all_items_that_bear_it_and_each_item_finds_its_name() -> None:
    there = names.name_to_item(STAMPS, ("en",), "image")
    back = names.item_to_name(STAMPS, ("en",), "image")
    assert ids(there, "name/lion") == {"lion", "lion2"} and there.queries["name/lion"] == {"text": "A lion."}
    assert back.corpus == there.queries and back.queries == there.corpus
    assert {(name, item) for name, items in there.relevant.items() for item in items} == {
        (name, item) for item, found in back.relevant.items() for name in found
    }


def test_what_another_language_calls_alike_is_one_name() -> None:
    rows = [stamp("a/mouse", "A mouse.", "Une souris."), stamp("b/mice", "A computer mouse.", "une souris")]
    assert ids(names.name_to_item(rows, ("fr",), "image"), "name/une souris") == {"mouse", "mice"}
    assert len(names.name_to_item(rows, ("en", "fr"), "image").queries) == 2  # the English name tells them apart


def test_rows_without_a_name_in_the_language_stay_in_the_corpus_and_a_thing_is_found_by_all_its_rows() -> None:
    rows = [{**row, "names": {**row["names"]}} for row in STAMPS[:4]]
    del rows[1]["names"]["fr"], rows[3]["names"]["fr"]
    data = names.name_to_item(rows, ("fr",), "image")
    assert len(data.corpus) == 4 and len(data.queries) == 2
    assert ids(data, "name/le a lion") == {"lion", "lion2"}
    assert len(names.item_to_name(rows, ("fr",), "image").queries) == 3


def test_names_find_the_same_items_in_every_language() -> None:
    data = queries.names_to_items(STAMPS)
    assert set(data) == set(TASKS["TuxPaintNameToItem"].languages)
    assert all(one.corpus == data["en"].corpus for one in data.values())
    assert all(set(item) == {"image", "audio"} for item in data["en"].corpus.values())
    assert data["en-fr"].queries["name/owl le an owl"] == {"text": "An owl. le An owl."}


def test_labels_are_of_every_level() -> None:
    assert classification.labels_of("symbols/money/00_symbols") == [
        "symbols",
        "symbols > money",
        "symbols > money > symbols",
    ]
    data = classification.item_to_labels(STAMPS)
    assert data.relevant["tuxpaint/animals/cats/tiger"] == {"label/animals", "label/animals > cats"}
    assert data.corpus["label/animals > cats > cartoon"] == {"text": "animals > cats > cartoon"}


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_hold_each_item_with_its_name_and_with_anothers_half_of_its_category() -> None:
    rows = [stamp(f"{folder}/{n}", f"{folder} {n}") for folder in ("cats", "dogs", "cars", "cups") for n in range(20)]
    data = pairs.name_item_pairs(rows)
    name_of, folder_of = (
        {row["image"]: value for row, value in zip(rows, values, strict=True)}
        for values in ([row["names"]["en"] for row in rows], [row["category"] for row in rows])
    )
    near = Counter()
    for query, target, label in zip(data.queries, data.targets, data.labels, strict=True):
        assert (query["text"] == name_of[target["image"]]) == bool(label)
        near[label] += query["text"].split()[0] == folder_of[target["image"]]
    assert data.labels.count(1) == data.labels.count(0) == near[1] == 80
    assert 40 <= near[0] <= 60  # half, and a quarter of the rest by chance
    assert data == pairs.name_item_pairs(rows) != pairs.name_item_pairs(rows, seed=1)


def test_pairs_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="2 spoken rows have one name"):
        pairs.name_item_pairs(STAMPS[:2])


# --- behaviour ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behaviour() -> sequences.Behaviour:
    known = known_of(event_rows())
    return sequences.Behaviour(known.interactions, known.items, known.split)


@pytest.mark.parametrize("name", ["vanilla", "filtered"])
def test_a_sequence_task_scores_as_the_sequence_test_of_the_same_cases(behaviour, name) -> None:
    events, time = behaviour.interactions, behaviour.split.time
    data = getattr(sequences, name)(behaviour)
    cases = (
        vanilla_cases(events, time)
        if name == "vanilla"
        else filtered_cases(events, time, labels=behaviour.items.labels)
    )
    vectors = np.random.default_rng(3).normal(size=(len(behaviour.items), 5))
    row_of = {record["title"]: vectors[place] for place, record in enumerate(behaviour.items.records)}
    found = score(data, with_sequences(lambda items, side: np.array([row_of[item["title"]] for item in items])))
    expected = sequence_recall(scores_of(vectors, cases), cases, events, candidates=np.unique(events.item))
    assert len(data.queries) == len(cases) > 50
    assert {k: found[f"recall_at_{k}"] for k in expected} == pytest.approx(expected)
    assert 0 < expected[1] < 1


def test_a_target_is_chosen_after_the_split_and_what_came_before_it_is_no_candidate(behaviour) -> None:
    data, events = sequences.vanilla(behaviour), behaviour.interactions
    for query, (target,) in ((query, found) for query, found in data.relevant.items()):
        user, item = events.user_ids.index(query.partition("/")[0]), events.item_ids.index(target)
        mine = events.user == user
        at = events.time[mine & (events.item == item)].min()
        assert at >= behaviour.split.time and target not in data.excluded[query]
        before = {events.item_ids[place] for place in events.item[mine & (events.time < at)]}
        assert before == data.excluded[query]
        titles = {behaviour.items.records[events.item_ids.index(one)]["title"] for one in before}
        assert {member["title"] for member in data.queries[query]["sequence"]} <= titles


def test_films_find_the_one_that_shares_their_consumers_after_the_split(behaviour) -> None:
    data = collaborative.co_consumption(behaviour, minimum=3)
    names_of = behaviour.items.ids
    expected = {names_of[one]: {names_of[other]} for one, other in copair_targets(behaviour.split.after, minimum=3)}
    assert data.relevant == expected and len(expected) > 10
    assert data.excluded == {query: frozenset({query}) for query in expected}
    assert all("id" not in item for item in data.corpus.values())


# --- what is held out -----------------------------------------------------------------------------------------------


TAGS = ["alpha", "beta"]


class Tree:
    """Four sources that all know the same thirty things, each with files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.things = [f"thing {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(30)]
        self.rows = {
            "tuxpaint": [self.stamp(n, thing, copy) for n, thing in enumerate(self.things) for copy in "xy"],
            "openclipart": [
                self.row(f"openclipart/{thing}", title=thing.title(), tags=[*TAGS, thing]) for thing in self.things
            ],
            "emoji": [
                self.row(f"emoji/{thing}", names={"en": thing, "fr": thing, "es": thing}, tags=TAGS)
                for thing in self.things
            ],
            "gcompris": [
                self.row(f"gcompris/{thing}", names={"en": thing}, sound=self.file(f"gcompris/{thing}.ogg"))
                for thing in self.things
            ],
        }

    def file(self, name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count += 1
        path.write_text(str(self.count))  # no two are alike
        return str(path)

    def row(self, name: str, **more: object) -> dict:
        return {"id": name, "image": self.file(f"{name}.png"), **more}

    def stamp(self, number: int, thing: str, copy: str) -> dict:
        category = f"folder{number % 3}/sub"
        place = f"tuxpaint/{category}/{thing}{copy}"
        called = {key: f"{key} {thing}" for key, _ in names.LANGUAGES.values()} | {"en": thing}
        more = {"speech": {"fr": self.file(f"{place}.fr.ogg")}, "effect": self.file(f"{place}.ogg")}
        return self.row(place, names=called, category=category, **more)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("sources"))


CACHES = (held_out.tuxpaint, held_out.illustrations, held_out.gcompris, held_out._test_rows, mini_pairs.load_sources)


def forget() -> None:
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def world(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tree in place of the real sources; ten of its things are held out by name."""
    for module in (held_out, mini_pairs):
        monkeypatch.setattr(module, "split_by_name", partial(split_by_name, test_names=10, validation_names=5))
        for name, rows in tree.rows.items():
            copies = lambda rows=rows: [dict(one) for one in rows]  # noqa: E731
            monkeypatch.setattr(module, f"load_{name}", copies, raising=module is held_out)
    monkeypatch.setattr(mini_pairs, "speak", lambda one, folder: {"en": f"{one['id']}.wav"})
    forget()
    yield
    forget()


def test_nothing_that_is_trained_on_is_asked(world) -> None:
    sources = mini_pairs.load_sources()
    rows = [row for part, some in sources.items() if part not in ("test", "validation") for row in some]
    trained = {row["image"] for row in rows} | {path for row in rows for path in row.get("speech", {}).values()}
    known = {held_out.key_of(row) for row in rows} | {name_key(tag) for row in rows for tag in row.get("tags", ())}
    asked = [*held_out.tuxpaint(), *held_out.illustrations()]
    assert len(rows) == 15 * 4 and len(asked) == 10 * 4
    assert not {held_out.key_of(row) for row in asked} & known
    for name in WITHOUT_BEHAVIOUR:
        for data in TASKS[name].load().values():
            media = {item[field] for item in items_of(data) for field in MEDIA if field in item}
            assert media and not media & trained, name


@pytest.mark.parametrize("name", WITHOUT_BEHAVIOUR)
def test_a_task_keeps_its_promises_and_loads_the_same_again(world, name) -> None:
    task = TASKS[name]
    data = task.load()
    check(task, data)
    forget()
    again = task.load()
    assert data == again
    assert all(list(data[one].queries) == list(again[one].queries) for one in data)  # in one order, too


def test_a_drawing_seen_under_another_name_is_left_out_and_a_picture_counts_once(tmp_path: Path) -> None:
    for name, content_ in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / f"{name}.png").write_text(content_)
    rows = [
        {"id": f"openclipart/{name}", "image": str(tmp_path / f"{name}.png"), "tags": [name, "tag"]} for name in "abc"
    ]
    seen = {"id": "tuxpaint/seasonal/leafrake", "image": "nowhere.png"}
    kept = held_out.unseen([*rows, seen])
    assert [(row["id"], row["tags"]) for row in kept] == [
        ("openclipart/a", ["a", "tag", "c"]),
        ("openclipart/b", ["b", "tag"]),
    ]
    assert rows[0]["tags"] == ["a", "tag"]


@pytest.mark.parametrize(
    ("path", "title", "kept"),
    [("food/pear_01", "Pear", True), ("food/banana", "pear", False), ("hats/t-shirt_01", "T-shirt", True)],
)
def test_a_title_that_the_file_does_not_bear_is_left_out(path, title, kept) -> None:
    assert held_out.says_its_title(drawing(path, title)) == kept


# --- registry -------------------------------------------------------------------------------------------------------


def test_tasks_are_found_by_name_family_group_and_pattern_each_once() -> None:
    assert [task.name for task in find_tasks(["tuxpaintsamename"])] == ["TuxPaintSameName"]
    assert [task.name for task in find_tasks(["MovieLensVanilla", "sequences"])] == [
        "MovieLensVanilla",
        "MovieLensFiltered",
    ]
    assert {task.family for task in find_tasks(["q2i"])} == {"q2i"} and len(find_tasks(["q2i"])) > 1
    assert {task.group for task in find_tasks(["content understanding"])} == {"content understanding"}
    assert {task.name for task in find_tasks(["MovieLens*"])} == {
        name for name in TASKS if name.startswith("MovieLens")
    }
    assert len(find_tasks(["*"])) == len(find_tasks([*FAMILIES])) == len(TASKS)


def test_a_name_that_fits_nothing_is_answered_with_what_comes_near() -> None:
    with pytest.raises(ValueError, match="'TuxPaintSameNames'.*Did you mean TuxPaintSameName"):
        find_tasks(["TuxPaintSameNames"])
    with pytest.raises(ValueError, match="Did you mean .*MovieLens"):
        find_tasks(["movielenz"])
    with pytest.raises(ValueError, match="There are TuxPaintSameName.*Families: i2i, q2i, cls; groups: "):
        find_tasks(["zzzz"])


def test_every_task_tells_where_its_data_come_from() -> None:
    for task in TASKS.values():
        assert task.description.endswith(".") and task.source and task.licence and task.languages
        assert task.date[0] < task.date[1]
        assert any(word in task.description for word in ("held out of all training", "No recipe", "after the split"))


# --- what every task promises ---------------------------------------------------------------------------------------


def items_of(data: Retrieval | Pairs, side: str | None = None) -> list[dict]:
    sides = {
        "query": list(data.queries) if isinstance(data, Pairs) else list(data.queries.values()),
        "target": list(data.targets) if isinstance(data, Pairs) else list(data.corpus.values()),
    }
    items = sides[side] if side else sides["query"] + sides["target"]
    return [member for item in items for member in item.get("sequence", [item])]


def check(task, data) -> None:
    """Subsets, modalities, fields and relations are what the contract says."""
    assert set(data) == set(task.languages)
    for side, declared in (("query", task.query_modalities), ("target", task.target_modalities)):
        items = [item for one in data.values() for item in items_of(one, side)]
        assert {MEDIA.get(field, "text") for item in items for field in item} == set(declared), side
        assert all(item and set(item) < set(KNOWN_FIELDS) and all(item.values()) for item in items)
        for path in {item[field] for item in items for field in MEDIA if field in item}:
            assert Path(path).is_file(), path
    for one in data.values():
        check_relations(one)
        found = score(one, with_sequences(lambda items, side: np.random.default_rng(0).normal(size=(len(items), 16))))
        assert 0 <= found[task.main_score] <= 1


def check_relations(data: Retrieval | Pairs) -> None:
    if isinstance(data, Pairs):
        assert len(data.queries) == len(data.targets) == len(data.labels) and set(data.labels) == {0, 1}
        return
    assert data.queries and set(data.relevant) == set(data.queries) >= set(data.excluded)
    for query, found in data.relevant.items():
        out = data.excluded.get(query, frozenset())
        assert found and found <= set(data.corpus) >= out and not found & out
        assert query not in data.corpus or query in out  # nothing finds itself


# --- the real data --------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize("name", TASKS)
def test_the_real_task_keeps_its_promises_and_asks_enough(name) -> None:
    data = TASKS[name].load()
    check(TASKS[name], data)
    assert all(len(one.queries) >= 100 for one in data.values())


@pytest.mark.network
def test_the_real_sequences_are_those_that_mini_cre_is_asked() -> None:
    known = sequences.movielens()
    asked = known_behaviour(*read_behaviour("movielens"), Settings(unseen_share=0.15))
    assert asked.split.time == known.split.time
    assert vanilla_cases(asked.interactions, asked.split.time) == vanilla_cases(known.interactions, known.split.time)


@pytest.mark.network
def test_what_ships_with_mini_was_measured_on_the_held_out_drawings_that_nothing_saw() -> None:
    """By the data alone: the test rows of Tux Paint without `SEEN`, a picture once, and their names."""
    shipped = {
        row["task"]: (row["queries"], row["candidates"])
        for row in json.loads((WEIGHTS / "mini" / "retrieval.json").read_text(encoding="utf-8"))
    }
    rows = split_by_name(load_tuxpaint())["test"]
    once = {Path(row["image"]).read_bytes(): row for row in reversed(rows) if row["id"] not in held_out.SEEN}
    said = [row for row in once.values() if "fr" in row["speech"] and "fr" in row["names"]]
    assert len(once) < len(rows)
    assert shipped["picture -> name"] == (len(once), len({name_key(row["names"]["en"]) for row in once.values()}))
    assert shipped["picture -> speech"] == (len(said), len(said))
    assert shipped["speech -> name"][0] == shipped["name -> item (picture+speech)"][1] == len(said)
    made = tuxpaint_retrieval.tasks(held_out.tuxpaint()) | tuxpaint_retrieval.unseen_tasks(held_out.gcompris())
    assert shipped == {name: (len(some), len(others)) for name, (some, others, _) in made.items()}


def outline(path: str) -> np.ndarray:
    """(24, 24, 3) of what is not transparent, on white."""
    image = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    cut = ground.crop(image.getchannel("A").getbbox()).convert("RGB").resize((24, 24), Image.Resampling.BILINEAR)
    return np.asarray(cut, dtype=np.float32) / 255


@pytest.mark.network
@pytest.mark.slow
def test_no_real_picture_or_name_is_trained_on() -> None:
    sources = mini_pairs.load_sources()
    rows = [row for part, some in sources.items() if part not in ("test", "validation") for row in some]
    asked = [*held_out.tuxpaint(), *held_out.illustrations(), *held_out.gcompris()]
    held = {held_out.key_of(row) for row in asked if not row["id"].startswith("gcompris")}
    assert not held & (
        {held_out.key_of(row) for row in rows} | {name_key(t) for row in rows for t in row.get("tags", ())}
    )
    assert not {row["image"] for row in asked} & {row["image"] for row in rows}
    trained = np.stack([outline(row["image"]) for row in rows])
    for row in asked:
        mine = outline(row["image"])
        contrast = ((mine - mine.mean((0, 1))) ** 2).mean()
        nearest = ((trained - mine) ** 2).mean((1, 2, 3)).min()
        assert nearest >= 0.015 * contrast, f"{row['id']} is a drawing that is trained on: add it to SEEN"
