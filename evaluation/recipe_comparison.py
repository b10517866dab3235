"""Recipes beside each other: as many steps, several seeds, the retrieval of the same held-out names.

    python -m modeling_sail.evaluation.recipe_comparison mini-plain mini-full --seeds 0 1 2

A run that was stopped goes on where it was: stages that are done are not run again.
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
from ..training.data.mini_pairs import load_sources
from ..training.mini import cache_features
from ..training.recipe import load_recipe
from ..training.stages import run_recipe
from .tuxpaint_retrieval import evaluate


def compare(
    recipes: list[str], seeds: list[int], work: Path, overrides: list[str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """``{recipe: {seed: results}}``; the results are those of `tuxpaint_retrieval.evaluate`, and of the warm model."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"before": {"-": _evaluated(work / "warm", work)}}
    for seed in seeds:
        for name in recipes:
            output = work / "comparison" / name / str(seed)
            places = [f"model={work / 'warm'}", f"output={output}", f"defaults.feature_cache={work}", f"seed={seed}"]
            folder = run_recipe(load_recipe(name, [*places, *overrides]))
            kept = output / "retrieval.json"
            if not kept.is_file():
                kept.write_text(json.dumps(_evaluated(folder, work)), encoding="utf-8")
            found.setdefault(name, {})[str(seed)] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _evaluated(folder: Path, work: Path) -> list[dict[str, Any]]:
    model = SailEmbeddingModel.from_pretrained(folder).eval()
    processor = SailEmbeddingProcessor.from_pretrained(folder)
    images, sounds = cache_features(model, processor, work)
    return evaluate(model, Collator(processor, images, sounds), None, load_sources()["test"])


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
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
    found = compare(args.recipes, args.seeds, args.work, args.overrides)
    print(table(found))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
