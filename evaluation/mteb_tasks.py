"""The adapter to mteb, second half: our tasks as mteb's tasks, and running them into mteb's result files.

Room: Model -> Embeddings -> **Evaluation**. Unusual: the scores do not come from mteb. `score` of the task makes them,
from vectors that the model's `encode` gives, so a figure is the same with mteb and without; mteb brings the protocol,
which any of its models speaks, and the files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import mteb
import numpy as np
import torch
from datasets import Audio, Dataset, Image
from mteb.abstasks import AbsTaskPairClassification, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import EncoderProtocol
from mteb.types import Licenses, PromptType
from torch.utils.data import DataLoader

from ..media_sail import LoadOptions, load_sound
from .item_embedder import MODALITIES, rendered_text
from .revisions import task_revision
from .tasks.task import Item, Pairs, Retrieval, Task, score, with_sequences

logger = logging.getLogger(__name__)

PAIR_SCORES = ("auc", "average_precision")
_CODES = {"video": "v", "image": "i", "audio": "a", "text": "t"}
UNLOADED = "unloaded"  # the revision of data that nobody has looked at yet
_PLAIN_HZ = 16_000  # of the sounds that plain mteb models get: what mteb resamples to


class SailTaskMetadata(TaskMetadata):
    """mteb's, with the family of instructions, and a category that may name three modalities a side."""

    category: str | None = None
    family: str | None = None


def as_mteb(task: Task, modalities: Sequence[str] = MODALITIES) -> Any:
    """A task of ours as one of mteb's.

    Args:
        task: the task.
        modalities: those that are declared, of those that it has; a model that has no others takes part with them.

    Returns:
        An `AbsTaskRetrieval`, or an `AbsTaskPairClassification` where ``main_score`` is one of pairs. For an encoder,
        scores are those of `score`; a model that only searches is scored as mteb does it.

    Raises:
        ValueError: nothing of a side is left.
    """
    base = SailPairs if task.main_score in PAIR_SCORES else SailRetrieval
    made = type(task.name, (base,), {"metadata": metadata_of(task, modalities), "task": task})
    return made()


def metadata_of(task: Task, modalities: Sequence[str] = MODALITIES) -> SailTaskMetadata:
    """A task's declaration in mteb's words; what mteb has no word for stands in the description."""
    sides = [[kind for kind in _CODES if kind in side and kind in modalities] for side in _sides(task)]
    if not all(sides):
        raise ValueError(f"{task.name} has {_sides(task)}; nothing is left with {list(modalities)} alone.")
    kinds = [kind for kind in MODALITIES if kind in {*sides[0], *sides[1]}]
    retrieval = "Retrieval" if kinds == ["text"] else "Any2AnyRetrieval"
    licence = task.licence.lower() if task.licence.lower() in get_args(Licenses) else None
    languages = {name: list(codes) for name, codes in task.languages.items()}
    return SailTaskMetadata(
        name=task.name,
        description=f"{task.description} Source: {task.source}. Licence: {task.licence}.",
        dataset={"path": f"sail/{task.name}", "revision": UNLOADED},
        type="PairClassification" if task.main_score in PAIR_SCORES else retrieval,
        category="2".join("".join(_CODES[kind] for kind in side) for side in sides),
        modalities=kinds,
        eval_langs=languages["default"] if set(languages) == {"default"} else languages,
        main_score=task.main_score,
        date=task.date,
        license=licence,
        reference=task.source if task.source.startswith("http") and " " not in task.source else None,
        family=task.family,
    )


def _sides(task: Task) -> list[list[str]]:
    return [list(task.query_modalities), list(task.target_modalities)]


class _SailTask:
    """What both kinds of tasks share: data of a `Task`, and its one way of scoring."""

    task: Task

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Makes the data of all subsets, in mteb's form too; the metadata get the revision of just these data."""
        if self.data_loaded:
            return
        self.sides = dict(self.task.load())
        wrong = [name for name in self.metadata.hf_subsets if name not in self.sides]
        kind = Pairs if self.task.main_score in PAIR_SCORES else Retrieval
        if wrong or not all(isinstance(data, kind) for data in self.sides.values()):
            raise ValueError(
                f"{self.task.name}.load() gave {[f'{n}: {type(d).__name__}' for n, d in self.sides.items()]}; "
                f"{kind.__name__} is needed, of the subsets {self.metadata.hf_subsets}."
            )
        self.dataset = {name: {"test": self.split_of(self.sides[name])} for name in self.metadata.hf_subsets}
        dataset = {**self.metadata.dataset, "revision": task_revision(self.task, self.sides)}
        self.metadata = self.metadata.model_copy(update={"dataset": dataset})
        self.data_loaded = True

    def unload_data(self) -> None:
        """Lets go of the data."""
        self.sides = {}
        super().unload_data()

    def _evaluate_subset(self, model: Any, data_split: Any, **kwargs: Any) -> dict[str, Any]:
        if not isinstance(model, EncoderProtocol):
            split = self.for_search(data_split, self.sides[kwargs["hf_subset"]])
            return super()._evaluate_subset(model, split, **kwargs)
        names = ("hf_split", "hf_subset", "encode_kwargs")
        asked = _Asked(model, self.metadata, *(kwargs[name] for name in names))
        return score(self.sides[kwargs["hf_subset"]], with_sequences(asked.encode))


class SailRetrieval(_SailTask, AbsTaskRetrieval):
    """A `Retrieval` in mteb's form."""

    k_values = (1, 10, 25, 50, 100)

    @staticmethod
    def split_of(data: Retrieval) -> dict[str, Any]:
        """mteb's dict of queries, corpus and what is relevant."""
        return {
            "queries": dataset_of(list(data.queries.values()), list(data.queries)),
            "corpus": dataset_of(list(data.corpus.values()), list(data.corpus)),
            "relevant_docs": {name: dict.fromkeys(sorted(right), 1) for name, right in data.relevant.items()},
            "top_ranked": None,
        }

    @staticmethod
    def for_search(split: dict[str, Any], data: Retrieval) -> dict[str, Any]:
        """The split for a model that only searches, which cannot be told what is excluded but what is not."""
        if not any(data.excluded.values()):
            return split
        corpus = list(data.corpus)
        allowed = {name: [one for one in corpus if one not in data.excluded.get(name, ())] for name in data.queries}
        return split | {"top_ranked": allowed}


class SailPairs(_SailTask, AbsTaskPairClassification):
    """`Pairs` in mteb's form: columns of the first item end in 1, of the second in 2."""

    input1_column_name, input2_column_name = {"text1": "text"}, {"text2": "text"}
    input1_prompt_type, input2_prompt_type = PromptType.query, PromptType.document

    @staticmethod
    def split_of(data: Pairs) -> Dataset:
        """mteb's table of pairs."""
        sides = [dataset_of(data.queries), dataset_of(data.targets)]
        columns = {
            f"{name}{place}": list(side.with_format(None)[name])
            for place, side in enumerate(sides, start=1)
            for name in ("text", "item")
        }
        return Dataset.from_dict(columns | {"labels": [int(label) for label in data.labels]})

    @staticmethod
    def for_search(split: Dataset, data: Pairs) -> Dataset:
        """The split as it is: mteb will say that pairs are not searched."""
        return split


def dataset_of(items: Sequence[Item], ids: Sequence[str] | None = None) -> Dataset:
    """Items as mteb's table; a sequence has the texts of its items and no media of its own.

    Columns: ``id``; ``text``, all fields rendered, "" without any; ``image`` and ``audio`` where any item has one,
    paths that nothing has decoded yet; ``item``, the whole of it as JSON.
    """
    try:
        whole = [json.dumps(item) for item in items]
    except TypeError as error:
        raise ValueError(f"An item of a task is made of paths and text, so that it can be written: {error}.") from error
    columns: dict[str, list[Any]] = {
        "id": list(ids or map(str, range(len(items)))),
        "text": ["\n".join(map(rendered_text, item.get("sequence", [item]))) for item in items],
        "item": whole,
    }
    media = {"image": [_first_path(item, "image", "images") for item in items]}
    media["audio"] = [_first_path(item, "audio") for item in items]
    kept = {name: paths for name, paths in media.items() if any(paths)}
    table = Dataset.from_dict(columns | kept)
    for name in kept:
        table = table.cast_column(name, Image() if name == "image" else Audio(decode=False))
    return table


def _first_path(item: Item, *names: str) -> str | None:
    for name in names:
        value = item.get(name)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, str) and value:
            return value
    return None


@dataclass
class _Asked:
    """`Encode` of a task by an encoder of mteb.

    Models other than ours know no gaps: items go to them in groups that have the same modalities, and an item that has
    none of the model's is a row of zeros.
    """

    model: Any
    metadata: SailTaskMetadata
    split: str
    subset: str
    settings: Mapping[str, Any]

    def encode(self, items: Sequence[Item], side: str) -> np.ndarray:
        prompt_type = PromptType.query if side == "query" else PromptType.document
        table = dataset_of(items)
        whole = getattr(self.model, "reads_items", False)
        return self._vectors(table, prompt_type) if whole else self._grouped(table, prompt_type)

    def _grouped(self, table: Dataset, prompt_type: PromptType) -> np.ndarray:
        known = self.model.mteb_model_meta.modalities or ["text"]
        columns = [name for name in ("text", "image", "audio") if name in table.column_names and name in known]
        has = {name: [bool(value) for value in _raw(table, name)] for name in columns}
        groups: dict[tuple[str, ...], list[int]] = {}
        for row in range(len(table)):
            groups.setdefault(tuple(name for name in columns if has[name][row]), []).append(row)
        found = {
            kinds: self._vectors(
                table.select(rows).select_columns(["id", *kinds]).with_transform(_decoded), prompt_type
            )
            for kinds, rows in groups.items()
            if kinds
        }
        width = next((vectors.shape[1] for vectors in found.values()), 1)
        result = np.zeros((len(table), width), dtype=np.float32)
        for kinds, vectors in found.items():
            result[groups[kinds]] = vectors
        return result

    def _vectors(self, table: Dataset, prompt_type: PromptType) -> np.ndarray:
        loader = DataLoader(table, batch_size=self.settings.get("batch_size", 32), collate_fn=_collate)
        task = {"task_metadata": self.metadata, "hf_split": self.split, "hf_subset": self.subset}
        vectors = self.model.encode(loader, **task, prompt_type=prompt_type, **self.settings)
        return vectors.float().cpu().numpy() if isinstance(vectors, torch.Tensor) else np.asarray(vectors, np.float32)


def _raw(table: Dataset, name: str) -> list[Any]:
    return table.cast_column(name, Image(decode=False))[name] if name == "image" else table[name]


def _collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _decoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Pictures in RGB and sounds as arrays, when they are asked for; needs no torchcodec."""
    if "image" in batch:
        batch["image"] = [picture.convert("RGB") for picture in batch["image"]]
    if "audio" in batch:
        options = LoadOptions(sampling_rate=_PLAIN_HZ)
        batch["audio"] = [{"array": load_sound(sound, options), "sampling_rate": _PLAIN_HZ} for sound in batch["audio"]]
    return batch


# --- running ----------------------------------------------------------------------------------------------------------


def run_task(
    encoder: Any, task: Task, out: Path | None = None, *, batch_size: int = 32, subsets: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate one task, or take what ``out`` has of the same model and of the same data and scoring.

    Args:
        encoder: any encoder of mteb, such as `SailEncoder`.
        task: the task.
        out: mteb's folder of results; None keeps none.
        batch_size: of the encoder.
        subsets: some of the task's; all by default.

    Returns:
        For each subset, its scores by name, and the ``revision`` of the data.
    """
    made = as_mteb(task, encoder.mteb_model_meta.modalities)
    made.hf_subsets = [name for name in made.hf_subsets if subsets is None or name in subsets]
    made.load_data()
    cache = None if out is None else ResultCache(out)
    known = None if cache is None or out is None else _known(cache, out, task, encoder.mteb_model_meta)
    stale = known is not None and known.dataset_revision != made.metadata.revision
    found = mteb.evaluate(
        encoder,
        made,
        cache=cache,
        co2_tracker=False,
        encode_kwargs={"batch_size": batch_size},
        overwrite_strategy="always" if stale else "only-missing",
    )
    result = found.task_results[0]
    return {entry["hf_subset"]: entry | {"revision": result.dataset_revision} for entry in result.scores["test"]}


def _known(cache: ResultCache, out: Path, task: Task, meta: Any) -> Any:
    """The result that the folder has, or None; a file that was cut off is put aside, and the task runs again."""
    try:
        return cache.load_task_result(task.name, meta)
    except ValueError as error:  # no JSON, or none of mteb's
        for path in out.rglob(f"{task.name}.json"):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                logger.warning("%s is broken (%s); it is kept as .broken, and the task runs again.", path, error)
                path.rename(path.with_suffix(".broken"))
        return None
