"""Runs transformers' own model tests, `ModelTesterMixin`, against `SailEmbeddingModel` and prints a table.

    python tests/transformers_suite/run.py [--source DIR] [-k EXPRESSION] [-v]

The tests come from the source distribution of transformers, from pip; nothing of it is kept here. Unusual: pytest
collects this very file; the test class exists only where $SAIL_TRANSFORMERS_SOURCE names the unpacked distribution.
The distribution leaves out the mixins of export and of `generate`; empty classes stand in, so those are not tested.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import types
import unittest
import unittest.mock
from collections import Counter
from pathlib import Path

import pytest

VERSION = "5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
SOURCE_VARIABLE = "SAIL_TRANSFORMERS_SOURCE"
PACKAGE = "transformers_tests"  # not "tests", which is our own

# Tests that fail because of what the model is, with the reason. One that passes is reported, and fails the run.
# Each of them also runs, as `..._adapted`, on a subclass of the model that has what the test asks for.
NO_LOSS = (
    "The model returns embeddings and has no loss: the losses are in training/, over two batches. transformers itself "
    "leaves its base models out of this test, by a list of names that no model outside of it can be in."
)
EXCEPTIONS: dict[str, str] = {
    "test_model_outputs_equivalence": "The output has a boolean modality_mask, and the test subtracts all tensors to "
    "write its message; torch cannot subtract booleans.",
    "test_training": NO_LOSS,
    "test_training_gradient_checkpointing": NO_LOSS,
    "test_training_gradient_checkpointing_use_reentrant_false": NO_LOSS,
    "test_training_gradient_checkpointing_use_reentrant_true": NO_LOSS,
}


def download(root: Path | None = None) -> Path:
    """The unpacked source distribution in ``root``, else $SAIL_CACHE, else ``~/.cache/sail``; pip fetches it once."""
    root = root or Path(os.environ.get("SAIL_CACHE") or Path.home() / ".cache" / "sail").expanduser()
    folder = root / f"transformers-{VERSION}"
    if not (folder / "tests" / "test_modeling_common.py").is_file():
        root.mkdir(parents=True, exist_ok=True)
        archive = root / f"transformers-{VERSION}.tar.gz"
        if not archive.is_file():
            flags = ["--no-deps", "--no-binary", "transformers", "--quiet", "--dest", str(root)]
            subprocess.run([sys.executable, "-m", "pip", "download", *flags, f"transformers=={VERSION}"], check=True)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{archive} has sha256 {found}, not {SHA256}; delete it and try again.")
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    return folder


def load_mixin(source: Path) -> types.ModuleType:
    """transformers' ``tests/test_modeling_common.py``, imported from ``source``."""
    if not (source / "tests" / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"{source} holds no tests/test_modeling_common.py; give the unpacked distribution.")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(source / "tests")]
    sys.modules[PACKAGE] = package
    for folder, module, name in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        if not (source / "tests" / folder).is_dir():
            sys.modules[f"{PACKAGE}.{folder}"] = types.ModuleType(f"{PACKAGE}.{folder}")
            stub = types.ModuleType(f"{PACKAGE}.{folder}.{module}")
            setattr(stub, name, type(name, (), {}))
            sys.modules[stub.__name__] = stub
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


if SOURCE_VARIABLE in os.environ:
    import torch
    from transformers.utils import can_return_tuple

    from modeling_sail.configuration_sail import SailEmbeddingConfig, preset_config
    from modeling_sail.modeling_sail import SailEmbeddingModel

    torch.set_num_threads(1)
    common = load_mixin(Path(os.environ[SOURCE_VARIABLE]))

    class SailModelTester:
        """The tiny preset, and a batch in which every row has text, one picture and one window of sound."""

        image_token_id, audio_token_id = 3, 4
        first_text_id = 5

        def __init__(self, parent: unittest.TestCase) -> None:
            self.parent = parent
            self.batch_size, self.text_length = 3, 6
            config = self.get_config()
            self.text_config, self.vision_config = config.text_config, config.vision_config
            self.hidden_size = config.hidden_size
            self.num_hidden_layers = config.text_config.num_hidden_layers
            self.num_attention_heads = config.text_config.num_attention_heads
            self.vocab_size = config.text_config.vocab_size
            self.seq_length = config.num_latents + 1 + self.text_length
            self.is_training = True

        def get_config(self) -> SailEmbeddingConfig:
            config = preset_config("tiny")
            config.image_token_id, config.audio_token_id = self.image_token_id, self.audio_token_id
            return config

        def prepare_config_and_inputs_for_common(self):
            config = self.get_config()
            rows = self.batch_size
            image = torch.full((rows, config.num_latents), self.image_token_id)
            audio = torch.full((rows, 1), self.audio_token_id)
            text = common.ids_tensor([rows, self.text_length], self.vocab_size - self.first_text_id).cpu()
            input_ids = torch.cat([image, audio, text + self.first_text_id], dim=1)
            size, sound = config.vision_config.image_size, config.audio_config
            return config, {
                "input_ids": input_ids.to(common.torch_device),
                "attention_mask": torch.ones_like(input_ids).to(common.torch_device),
                "pixel_values": common.floats_tensor([rows, 3, size, size]),
                "input_features": common.floats_tensor([rows, sound.num_mel_bins, 2 * sound.max_source_positions]),
            }

    class SailEmbeddingAdapted(SailEmbeddingModel):
        """The model with what the tests in EXCEPTIONS ask for: a loss that reaches every weight, a mask of numbers."""

        @can_return_tuple
        def forward(self, input_ids=None, **inputs):
            output = super().forward(input_ids, output_late_fusion=True, return_dict=True, **inputs)
            output["modality_mask"] = output.modality_mask.long()
            output["loss"] = output.late_fusion_embeddings.square().mean() / self.temperatures("default")
            return output

    class SailEmbeddingModelTest(common.ModelTesterMixin, unittest.TestCase):
        """transformers' tests of one model class."""

        all_model_classes = (SailEmbeddingModel,)
        _is_composite = True
        # Without the year of a copyright on top of its file a model counts as too old for this test.
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = SailModelTester(self)

        def test_sdpa_can_dispatch_composite_models(self) -> None:
            # The test knows the backbone by other names than ours, and skips without one.
            name = property(lambda model: model.text_tower)
            with unittest.mock.patch.object(SailEmbeddingModel, "language_model", name, create=True):
                super().test_sdpa_can_dispatch_composite_models()

    def adapted(name: str):
        def test(self: SailEmbeddingModelTest) -> None:
            self.all_model_classes = (SailEmbeddingAdapted,)
            getattr(self, name)()

        return test

    for excepted in EXCEPTIONS:
        setattr(SailEmbeddingModelTest, f"{excepted}_adapted", adapted(excepted))


class Table:
    """The pytest plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.results: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rsplit("::", 1)[-1]
        if self.results.get(name, ("",))[0] == "failed":
            return  # a test whose subtest failed is reported once more, as passed
        if report.failed:
            lines = str(report.longrepr).splitlines()
            self.results[name] = ("failed", next((line[1:].strip() for line in lines if line[:2] == "E "), lines[-1]))
        elif report.skipped:
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.results[name] = ("skipped", why.removeprefix("Skipped: "))
        elif report.when == "call":
            self.results[name] = ("passed", "")


def judge(results: dict[str, tuple[str, str]], exceptions: dict[str, str]) -> tuple[list[tuple[str, str, str]], bool]:
    """(outcome, test, why) of every test that did not simply pass, and whether the run is good."""
    rows = []
    for name, (outcome, why) in sorted(results.items()):
        if name in exceptions and outcome == "failed":
            rows.append(("exception", name, exceptions[name]))
        elif name in exceptions:
            rows.append(("exception no longer needed", name, f"it {outcome}; take it out of EXCEPTIONS"))
        elif outcome != "passed":
            rows.append((outcome, name, why))
    bad = {"failed", "exception no longer needed"}
    return rows, bool(results) and not any(row[0] in bad for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 where every test passes, is skipped by transformers, or is an exception with a reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="the unpacked source distribution; downloaded by pip if absent")
    parser.add_argument("-k", default="", help="pytest's expression to choose tests by name")
    parser.add_argument("-v", action="store_true", help="print pytest's own output, tracebacks and skipped tests too")
    chosen = parser.parse_args(arguments)
    source = chosen.source or download()
    os.environ[SOURCE_VARIABLE] = str(source.resolve())
    table = Table()
    # Neither our conftest nor our pytest options: the suite is transformers', as it is.
    flags = ["-c", os.devnull, "--rootdir", str(Path(__file__).parent), "--noconftest", "-p", "no:cacheprovider"]
    verbosity = ["-v", "--tb=short", "--durations=10"] if chosen.v else ["-q", "--tb=short", "--no-summary"]
    pytest.main([__file__, *flags, *verbosity, "-W", "ignore", *(["-k", chosen.k] if chosen.k else [])], [table])

    rows, good = judge(table.results, EXCEPTIONS)
    print()
    for outcome, name, why in rows:
        if outcome != "skipped" or chosen.v:
            print(f"{outcome:10} {name}: {why}")
    counts = Counter(outcome for outcome, _ in table.results.values())
    excused = sum(row[0] == "exception" for row in rows)
    print(f"transformers {VERSION} ModelTesterMixin on SailEmbeddingModel")
    print(
        f"| passed {counts['passed']} | skipped {counts['skipped']} | failed {counts['failed'] - excused} "
        f"| exceptions {excused} |"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
