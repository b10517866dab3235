"""Recipes beside each other, stage by stage: several seeds, the retrieval of the same held-out names.

    python -m modeling_sail.evaluation.recipe_comparison mini-progressive mini --seeds 0 1 2

A run that was stopped goes on where it was: stages that are done are not run again, and neither is their evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ..modeling_sail import SailEmbeddingModel
from ..processing_sail import SailEmbeddingProcessor
from ..training.collate import Collator
from ..training.files import write_json
from ..training.mini import cache_features
from ..training.recipe import load_recipe
from ..training.stages import run_recipe
from .tuxpaint_retrieval import evaluate, evaluation_sources

Results = list[dict[str, Any]]


def compare(
    recipes: list[str], seeds: list[int], work: Path, overrides: list[str], out: Path
) -> dict[str, dict[str, Results]]:
    """``{stage: {seed: results}}``; the results are those of `tuxpaint_retrieval.evaluate`, and of the warm model.

    Args:
        recipes: names or files; a recipe of several stages has a column for each of them.
        seeds: each recipe is run with each.
        work: the warm model and the feature cache.
        overrides: ``key=value`` of every recipe.
        out: folder of the stages.
    """
    evaluator = Evaluator(work)
    found: dict[str, dict[str, Results]] = {"before": {"-": evaluator.of_folder(work / "warm", out / "before.json")}}
    for seed in seeds:
        for name in recipes:
            output = out / Path(name).stem / str(seed)
            places = [f"model={work / 'warm'}", f"output={output}", f"defaults.feature_cache={work}", f"seed={seed}"]
            recipe = load_recipe(name, [*places, *overrides])
            run_recipe(recipe, evaluator)
            for stage in recipe.stages:
                column = f"{Path(name).stem}: {stage}" if len(recipe.stages) > 1 else Path(name).stem
                entry = json.loads((output / stage / "stage.json").read_text(encoding="utf-8"))
                kept = entry.get("evaluation")  # of a stage that `sail train` ran there is none
                kept = kept or evaluator.of_folder(output / stage / "model", output / stage / "retrieval.json")
                found.setdefault(column, {})[str(seed)] = kept
    return found


class Evaluator:
    """What `stages.run_recipe` calls with the model of each stage.

    Args:
        work: the feature cache.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.sources = work, evaluation_sources()

    def __call__(self, model: SailEmbeddingModel, processor: SailEmbeddingProcessor) -> Results:
        images, sounds = cache_features(model, processor, self.work, self.sources)
        return evaluate(model, Collator(processor, images, sounds), None, self.sources)

    def of_folder(self, folder: Path, kept: Path) -> Results:
        """The same of a saved model; what is in ``kept`` already is read."""
        if not kept.is_file():
            model = SailEmbeddingModel.from_pretrained(folder).eval()
            write_json(kept, self(model, SailEmbeddingProcessor.from_pretrained(folder)))
        results: Results = json.loads(kept.read_text(encoding="utf-8"))
        return results


def table(found: dict[str, dict[str, Results]]) -> str:
    """Markdown: R@10 of each task, mean over the seeds and half the distance of the extremes."""
    lines = ["| task | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    tasks = [row["task"] for row in next(iter(next(iter(found.values())).values()))]
    for place, task in enumerate(tasks):
        cells = []
        for results in found.values():
            values = [result[place]["model R@10"] for result in results.values()]
            spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="the warm model and the feature cache")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value", help="of every recipe")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    args = parser.parse_args(arguments)
    found = compare(args.recipes, args.seeds, args.work, args.overrides, args.work / "comparison")
    print(table(found))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
