"""Scores are the same with mteb and without; every model gets what it has, its own instruction, and a row an item."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from modeling_sail.evaluation import evaluate_job, revisions, tasks
from modeling_sail.evaluation.item_embedder import ItemEmbedder, model_digest
from modeling_sail.evaluation.mteb_encoder import SailEncoder, family_and_side, items_of, plain_encoder
from modeling_sail.evaluation.mteb_tasks import as_mteb, dataset_of, metadata_of, run_task
from modeling_sail.evaluation.tasks.task import Pairs, Retrieval, Task, score, unit, with_sequences
from mteb.cache import ResultCache
from mteb.models import EncoderProtocol, SearchProtocol
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.results.task_result import TaskResult
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch.utils.data import DataLoader

from modeling_sail import evaluation
from modeling_sail.cli import main

from .conftest import picture, sound
from .torchcodec_stand_in import ensure_torchcodec

KINDS = ("text", "image", "audio")


# --- models and tasks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_folder) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def texts_only(tiny) -> SentenceTransformer:
    """A text encoder of somebody else: random vectors of tokens, averaged."""
    torch.manual_seed(1)
    return SentenceTransformer(modules=[StaticEmbedding(tiny[1].tokenizer, embedding_dim=16)], device="cpu")


class Sights(InputModule):
    """As CLIP is: a text or a picture, never both; the mean colour, or the length and the last letter."""

    modalities = ["text", "image"]

    def preprocess(self, inputs, prompt=None, **kwargs):
        assert len({isinstance(one, str) for one in inputs}) == 1, "one modality a batch"
        rows = [[len(one), ord(one[-1]), 1] if isinstance(one, str) else np.mean(one, axis=(0, 1)) for one in inputs]
        return {"rows": torch.tensor(np.array(rows), dtype=torch.float32)}

    def forward(self, features, **kwargs):
        return features | {"sentence_embedding": features["rows"]}

    def get_embedding_dimension(self) -> int:
        return 3

    def save(self, *args, **kwargs) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Paths of four pictures, four sounds of two rates, and a picture that is none."""
    folder = tmp_path_factory.mktemp("media")
    for place in range(4):
        picture(place).save(folder / f"{place}.png")
        samples, hz = sound(place, 0.5, (8000, 44_100)[place % 2])
        soundfile.write(folder / f"{place}.wav", samples, hz)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def items(media) -> dict[str, dict]:
    """Items of every mix of modalities."""
    image, audio = [str(media / f"{place}.png") for place in range(4)], [str(media / f"{n}.wav") for n in range(4)]
    return {
        "a": {"title": "a red kangaroo", "image": image[0], "audio": audio[0]},
        "b": {"images": [image[1], image[2]]},
        "c": {"audio": audio[1]},
        "d": {"text": "owl", "tags": ["bird", "night"]},
        "e": {"title": "tea", "audio": audio[2]},
        "f": {"video": [image[3], image[0]], "ocr": "hot"},
    }


def made(load, **other) -> Task:
    declared = {
        "name": "TinyMixed",
        "family": "i2i",
        "group": "tests",
        "description": "Finds itself.",
        "source": "made up",
        "licence": "MIT",
        "date": ("2020-01-01", "2020-12-31"),
        "languages": {"default": ["eng-Latn"]},
        "query_modalities": KINDS,
        "target_modalities": KINDS,
        "main_score": "recall_at_10",
    }
    return Task(**(declared | other), load=load)


@pytest.fixture
def mixed(media) -> Task:
    """All mixes, sequences among the queries, and candidates that are none."""
    corpus = items(media)
    queries = {name: dict(item) for name, item in list(corpus.items())[:4]}
    queries["s"] = {"sequence": [corpus["a"], corpus["d"], corpus["c"]]}
    relevant = {"a": {"d"}, "b": {"f", "a"}, "c": {"e"}, "d": {"a"}, "s": {"b"}}
    data = Retrieval(
        queries,
        corpus,
        {name: frozenset(right) for name, right in relevant.items()},
        {name: frozenset({name}) for name in queries if name != "s"} | {"s": frozenset({"a", "c", "d"})},
    )
    return made(lambda: {"default": data})


@pytest.fixture
def pairs(media) -> Task:
    corpus = items(media)
    words = [{"text": word} for word in ("kangaroo", "owl", "", "hot tea")]
    data = Pairs(words, [corpus[name] for name in "adbe"], [1, 1, 0, 0])
    return made(
        lambda: {"default": data},
        name="TinyPairs",
        family="q2i",
        query_modalities=["text"],
        main_score="auc",
    )


def direct(model: SentenceTransformer, family: str):
    """The model asked without mteb, and without the adapter."""

    def encode(some, side):
        vectors = model.encode(list(some), prompt_name=f"{family}_{side}", errors="skip")
        return np.nan_to_num(vectors)

    return with_sequences(encode)


def loader(rows: list[dict]) -> DataLoader:
    return DataLoader(
        rows, batch_size=2, collate_fn=lambda some: {name: [row[name] for row in some] for name in some[0]}
    )


def encode(encoder: SailEncoder, rows: list[dict], **other) -> np.ndarray:
    settings = {"task_metadata": mteb.get_task("STS12").metadata, "hf_split": "test", "hf_subset": "default"}
    return encoder.encode(loader(rows), **(settings | other), show_progress_bar=False)


# --- mteb's own tasks -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mock_run_passes_every_mock_task_of_mteb(model, monkeypatch) -> None:
    ensure_torchcodec(monkeypatch)
    encoder = SailEncoder(model)
    assert isinstance(encoder, EncoderProtocol)
    statuses = dict(mteb.mock_run(encoder).items())
    assert len(statuses) >= 60
    assert {name: status for name, status in statuses.items() if not isinstance(status, TaskResult)} == {}
    assert not any(encoder.left_out.values())


def test_mixed_rates_frames_and_gaps_in_one_batch_embed_as_alone(model) -> None:
    encoder = SailEncoder(model)
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.ones(2, 400), sample_rate=16_000))
    frames = torch.arange(5 * 3 * 20 * 20, dtype=torch.int64).remainder(255).to(torch.uint8).reshape(5, 3, 20, 20)
    video = SimpleNamespace(
        metadata=SimpleNamespace(num_frames=5), get_frames_at=lambda indices: SimpleNamespace(data=frames[indices])
    )
    rows = [
        {"text": "one", "image": picture(1), "audio": {"array": sound(1)[0], "sampling_rate": 8000}, "video": None},
        {"text": "", "image": np.zeros((20, 30, 3), np.uint8), "audio": decoder, "video": video},
        {"text": "", "image": None, "audio": {"array": [0.5] * 900, "sampling_rate": 44_100}, "video": None},
        {"text": "", "image": None, "audio": None, "video": frames},
        {"text": "", "image": None, "audio": None, "video": None},
    ]
    together = encode(encoder, rows)
    assert together.shape == (5, 64) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 1, 1, 1, 0], atol=1e-5)
    alone = np.concatenate([encode(SailEncoder(model), [row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert dict(encoder.left_out["STS12"]).popitem()[1] == 1


def test_a_video_comes_without_its_sound_track_which_mteb_gives_apart() -> None:
    frames = items_of({"video": [torch.zeros(9, 3, 8, 8, dtype=torch.uint8)]}, num_frames=4)[0]["video"]
    assert len(frames) == 4 and isinstance(frames, list)


def test_a_broken_row_is_zeros_and_leaves_its_neighbours_alone(model, media, caplog) -> None:
    class Broken:
        def get_all_samples(self):
            raise OSError("the disk is gone")

    rows = [{"text": "one", "image": picture(1), "audio": None}, {"text": "two", "image": None, "audio": Broken()}]
    rows += [{"text": "", "image": str(media / "bad.png"), "audio": None}, {"text": "4", "image": None, "audio": None}]
    with caplog.at_level(logging.WARNING):
        encoder = SailEncoder(model)
        found = encode(encoder, rows)
        encode(encoder, rows)
    assert list(found.any(axis=1)) == [True, False, False, True]
    good = encode(SailEncoder(model), [rows[0], rows[3]])
    np.testing.assert_allclose(found[[0, 3]], good, atol=1e-6)
    reasons = encoder.left_out["STS12"]
    assert sum(reasons.values()) == 4 and "audio: the disk is gone" in reasons
    told = [record.message for record in caplog.records if "zeros" in record.message]
    assert len(told) == 1 and "2 of 4" in told[0]


@pytest.mark.parametrize(
    ("declared", "prompt_type", "columns", "expected"),
    [
        (("Retrieval", None, ["text"]), PromptType.query, ["text"], ("q2i", "query")),
        (("Any2AnyRetrieval", "t2it", ["text", "image"]), PromptType.document, ["text", "image"], ("q2i", "target")),
        (("Any2AnyRetrieval", "it2i", ["text", "image"]), PromptType.query, ["text", "image"], ("i2i", "query")),
        (("STS", None, ["text"]), None, ["text"], ("i2i", "query")),
        (("ImageClustering", "i2i", ["image"]), None, ["image"], ("i2i", "query")),
        (("AudioClassification", "a2c", ["audio"]), None, ["audio"], ("cls", "query")),
        (("ZeroShotClassification", "i2t", ["image", "text"]), None, ["image"], ("cls", "query")),
        (("ZeroShotClassification", "i2t", ["image", "text"]), None, ["text"], ("cls", "target")),
        (("Compositionality", "i2t", ["image", "text"]), None, ["text"], ("q2i", "query")),
        (("Compositionality", "i2t", ["image", "text"]), None, ["image"], ("q2i", "target")),
        (("PairClassification", "t2t", ["text"]), None, ["text"], ("i2i", "query")),
    ],
)
def test_a_task_of_mteb_has_the_family_and_side_of_the_table(declared, prompt_type, columns, expected, mixed) -> None:
    kind, category, modalities = declared
    fields = {"type": kind, "category": category, "modalities": modalities, "family": None}
    metadata = metadata_of(mixed).model_copy(update=fields)
    assert family_and_side(metadata, prompt_type, columns) == expected


# --- our tasks --------------------------------------------------------------------------------------------------------


def evaluated(encoder, task: Task) -> dict:
    found = mteb.evaluate(encoder, as_mteb(task), cache=None, show_progress_bar=False, co2_tracker=False)
    return found.task_results[0].scores["test"][0]


def test_scores_through_mteb_are_those_of_the_task_itself(model, mixed, pairs) -> None:
    for task in (mixed, pairs):
        expected = score(task.load()["default"], direct(model, task.family))
        found = evaluated(SailEncoder(model), task)
        assert found["main_score"] == found[task.main_score]
        assert found["separability_histogram"] == expected.pop("separability_histogram")
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert found["left_out"] == 1  # the empty word


def test_mteb_scores_a_model_that_only_searches_and_keeps_to_the_candidates(model, mixed) -> None:
    class Searcher:
        def __init__(self, inner) -> None:
            self.inner = SearchEncoderWrapper(inner)
            self.index, self.search, self.mteb_model_meta = self.inner.index, self.inner.search, inner.mteb_model_meta

    task = dataclasses.replace(mixed, load=lambda: {"default": plain_queries(mixed)})
    searcher = Searcher(SailEncoder(model))
    assert isinstance(searcher, SearchProtocol) and not isinstance(searcher, EncoderProtocol)
    found, expected = evaluated(searcher, task), evaluated(SailEncoder(model), task)
    for name in ("recall_at_1", "recall_at_10", "ndcg_at_10"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


def plain_queries(task: Task) -> Retrieval:
    """The task's data without the sequence, which only `score` knows."""
    data = task.load()["default"]
    return dataclasses.replace(data, queries={name: item for name, item in data.queries.items() if name != "s"})


def test_each_side_gets_its_own_instruction(model, mixed, pairs, monkeypatch) -> None:
    asked: list[tuple[str, int]] = []
    real = model.encode

    def spy(inputs, prompt_name=None, **settings):
        asked.append((prompt_name, len(inputs)))
        return real(inputs, prompt_name=prompt_name, **settings)

    monkeypatch.setattr(model, "encode", spy)
    evaluated(SailEncoder(model), mixed)
    # The sequence's items go as targets, which the corpus shares, and the queries beside it as queries.
    assert asked == [("i2i_query", 4), ("i2i_target", 3), ("i2i_target", 3)]
    asked.clear()
    evaluated(SailEncoder(model), pairs)
    assert asked == [("q2i_query", 4), ("q2i_target", 4)]


def test_items_of_several_tasks_are_embedded_once_and_the_memory_is_bounded(model, mixed, monkeypatch) -> None:
    encoder = SailEncoder(model)
    first = evaluated(encoder, mixed)
    monkeypatch.setattr(model, "encode", lambda *args, **settings: pytest.fail("embedded again"))
    assert evaluated(encoder, mixed) == first
    monkeypatch.undo()
    small = ItemEmbedder(model, cache_bytes=3 * (100 + 4 * 64))
    for word in "abcdefg":
        small.embed([word])
    assert len(small._known) == 3


def test_a_text_encoder_gets_text_only_and_what_has_none_is_zeros(texts_only, mixed) -> None:
    data = mixed.load()["default"]
    vectors, reasons = ItemEmbedder(texts_only).embed(list(data.corpus.values()))
    assert [bool(row.any()) for row in vectors] == [True, False, False, True, True, True]
    assert [bool(reason) for reason in reasons] == [False, True, True, False, False, False]
    expected = texts_only.encode(["title: a red kangaroo", "owl\ntags: bird, night", "title: tea", "ocr: hot"])
    np.testing.assert_allclose(vectors[[0, 3, 4, 5]], expected, atol=1e-6)
    found = evaluated(SailEncoder(texts_only), mixed)
    assert found["left_out"] == 4  # b and c on both sides
    assert "nothing is left" in reasons[1]


def test_a_model_of_one_modality_at_a_time_gives_the_mean_of_what_the_item_has(media) -> None:
    sights = SentenceTransformer(modules=[Sights()], device="cpu")
    given = items(media)
    vectors, reasons = ItemEmbedder(sights).embed(list(given.values()))
    assert [bool(reason) for reason in reasons] == [False, False, True, False, False, False]
    colours = {place: np.asarray(picture(place)).mean(axis=(0, 1)) for place in range(4)}
    text = np.array([len("title: a red kangaroo"), ord("o"), 1])
    np.testing.assert_allclose(vectors[0], unit(np.stack([text, colours[0]])).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(vectors[1], unit(np.stack([colours[1], colours[2]])).mean(axis=0), rtol=1e-5)
    frames = unit(np.stack([colours[3], colours[0]])).mean(axis=0)
    words = np.array([len("ocr: hot"), ord("t"), 1])
    np.testing.assert_allclose(vectors[5], unit(np.stack([words, frames])).mean(axis=0), rtol=1e-5)


def test_a_plain_encoder_of_mteb_meets_no_gaps(texts_only, pairs, mixed) -> None:
    for task in (pairs, mixed):
        plain = run_task(plain_encoder(texts_only, "a/b"), task)["default"]
        ours = run_task(SailEncoder(texts_only), task)["default"]
        assert plain["left_out"] == ours["left_out"] > 0
        assert plain[task.main_score] == pytest.approx(ours[task.main_score])
    heard = {}

    class Listener(AbsEncoder):
        mteb_model_meta = SailEncoder(texts_only, "a/c").mteb_model_meta.model_copy(update={"modalities": list(KINDS)})

        def encode(self, inputs, *, prompt_type, **settings):
            batches = list(inputs)
            for batch in batches:
                assert all(value is not None for values in batch.values() for value in values)
                heard.setdefault(tuple(batch), []).append(batch)
            return np.ones((sum(len(batch["id"]) for batch in batches), 2))

    evaluated(Listener(), mixed)
    assert {("id", "text", "image", "audio"), ("id", "image"), ("id", "audio"), ("id", "text")} <= set(heard)
    sounds = heard[("id", "audio")][0]["audio"]
    assert all(one["sampling_rate"] == 16_000 and len(one["array"]) == 8000 for one in sounds)


def test_the_table_of_a_task_has_the_standard_columns_and_no_gaps_in_text(media) -> None:
    table = dataset_of(list(items(media).values()), list("abcdef"))
    assert table.column_names == ["id", "text", "item", "image", "audio"]
    assert table["text"][1] == "" and table["text"][3] == "owl\ntags: bird, night"
    assert table[0]["image"].size == picture(0).size and table[3]["image"] is None
    assert table[2]["audio"]["path"].endswith("1.wav")
    assert dataset_of([{"text": "x"}]).column_names == ["id", "text", "item"]
    with pytest.raises(ValueError, match="paths and text"):
        dataset_of([{"image": picture(1)}])


def test_the_model_is_named_by_what_decides_its_vectors(model, texts_only, tiny_folder) -> None:
    meta = SailEncoder(model, "someone/tiny").mteb_model_meta
    assert meta.modalities == ["text", "image", "audio", "video"] and meta.embed_dim == 64
    assert meta.n_parameters == sum(one.numel() for one in model.parameters()) and meta.use_instructions
    again = SentenceTransformer(str(tiny_folder), trust_remote_code=True, device="cpu")
    assert model_digest(again) == meta.revision
    again.prompts["i2i_query"] += "!"
    assert model_digest(again) != meta.revision
    again.prompts["i2i_query"] = model.prompts["i2i_query"]
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-3
    assert model_digest(again) != meta.revision
    assert SailEncoder(texts_only).mteb_model_meta.modalities == ["text"]


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_every_registered_task_is_declared_as_mteb_wants_it(task) -> None:
    metadata = as_mteb(task).metadata
    metadata._validate_metadata()
    assert metadata.hf_subsets == list(task.languages)
    assert set(metadata.get_modalities(PromptType.query)) == set(task.query_modalities)
    assert set(metadata.get_modalities(PromptType.document)) == set(task.target_modalities)
    assert task.licence in metadata.description and metadata.family == task.family


# --- sail evaluate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def languages(media, monkeypatch) -> Task:
    """A registered task of two subsets."""
    corpus = items(media)
    relevant = {"d": frozenset({"d"})}
    data = {
        name: Retrieval({"d": {"text": word}}, corpus, relevant) for name, word in {"en": "owl", "fr": "hibou"}.items()
    }
    spoken = {"en": ["eng-Latn"], "fr": ["fra-Latn"]}
    task = made(lambda: data, name="TinyLanguages", languages=spoken, family="q2i", query_modalities=["text"])
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    return task


def test_evaluate_writes_results_a_summary_and_a_table_and_goes_on_where_it_was(
    languages, tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(tiny_folder), "--tasks", "TinyLanguages", "--out", str(out)]
    asked = []
    real = ItemEmbedder.embed
    monkeypatch.setattr(
        ItemEmbedder, "embed", lambda self, some, **given: asked.append(len(some)) or real(self, some, **given)
    )
    assert main([*command, "--subset", "fra"]) == 0
    assert asked == [1, 6]
    assert main(command) == 0  # only what is missing
    assert asked == [1, 6, 1, 6]
    capsys.readouterr()
    assert main(command) == 0
    assert asked == [1, 6, 1, 6]
    printed = capsys.readouterr().out
    rows = json.loads((out / "summary.json").read_text())
    assert [(row["subset"], row["task"]) for row in rows] == [("fr", "TinyLanguages"), ("en", "TinyLanguages")]
    assert f"{rows[1]['score']:.3f}" in printed and "recall_at_50" in printed
    cache = ResultCache(out)
    meta = SailEncoder(
        SentenceTransformer(str(tiny_folder), trust_remote_code=True), evaluate_job.name_of(str(tiny_folder))
    )
    written = cache.load_task_result("TinyLanguages", meta.mteb_model_meta)
    assert {one["hf_subset"] for one in written.scores["test"]} == {"en", "fr"}


def test_a_task_that_changed_is_run_again_and_another_model_stands_beside(
    model, texts_only, languages, tmp_path
) -> None:
    first = run_task(SailEncoder(model), languages, tmp_path)
    seen = []
    encoder = SailEncoder(model)
    encoder.embedder.embed = lambda some, **given: seen.append(1) or (np.eye(len(some), 64, dtype=np.float32), [])
    again = run_task(encoder, languages, tmp_path)
    assert again["fr"]["separability_auc"] == pytest.approx(first["fr"]["separability_auc"], abs=1e-5) and not seen
    run_task(encoder, dataclasses.replace(languages, description="Says it otherwise."), tmp_path)
    assert not seen
    data = languages.load()
    data["en"] = dataclasses.replace(data["en"], relevant={"d": frozenset({"e"})})
    changed = run_task(encoder, dataclasses.replace(languages, load=lambda: data), tmp_path)
    assert seen and changed["en"]["revision"] == changed["fr"]["revision"] != first["fr"]["revision"]
    run_task(SailEncoder(texts_only), languages, tmp_path)
    assert len(list(tmp_path.glob("results/*/*/TinyLanguages.json"))) == 2


def test_a_picture_that_was_replaced_and_another_scoring_are_measured_anew(model, tmp_path, monkeypatch) -> None:
    """The file that makes the data is the same, and so are all paths and ids."""
    path = tmp_path / "a.png"
    picture(1).save(path)
    corpus = {"a": {"image": str(path)}, "b": {"text": "tea"}}
    task = made(lambda: {"default": Retrieval({"q": {"text": "owl"}}, corpus, {"q": frozenset("a")})}, name="TinyFile")
    revisions_seen = [run_task(SailEncoder(model), task, tmp_path)["default"]["revision"]]
    picture(2).save(path)
    found = run_task(SailEncoder(model), task, tmp_path)["default"]
    fresh = run_task(SailEncoder(model), task)["default"]
    assert found["separability_positive_mean"] == pytest.approx(fresh["separability_positive_mean"], abs=1e-5)
    monkeypatch.setattr(revisions, "SCORING", revisions.SCORING + 1)
    revisions_seen += [found["revision"], run_task(SailEncoder(model), task, tmp_path)["default"]["revision"]]
    assert len(set(revisions_seen)) == 3
    (written,) = tmp_path.rglob("TinyFile.json")
    assert json.loads(written.read_text())["dataset_revision"] == revisions_seen[-1]


def test_the_summary_forgets_what_was_measured_on_other_data(languages, tiny_folder, tmp_path, monkeypatch) -> None:
    command = ["evaluate", "--model", str(tiny_folder), "--tasks", "TinyLanguages", "--out", str(tmp_path)]
    assert main(command) == 0
    data = languages.load()
    data["fr"] = dataclasses.replace(data["fr"], queries={"d": {"text": "chouette"}})
    monkeypatch.setitem(tasks.TASKS, "TinyLanguages", dataclasses.replace(languages, load=lambda: data))
    assert main([*command, "--subset", "fr"]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["subset"] for row in rows] == ["fr"], "the row of en is of data that are no more"
    (written,) = tmp_path.rglob("TinyLanguages.json")
    assert {one["hf_subset"] for one in json.loads(written.read_text())["scores"]["test"]} == {"fr"}
    assert main(command) == 0
    assert {row["subset"] for row in json.loads((tmp_path / "summary.json").read_text())} == {"en", "fr"}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("en", {"Named": ["en"], "Default": ["default"], "Both": ["en-fr"]}),
        ("eng", {"Named": ["en"], "Default": ["default"], "Both": ["en-fr"]}),
        ("eng-Latn", {"Named": ["en"], "Default": ["default"], "Both": ["en-fr"]}),
        ("ENG-LATN", {"Named": ["en"], "Default": ["default"], "Both": ["en-fr"]}),
        ("fra", {"Named": ["fr"], "Both": ["fr"]}),
        ("en-fr", {"Named": ["en-fr"], "Both": ["en-fr"]}),
        ("default", {"Default": ["default"], "Chinese": ["default"], "Italian": ["default"]}),
        ("zh", {"Chinese": ["default"]}),
        ("zho", {"Chinese": ["default"]}),
        ("ita", {"Italian": ["default"]}),
        ("ita-Latn", {"Italian": ["default"]}),
    ],
)
def test_a_language_is_one_whether_of_two_letters_three_or_with_its_script(asked, found) -> None:
    both = ["eng-Latn", "fra-Latn"]
    there = {
        "Named": {"en": both[:1], "fr": both[1:], "en-fr": both},
        "Default": {"default": both[:1]},
        "Both": {"fr": both[1:], "en-fr": both},
        "Chinese": {"default": ["zho-Hans"]},
        "Italian": {"default": ["ita-Latn"]},
    }
    some = [made(dict, name=name, languages=languages) for name, languages in there.items()]
    assert {task.name: names for task, names in evaluate_job._chosen_subsets(some, [asked])} == found


@pytest.mark.parametrize("asked", ["it", "zho-Hant", "english", "", "e", "en-"])
def test_a_language_that_no_task_has_is_answered_with_those_there_are(asked) -> None:
    some = [made(dict, languages={"en": ["eng-Latn"], "zh": ["zho-Hans"]}), made(dict)]
    with pytest.raises(ValueError, match=r"there are default \(eng-Latn\), en \(eng-Latn\), zh \(zho-Hans\)"):
        evaluate_job._chosen_subsets(some, ["en", asked])


def test_the_histograms_of_a_folder_are_one_page(languages, tiny_folder, tmp_path, capsys) -> None:
    command = ["evaluate", "--model", str(tiny_folder), "--tasks", "TinyLanguages", "--out", str(tmp_path)]
    assert main(command) == 0
    page = tmp_path / "separability.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2 and "TinyLanguages fr: AUC" in text and "TinyLanguages en: AUC" in text
    (written,) = tmp_path.rglob("TinyLanguages.json")
    (tmp_path / "results" / "cut" / "off").mkdir(parents=True)
    (tmp_path / "results" / "cut" / "off" / "A.json").write_text("{")
    assert main(command) == 0 and page.read_text(encoding="utf-8") == text
    one = json.loads(written.read_text())["scores"]["test"][0]["separability_histogram"]
    assert sum(one["positive"]) == 1 and len(one["edges"]) == 51 and all(type(n) is int for n in one["positive"])


def test_the_plain_backend_says_at_once_that_sounds_need_torchaudio(
    languages, tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *args, **given: pytest.fail("asked before it was told"))
    words = ["--model", str(tiny_folder), "--tasks", "TinyLanguages", "--out", str(tmp_path), "--backend", "plain"]
    assert main(["evaluate", *words]) == 2
    printed = capsys.readouterr()
    assert "failed: --backend plain reads sounds by torchaudio" in printed.out and "leave --backend out" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("kind", [RuntimeError, IndexError])
def test_a_task_that_fails_is_told_and_does_not_stop_the_others(
    languages, tiny_folder, tmp_path, monkeypatch, capsys, kind
) -> None:
    def fail():
        raise kind("the data set is not to be had\nmore")

    monkeypatch.setitem(tasks.TASKS, "TinyGone", made(fail, name="TinyGone"))
    names = ["TinyGone", "TinyLanguages"]
    assert main(["evaluate", "--model", str(tiny_folder), "--tasks", *names, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "the data set is not to be had" in printed.out and "TinyGone" in printed.err
    reasons = {row["task"]: row["reason"] for row in json.loads((tmp_path / "summary.json").read_text())}
    assert reasons == {"TinyGone": "the data set is not to be had", "TinyLanguages": ""}


@pytest.mark.parametrize("left", [0, 300])
def test_a_result_that_was_cut_off_is_put_aside_and_the_task_runs_again(model, languages, tmp_path, left) -> None:
    first = run_task(SailEncoder(model), languages, tmp_path)
    (path,) = tmp_path.rglob("TinyLanguages.json")
    path.write_bytes(path.read_bytes()[:left])
    again = run_task(SailEncoder(model), languages, tmp_path)
    assert again["fr"]["separability_auc"] == pytest.approx(first["fr"]["separability_auc"], abs=1e-5)
    assert path.with_suffix(".broken").is_file() and json.loads(path.read_text())


def test_models_that_differ_in_pooling_alone_are_not_taken_for_each_other(model) -> None:
    pooled = [
        SentenceTransformer(modules=[model[0], Pooling(model.get_embedding_dimension(), pooling_mode=mode)])
        for mode in ("mean", "cls")
    ]
    assert len({model_digest(model), *map(model_digest, pooled)}) == 3


def test_a_task_of_which_the_model_has_nothing_is_skipped_with_the_reason(
    languages, texts_only, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(evaluate_job, "load_model", lambda name, device: texts_only)
    seen = dataclasses.replace(languages, name="TinySeen", query_modalities=["image"])
    monkeypatch.setitem(tasks.TASKS, "TinySeen", seen)
    assert main(["evaluate", "--model", "a/b", "--tasks", "Tiny*", "--out", str(tmp_path), "--subset", "en"]) == 0
    assert "skipped: a side has image, the model text" in capsys.readouterr().out
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["ok", "skipped"]


def test_mistakes_are_one_line(languages, tiny_folder, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text('{"a": 1}')
    good = {"--model": str(tiny_folder), "--tasks": "TinyLanguages", "--out": str(tmp_path / "out")}
    mistakes = [
        ({"--tasks": "TinyLanguage"}, "TinyLanguages"),
        ({"--model": str(tmp_path / "empty")}, "sail build"),
        ({"--model": "no-such-folder"}, "no folder"),
        ({"--model": f"{tiny_folder}x"}, f"there are {tiny_folder.name}."),
        ({"--model": None}, "--model needed"),
        ({"--tasks": None}, "--tasks needed"),
        ({"--out": str(tmp_path / "file")}, "cannot be written"),
        ({"--out": str(tmp_path / "other")}, "no summary"),
        ({"--subset": "ru"}, "subset or language ru; there are en (eng-Latn), fr (fra-Latn)."),
        ({"--batch-size": "0"}, "sail evaluate: --batch-size 0: a batch has 1 item at least"),
        ({"--batch-size": "-3"}, "--batch-size -3"),
    ]
    for change, expected in mistakes:
        words = [word for name, value in (good | change).items() if value is not None for word in (name, value)]
        assert main(["evaluate", *words]) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("sail")]
        assert expected in line


def test_without_the_extra_tasks_are_listed_and_evaluating_says_what_is_missing(
    languages, tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    for name in ("mteb_encoder", "mteb_tasks"):
        monkeypatch.delitem(sys.modules, f"modeling_sail.evaluation.{name}")
        monkeypatch.delattr(evaluation, name)
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert main(["evaluate", "--list"]) == 0
    assert "TinyLanguages" in capsys.readouterr().out
    words = ["--model", str(tiny_folder), "--tasks", "TinyLanguages", "--out", str(tmp_path)]
    assert main(["evaluate", *words]) == 2
    assert "[eval]" in capsys.readouterr().err


def test_a_dataset_of_mteb_with_our_column_decodes_no_picture(model) -> None:
    table = Dataset.from_dict({"image": ["not there.png"], "item": [json.dumps({"text": "words"})]})
    rows = SailEncoder(model).encode(
        DataLoader(table), task_metadata=mteb.get_task("STS12").metadata, hf_split="test", hf_subset="default"
    )
    assert rows.any()
