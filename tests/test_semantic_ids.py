"""Semantic IDs: nearest codes by brute force, files that come back, a report whose figures are what they say."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_sail.training.semantic_ids import fit_semantic_ids, report
from safetensors.torch import save_file

from modeling_sail.cli import main
from modeling_sail.semantic_ids_sail import SCHEMES, SemanticIDs, nearest

SMALL = {"sizes": (8, 4), "parts": 2, "part_bits": 3}


def items(count: int = 300, dims: int = 8, seed: int = 0) -> torch.Tensor:
    """Twelve clouds on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, dims, generator=torch.Generator().manual_seed(9))
    values = centres[torch.randint(12, (count,), generator=generator)]
    return torch.nn.functional.normalize(values + 0.3 * torch.randn(count, dims, generator=generator), dim=1)


def fitted(scheme: str) -> SemanticIDs:
    given = {"sizes": (8,)} if scheme == "kmeans" else SMALL
    return fit_semantic_ids(items(), scheme=scheme, **given)


@settings(max_examples=50)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 999))
def test_the_nearest_centroid_is_the_one_of_brute_force(count, size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, book = torch.randn(count, 3, generator=generator), torch.randn(size, 3, generator=generator)
    assert nearest(vectors, book).tolist() == torch.cdist(vectors, book).argmin(dim=1).tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_in_range_and_every_level_brings_the_decoded_nearer(scheme) -> None:
    ids, values = fitted(scheme), items()
    codes = ids.encode(values)
    assert codes.shape == (300, len(ids.sizes))
    assert (codes >= 0).all() and (codes < torch.tensor(ids.sizes)).all()
    errors = [(values - ids.decode(codes, level)).square().sum().item() for level in range(1, len(ids.sizes) + 1)]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)
    assert torch.equal(ids.decode(codes), ids.decode(codes, len(ids.sizes)))


def test_residual_levels_code_what_the_levels_before_left() -> None:
    ids, values = fitted("rq"), items(seed=1)
    first = torch.cdist(values, ids.residual[0]).argmin(dim=1)
    second = torch.cdist(values - ids.residual[0][first], ids.residual[1]).argmin(dim=1)
    assert torch.equal(ids.encode(values), torch.stack([first, second], dim=1))


def test_the_rotation_is_orthogonal_and_product_codes_are_of_the_rotated_rest() -> None:
    ids, values = fitted("rq-opq"), items(seed=2)
    assert torch.allclose(ids.rotation @ ids.rotation.T, torch.eye(8), atol=1e-4)
    codes = ids.encode(values)
    rest = (values - ids.decode(codes, 2)) @ ids.rotation.T
    for part in range(2):
        wanted = torch.cdist(rest[:, 4 * part : 4 * part + 4], ids.product[part]).argmin(dim=1)
        assert torch.equal(codes[:, 2 + part], wanted)


def test_an_items_code_does_not_depend_on_the_others(monkeypatch) -> None:
    ids, values = fitted("rq-opq"), items()
    monkeypatch.setattr("modeling_sail.semantic_ids_sail.ROWS_AT_ONCE", 7)
    assert torch.equal(ids.encode(values), ids.encode(values.flip(0)).flip(0))
    assert ids.encode(values[:0]).shape == (0, 4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_gives_back_what_was_saved(scheme, tmp_path) -> None:
    ids = fitted(scheme)
    ids.notes = {"seed": 3}
    ids.save_pretrained(tmp_path)
    again = SemanticIDs.from_pretrained(tmp_path)
    assert torch.equal(again.encode(items()), ids.encode(items()))
    assert (again.scheme, again.notes, again.sizes) == (scheme, {"seed": 3}, ids.sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["semantic_ids.safetensors"]


def test_the_same_seed_gives_the_same_codes() -> None:
    assert torch.equal(fitted("rq").encode(items()), fitted("rq").encode(items()))


def test_tokens_are_words_of_a_vocabulary() -> None:
    assert fitted("rq").tokens(torch.tensor([[3, 1], [0, 2]])) == ["<a_3><b_1>", "<a_0><b_2>"]


def test_the_reports_figures_are_closed_forms_where_there_are_some() -> None:
    book = torch.eye(4)
    ids = SemanticIDs([book], scheme="kmeans")
    found = report(ids, torch.cat([book, book[:2]]), neighbours=1)
    assert (found["distinct_ids"], found["collision_rate"]) == (4, pytest.approx(4 / 6))
    level = found["levels"][0]
    assert (level["utilisation"], level["reconstruction_error"]) == (1.0, pytest.approx(0.0))
    shares = np.array([2, 2, 1, 1]) / 6
    assert level["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
    nothing = report(SemanticIDs([torch.zeros(1, 4)], scheme="kmeans"), items(50, 4))
    assert nothing["collision_rate"] == 1.0 and nothing["levels"][0]["entropy"] == 0.0
    assert report(fitted("rq-opq"), items(200, seed=3))["neighbours_kept"] > nothing["neighbours_kept"]


@pytest.fixture
def encoded(tmp_path):
    values = items(120)
    table = {"id": [f"i{n}" for n in range(120)], "embedding": values.tolist(), "status": ["ok"] * 119 + ["error"]}
    pq.write_table(pa.table(table | {"reason": [""] * 120}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_the_commands_fit_into_the_models_folder_and_write_codes(encoded, tmp_path, capsys) -> None:
    model = tmp_path / "model"
    assert (
        main(["sid", "fit", str(encoded), "--model", str(model), "--sizes", "8", "4", "--parts", "2", "--bits", "3"])
        == 0
    )
    assert "12 held-out items" in capsys.readouterr().out
    kept = json.loads((model / "semantic_ids.json").read_text())
    assert kept["fitted_on"] == 107 and len(kept["held_out"]["levels"]) == 4
    assert main(["sid", "encode", str(encoded), "--model", str(model), "--out", str(tmp_path / "codes.parquet")]) == 0
    table = pq.read_table(tmp_path / "codes.parquet").to_pylist()
    assert len(table) == 119 and len(table[0]["codes"]) == 4
    ids = SemanticIDs.from_pretrained(model)
    assert table[5]["codes"] == ids.encode(items(120))[5].tolist()
    assert table[5]["tokens"].startswith(f"<a_{table[5]['codes'][0]}>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--scheme", "vq"], "scheme='vq' is not one of kmeans, rq, rq-opq"),
        (["--sizes", "512"], "cannot fill a codebook of 512"),
        (["--sizes", "8", "--bits", "3", "--parts", "3"], "parts=3 must divide 8 dimensions"),
        (["--sizes", "8", "8", "--scheme", "kmeans"], "'kmeans' has one level"),
        (["--held-out", "0"], "a report needs two"),
    ],
)
def test_a_bad_setting_is_one_line(encoded, tmp_path, capsys, change, message) -> None:
    assert main(["sid", "fit", str(encoded), "--model", str(tmp_path / "m"), *change]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_them_and_a_file_of_another_kind_are_told(encoded, tmp_path, capsys) -> None:
    given = ["sid", "encode", str(encoded), "--out", str(tmp_path / "codes.parquet"), "--model"]
    (tmp_path / "empty").mkdir()
    assert main([*given, str(tmp_path / "empty")]) == 2
    assert "semantic_ids.safetensors" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "empty" / "semantic_ids.safetensors")
    assert main([*given, str(tmp_path / "empty")]) == 2
    assert "holds no semantic IDs; `sail sid fit` writes them" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"must be \(N, 8\)"):
        fitted("rq").encode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        fitted("rq").encode(torch.full((2, 8), torch.nan))
    with pytest.raises(ValueError, match="out of range"):
        fitted("rq").decode(torch.tensor([[8, 0]]))
