"""What behaviour does to the embedding (SAIL-Embedding, sections 3.3.5 and 4.3): the paper's tables on MovieLens-100K.

    python -m modeling_sail.evaluation.cre --model build/mini --seeds 0 1 2

For each seed: `sail behaviour`, the stages of `mini-cre`, and each stage's model beside popularity, the ID teachers and
SASRec. Unusual: some items are set aside, so that nothing has learned from an event of theirs, before the split or
after; what is asked of them is a cold start. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training.behaviour_job import MOVIELENS, embedder, read_behaviour
from ..training.build import load_built
from ..training.collate import Collator
from ..training.files import whole, write_json, write_text
from ..training.recipe import load_recipe
from ..training.recommendation.interests import Limits, Pair
from ..training.recommendation.prepare import Known, Settings, clusters_of, known_behaviour, prepare, tables_of
from ..training.recommendation.tables import IDTable
from ..training.recommendation.teachers import als_fold_in, train_teachers
from ..training.semantic_ids import fit_semantic_ids
from ..training.stages import run_recipe
from ..training.survey import model_hash
from .item_to_item import alignment, cluster_relevant, content_pairs_relevant, copair_targets, i2i_recall
from .ranker import base_features, compare, match_features, ranking_rows, sid_features
from .recommenders import popularity, train_sasrec
from .reports import bar_chart, spread
from .sequences import filtered_cases, recall_of_ranks, scores_of, target_ranks, vanilla_cases

logger = logging.getLogger(__name__)

Values = dict[str, float]

# MovieLens: few users, so each gives ten targets; and hardly any two films share half of their consumers.
SETTINGS = Settings(unseen_share=0.15, limits=Limits(behaviour=0.15, targets=10))
CASES_PER_USER = 5
KS = (1, 10, 25)
COLD_KS = (10, 25, 50)
I2I_KS = (50, 100)
ID_CLUSTERS = 32
ORACLE = "als"  # whose neighbours of unseen items are the truth that nobody learned
SID_SIZES = (32, 32)
# Questions that stand in one table: how they begin.
GROUPS = (("vanilla", "filtered"), ("unseen",), ("copairs",), ("ID-i2i", "content-i2i"))

# What the picture shows, and of whom.
SHOWN = ("vanilla R@25", "filtered R@25", "copairs top_k_overlap", "ID-i2i R@50", "content-i2i R@50")
COLORS = {"before": "#bbb", "content": "#888", "seq2item": "#69c", "id2item": "#c33"}


@dataclass
class Questions:
    """All that is asked of a recommender or an embedding, for one seed.

    Attributes:
        known: the behaviour.
        tables: of the teachers, which learned nothing of the unseen items.
        seed: of the drawn sequences and the k-means.
    """

    known: Known
    tables: dict[str, IDTable]
    seed: int

    @cached_property
    def cases(self) -> dict[str, list[Pair]]:
        """By the name of the test."""
        events, time = self.known.interactions, self.known.split.time
        options = {"targets": CASES_PER_USER}
        return {
            "vanilla": vanilla_cases(events, time, seed=self.seed, **options),
            "filtered": filtered_cases(events, time, labels=self.known.items.labels, **options),
        }

    @cached_property
    def candidates(self) -> np.ndarray:
        """Items that anybody has ever chosen."""
        return np.unique(self.known.interactions.item)

    @cached_property
    def relations(self) -> dict[str, np.ndarray]:
        """(I, I) what is relevant to what, by the name of the row."""
        known, unseen = self.known, self.known.unseen
        found = {"content-i2i": content_pairs_relevant(known.items)}
        found |= {f"ID-i2i {name}": self._clusters(table) for name, table in self.tables.items()}
        oracle = train_teachers(known.split.before, [ORACLE], split_time=known.split.time, seed=self.seed)[ORACLE]
        found["ID-i2i of unseen items"] = self._clusters(oracle) & unseen[:, None]
        return found

    def _clusters(self, table: IDTable) -> np.ndarray:
        vectors, there = table.rows_for(self.known.items.ids)
        clusters = clusters_of(vectors, ID_CLUSTERS, self.seed)
        return cluster_relevant(np.where(there, clusters, -1))

    @cached_property
    def copairs(self) -> np.ndarray:
        """(P, 2) items that the same users chose after the split, of those that every teacher knows."""
        known = np.ones(len(self.known.items), dtype=bool)
        for table in self.tables.values():
            known &= table.rows_for(self.known.items.ids)[1]
        after = self.known.split.after
        return copair_targets(after.take(known[after.item]))

    # -- questions ---------------------------------------------------------------------------------------------------

    def recommend(self, scores: Callable[[list[Pair]], np.ndarray]) -> Values:
        """Recall of the sequence tests, of seen and of unseen targets, for a function from cases to (Q, I) scores."""
        found = {}
        for name, cases in self.cases.items():
            ranks = target_ranks(scores(cases), cases, self.known.interactions, self.candidates)
            cold = self.known.unseen[[case.target for case in cases]]
            for k, value in recall_of_ranks(ranks[~cold], KS).items():
                found[f"{name} R@{k}"] = value
            if name == "vanilla":
                found |= {f"unseen R@{k}": value for k, value in recall_of_ranks(ranks[cold], COLD_KS).items()}
        return found | self._among_unseen(scores)

    def _among_unseen(self, scores: Callable[[list[Pair]], np.ndarray]) -> Values:
        """The same where only unseen items compete: who knows nothing of them can at best guess."""
        unseen = np.intersect1d(np.flatnonzero(self.known.unseen), self.candidates)
        cases = [case for case in self.cases["vanilla"] if self.known.unseen[case.target]]
        ranks = target_ranks(scores(cases), cases, self.known.interactions, unseen)
        return {f"unseen among unseen R@{k}": value for k, value in recall_of_ranks(ranks, COLD_KS).items()}

    def embedding(self, embeddings: np.ndarray) -> Values:
        """Everything that can be asked of (I, D) embeddings; rows of zeros where there is none."""
        found = self.recommend(lambda cases: scores_of(embeddings, cases))
        for name, value in alignment(embeddings, self.copairs, seed=self.seed).items():
            found[f"copairs {name}"] = value
        recalls: dict[str, list[float]] = {}
        for name, relevant in self.relations.items():
            row = "ID-i2i" if name.startswith("ID-i2i ") and "unseen" not in name else name
            for k, value in i2i_recall(embeddings, relevant, I2I_KS).items():
                recalls.setdefault(f"{row} R@{k}", []).append(value)
        return found | {name: statistics.mean(values) for name, values in recalls.items()}


# --- whom is asked --------------------------------------------------------------------------------------------------


def recommenders(asked: Questions) -> dict[str, Values]:
    """Popularity, the teachers and SASRec, by name."""
    known = asked.known
    ids, time, size = known.items.ids, known.split.time, len(known.items)
    popular = popularity(known.learned, size, split_time=time).astype(np.float32)
    by_label = label_popularity(popular, known.items.labels)
    found = {
        "popularity": asked.recommend(lambda cases: np.tile(popular, (len(cases), 1))),
        "popularity of labels": asked.recommend(lambda cases: np.tile(by_label, (len(cases), 1))),
    }
    for name, table in asked.tables.items():
        found[name] = asked.embedding(table.rows_for(ids)[0])

    def fold_in(cases: list[Pair]) -> np.ndarray:
        histories = [np.array(case.sequence) for case in cases]
        return als_fold_in(known.learned, histories, split_time=time, seed=asked.seed)

    found["als, its own users"] = asked.recommend(fold_in)
    model = train_sasrec(known.learned, split_time=time, seed=asked.seed)
    found["SASRec"] = asked.recommend(lambda cases: model.scores([case.sequence for case in cases]))
    return found


def label_popularity(popular: np.ndarray, labels: Sequence[frozenset[str]]) -> np.ndarray:
    """(I,) what an item's labels say of its popularity, the mean of the means of their items: all of an unseen item."""
    names = sorted(set().union(*labels))
    hot = np.array([[name in some for name in names] for some in labels], dtype=np.float32)  # (I, L)
    means = hot.T @ popular / np.maximum(hot.sum(axis=0), 1)
    return (hot @ means / np.maximum(hot.sum(axis=1), 1)).astype(np.float32)


def embeddings_of(folder: Path, items: Sequence[dict[str, Any]], kept: Path) -> np.ndarray:
    """(I, D) by a saved model; what is in ``kept`` already is read."""
    if not kept.is_file():
        model, processor = load_built(folder)
        with whole(kept) as partial, partial.open("wb") as file:
            np.save(file, embedder(model.eval(), Collator(processor))(items))
    return np.load(kept, allow_pickle=False)


def train(known: Known, model: Path, work: Path, settings: Settings, overrides: Sequence[str]) -> dict[str, Path]:
    """`sail behaviour` and the stages of mini-cre; folders of the models by name, the one before all of them first."""
    data = work / "data"
    loaded, processor = load_built(model)
    embed = embedder(loaded.eval(), Collator(processor))
    prepare(known, embed, data, settings, embedded_by=model_hash(loaded))
    places = [f"model={model}", f"output={work / 'stages'}", f"seed={settings.seed}"]
    recipe = load_recipe("mini-cre", [*places, *overrides])
    for name, spec in recipe.datasets.items():
        spec.path = str(data / f"{name}.parquet")
        spec.items = None if spec.items is None else str(data / "items.parquet")
        spec.tables = [str(data / "tables.parquet")] if spec.tables else []
    run_recipe(recipe)
    return {"before": model, **{name: work / "stages" / name / "model" for name in recipe.stages}}


def downstream(asked: Questions, embeddings: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """AUC and GAUC of the fixed ranker, by question and by ``embedding: features``."""
    known, found = asked.known, {}
    for question in ("liked", "chosen"):
        rows = ranking_rows(known.interactions, known.split.time, question=question, items=known.items, seed=asked.seed)
        base = base_features(rows, known.interactions, known.items)
        for name, vectors in embeddings.items():
            there = vectors.any(axis=1)
            ids = fit_semantic_ids(
                torch.from_numpy(vectors[there]), scheme="rq", sizes=list(SID_SIZES), seed=asked.seed
            )
            codes = ids.encode(torch.from_numpy(vectors)).numpy()
            sets = compare(rows, base, match_features(rows, vectors), sid_features(rows, codes))
            for features, values in sets.items():
                label = features if features == "base" else f"{name}: {features}"
                found.setdefault(question, {})[label] = {key: values[key] for key in ("auc", "gauc", "rows")}
    return found


# --- all seeds ------------------------------------------------------------------------------------------------------


def run_seed(seed: int, model: Path, work: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and ask everything for one seed; each answer is kept in ``work``, and read where it is there."""
    settings = replace(SETTINGS, seed=seed)
    known = known_behaviour(*read_behaviour(MOVIELENS), settings)
    folders = train(known, model, work, settings, overrides)
    asked = Questions(known, tables_of(work / "data"), seed)
    vectors = {
        name: embeddings_of(folder, known.items.records, work / f"items-{name}.npy") for name, folder in folders.items()
    }
    found = {
        name: _kept(work / f"{name}.json", lambda v=values: asked.embedding(v)) for name, values in vectors.items()
    }
    beside = _kept(work / "recommenders.json", lambda: recommenders(asked))
    first, last = "content", list(vectors)[-1]
    chosen = {name: vectors[name] for name in (first, last)}
    ranker = _kept(work / "ranker.json", lambda: downstream(asked, chosen))
    counts = {name: len(cases) for name, cases in asked.cases.items()}
    counts["unseen"] = sum(known.unseen[case.target] for case in asked.cases["vanilla"])
    return {"table": beside | found, "ranker": ranker, "cases": {name: int(n) for name, n in counts.items()}}


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        write_json(path, make())
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table for each group of questions, a line for each who was asked."""
    asked = list(results[0]["table"])
    known = list(dict.fromkeys(question for name in asked for question in results[0]["table"][name]))
    parts = []
    for begins in GROUPS:
        columns = [question for question in known if question.startswith(begins)]
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in asked:
            runs = [result["table"][name] for result in results]
            cells = [spread([run[column] for run in runs]) if column in runs[0] else "" for column in columns]
            if any(cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def picture(results: Sequence[dict[str, Any]]) -> str:
    """The stages beside each other, as SVG: a group of bars for each question in `SHOWN`, whiskers to the extremes."""
    stages = [name for name in results[0]["table"] if name in COLORS]
    rows = {
        question: {name: [result["table"][name][question] for result in results] for name in stages}
        for question in SHOWN
    }
    return bar_chart({"title": "", "unit": "", "columns": stages, "rows": rows}, colors=COLORS)


def ranker_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: AUC and GAUC of each set of features, and their gain over the base features of the same seed."""
    lines = ["| question | features | AUC | gain | GAUC | gain |", "|---" * 6 + "|"]
    for question, sets in results[0]["ranker"].items():
        for name in sets:
            cells = []
            for key in ("auc", "gauc"):
                runs = [result["ranker"][question] for result in results]
                cells.append(spread([run[name][key] for run in runs], 4))
                cells.append("" if name == "base" else spread([run[name][key] - run["base"][key] for run in runs], 4))
            lines.append(f"| {question} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/mini"), help="folder of the model to start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/mini-cre"), help="what is trained and measured")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value", help="of the recipe")
    parser.add_argument("--out", type=Path, help="JSON of the results; a picture goes beside it")
    args = parser.parse_args(arguments)
    results = [run_seed(seed, args.model, args.work / str(seed), args.overrides) for seed in args.seeds]
    print(f"{results[0]['cases']} cases\n\n{tables(results)}\n\n{ranker_table(results)}")
    if args.out is not None:
        write_json(args.out, dict(zip(map(str, args.seeds), results, strict=True)))
        write_text(args.out.with_suffix(".svg"), picture(results))


if __name__ == "__main__":
    main()
