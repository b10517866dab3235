"""``python -m modeling_sail.training RECIPE [key=value ...]``; on many ranks through torchrun or accelerate launch."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .distributed import leave
from .recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; a caller's mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m modeling_sail.training", description=__doc__)
    parser.add_argument("recipe", help="a .yaml file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in stages.base.steps=100")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        from .stages import run_recipe  # imports transformers' Trainer: a bad recipe needs no such wait

        folder = run_recipe(recipe)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"sail train: {error}", file=sys.stderr)
        failed = True
    else:
        failed = False
        print(folder)
    leave(failed)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
