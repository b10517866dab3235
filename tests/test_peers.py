"""The paper's peers are configurations of our own model: separate towers, a causal backbone, no sound."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modeling_sail.evaluation import comparison
from modeling_sail.evaluation.comparison import COMPARISONS, Run, readable, slug, tables
from modeling_sail.evaluation.feature_encoder import by_parts, kept, media_of, said
from modeling_sail.evaluation.reports import read_report
from modeling_sail.evaluation.tasks import find_tasks
from modeling_sail.evaluation.tasks.task import Pairs, Retrieval
from modeling_sail.training.build import build_tiny, load_built, save
from modeling_sail.training.peers import bag_of_tokens, dual_tower, other_attention, pass_through, without_audio
from modeling_sail.training.recipe import load_recipe
from torch.nn.functional import normalize

from modeling_sail.configuration_sail import SailEmbeddingConfig
from modeling_sail.perceiver_sail import TokenDecoder

from .conftest import picture, seven_items, sound


@pytest.fixture(scope="module")
def separate():
    torch.manual_seed(0)
    return build_tiny(fusion="separate")


@torch.inference_mode()
def embed(built, items, **kwargs):
    model, processor = built
    return model(**processor(items, task="i2i", side="target"), **kwargs)


# --- separate towers --------------------------------------------------------------------------------------------------


def test_separate_towers_give_the_mean_of_the_modalities_units(separate) -> None:
    whole = {"title": "a cat", "image": picture(1), "audio": sound(2)}
    found = embed(separate, [whole], output_modality_embeddings=True)
    parts = [getattr(found, f"{name}_embeddings") for name in ("vision", "text", "audio")]
    torch.testing.assert_close(found.embeddings, sum(normalize(part, dim=-1) for part in parts) / 3)
    for field, part in zip(("image", "title", "audio"), parts, strict=True):
        alone = embed(separate, [{field: whole[field]}]).embeddings
        torch.testing.assert_close(alone, normalize(part, dim=-1), atol=1e-5, rtol=0)


def test_with_separate_towers_the_backbone_never_sees_a_picture(separate) -> None:
    """What the backbone gives for a text does not move with the picture beside it; in one sequence it does."""
    joint = build_tiny()
    for built, same in ((separate, True), (joint, False)):
        one, other = (
            embed(built, [{"title": "a cat", "image": picture(seed)}]).last_hidden_state[0] for seed in (1, 2)
        )
        assert torch.equal(one, other) is same


def test_with_separate_towers_an_item_embeds_the_same_in_any_batch(separate) -> None:
    items = seven_items()
    alone = torch.cat([embed(separate, [item]).embeddings for item in items])
    torch.testing.assert_close(embed(separate, items).embeddings, alone, atol=1e-5, rtol=0)


def test_every_part_of_separate_towers_gets_a_gradient() -> None:
    model, processor = build_tiny(fusion="separate", late_fusion=False)
    batch = processor(seven_items(), task="i2i", side="target")
    output = model.train()(**batch, use_all_parts=True)
    (output.embeddings * torch.randn_like(output.embeddings)).sum().backward()
    without = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert without == []
    still = [name for name, one in model.named_parameters() if one.requires_grad and not one.grad.any()]
    assert not [name for name in still if not name.startswith("temperatures")], still


def test_a_causal_backbone_does_not_see_what_follows() -> None:
    """The first token's state is that of a sequence that ends differently; both ways it is not."""
    for causal in (True, False):
        model, _ = build_tiny(causal=causal)
        ids = torch.tensor([[10, 11, 12, 13], [10, 11, 12, 99]])
        hidden = model(input_ids=ids).last_hidden_state
        assert torch.allclose(hidden[0, :3], hidden[1, :3], atol=1e-6) is causal


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_as_the_configuration_says_after_loading_too(tmp_path, kernel, causal) -> None:
    model, processor = build_tiny(causal=causal)
    save(model, processor, tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation=kernel).eval()
    ids, mask = torch.tensor([[10, 11, 12, 0], [10, 11, 13, 14]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    hidden = again(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(hidden[0, 1], hidden[1, 1], atol=1e-6) is causal


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fusion='late' cannot be; it must be one of \('joint', 'separate'\)"):
        build_tiny(fusion="late")


# --- starts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    save(*build_tiny(shortcut_size=16, shortcut_memory=8), folder)
    return folder


def test_a_dual_tower_takes_every_weight_but_the_decoders(warm, tmp_path) -> None:
    dual_tower(warm, tmp_path / "dual")
    (before, _), (after, _) = load_built(warm), load_built(tmp_path / "dual")
    gone = set(before.state_dict()) - set(after.state_dict())
    assert after.config.fusion == "separate"
    assert gone and all(".decoder." in name for name in gone)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())


def test_without_audio_there_is_no_tower_and_sound_is_refused(warm, tmp_path) -> None:
    without_audio(warm, tmp_path / "deaf")
    model, processor = load_built(tmp_path / "deaf")
    assert model.audio_tower is None and processor.modalities == ["vision"]
    items = [{"title": "a cat", "image": picture(1)}]
    torch.testing.assert_close(embed((model, processor), items).embeddings, embed(load_built(warm), items).embeddings)
    with pytest.raises(ValueError, match="audio"):
        processor([{"audio": sound(1)}])


def test_other_attention_keeps_every_weight(warm, tmp_path) -> None:
    other_attention(warm, tmp_path / "causal", causal=True)
    (before, _), (after, _) = load_built(warm), load_built(tmp_path / "causal")
    assert after.config.causal and after.config.text_config.is_causal
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())


def test_a_decoder_of_tokens_can_pass_through_exactly() -> None:
    decoder, centre = TokenDecoder(6), torch.arange(6.0)
    pass_through(decoder, 2.5, centre)
    value = torch.randn(5, 6)
    torch.testing.assert_close(decoder(value), 2.5 * value + centre)


def test_a_bag_of_tokens_is_the_centred_mean_of_input_embeddings(tiny) -> None:
    model, processor = tiny
    encode, centre, scale = bag_of_tokens(model, processor)
    table = model.get_input_embeddings().weight.detach()
    ids = processor.tokenizer("ab", add_special_tokens=False)["input_ids"]
    wanted = normalize(table[ids].mean(dim=0) - table.mean(dim=0), dim=0)
    torch.testing.assert_close(encode(["ab", "c"])[0], wanted)
    torch.testing.assert_close(centre, table.mean(dim=0))
    assert scale > 0


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_every_run_is_a_recipe_that_can_be_read() -> None:
    for columns, about, tasks in COMPARISONS.values():
        assert about and find_tasks(tasks)
        for run in columns.values():
            recipe = load_recipe(run.recipe, list(run.overrides))
            assert sum(stage.steps for stage in recipe.stages.values()) in (60, 200)
            instructed = any(task for dataset in recipe.datasets.values() for task in dataset.tasks)
            assert instructed is run.instructed


def test_rungs_have_as_many_steps_and_rows_each() -> None:
    columns, *_ = COMPARISONS["ladder"]
    seen = set()
    for run in columns.values():
        stages = load_recipe(run.recipe, list(run.overrides)).stages.values()
        seen.add((sum(stage.steps for stage in stages), *{stage.batch_size for stage in stages}))
    assert len(seen) == 1
    assert len({slug(name) for name in columns}) == len(columns)


def test_an_item_is_read_with_the_modalities_there_are_and_zeros_where_none_is() -> None:
    items = [{"title": "a", "image": "x.png"}, {"audio": "y.ogg"}, {"text": "", "image": "z.png"}]
    seen = []

    def encode(parts):
        seen.extend(parts)
        return np.ones((len(parts), 3), dtype=np.float32)

    found = by_parts(encode, ("text", "vision"), 3)(items)
    assert by_parts(encode, ("text",), 3)([{"audio": "y.ogg"}]).shape == (1, 3), "vectors of nothing are as long"
    assert seen == [{"title": "a", "image": "x.png"}, {"image": "z.png"}]
    assert found.any(axis=1).tolist() == [True, False, True]
    assert kept(items[0], ("text",)) == {"title": "a"}
    assert said({"title": "a", "tags": ["b", "c"]}) == "a\nb, c"


def test_media_of_tasks_are_named_once_those_of_sequences_too() -> None:
    data = {
        "one": {"default": Retrieval({"q": {"sequence": [{"image": "a"}, {"image": "b"}]}}, {"t": {"image": "a"}}, {})},
        "two": {"default": Pairs([{"audio": "s"}], [{"image": "c", "audio": ""}], [1])},
    }
    source = media_of(data).source
    assert (source.images, source.sounds) == (["a", "b", "c"], ["s"])


def scores(value: float, count: int = 1) -> dict:
    """Of `TuxPaintNameToItem`, one subset."""
    histogram = {"edges": [-1.0, 0.0, 1.0], "positive": [0, count], "negative": [count, count]}
    return {"TuxPaintNameToItem": {"en": {"recall_at_10": value, "separability_histogram": histogram}}}


def test_a_run_says_all_that_its_training_is_made_of(tmp_path, monkeypatch) -> None:
    asked = []

    def loaded(name, overrides):
        asked.append((name, overrides))
        return SimpleNamespace(stages={"near": None, "refined": None})

    monkeypatch.setattr(comparison, "make_start", lambda start, work: work / start)
    monkeypatch.setattr(comparison, "load_recipe", loaded)
    monkeypatch.setattr(comparison, "run_recipe", lambda recipe: None)
    run = Run("dual", "mini", ("stages.all.steps=3",))
    folders = comparison.trained(run, tmp_path, tmp_path / "out", 7)
    places = [f"model={tmp_path / 'dual'}", f"output={tmp_path / 'out'}", f"defaults.feature_cache={tmp_path}"]
    assert asked == [("mini", [*places, "seed=7", "stages.all.steps=3"])]
    assert folders == {stage: tmp_path / "out" / stage / "model" for stage in ("near", "refined")}
    with pytest.raises(FrozenInstanceError):
        run.recipe = "other"
    assert run.instructed and not run.overrides == Run("dual", "mini").overrides == ()


def test_the_default_model_reads_all_in_one_sequence_both_ways() -> None:
    assert SailEmbeddingConfig().fusion == "joint" and SailEmbeddingConfig().causal is False


@pytest.fixture
def staged(monkeypatch):
    """Trainings of two stages, whose scores are the seed, or the seed and a half at the last stage."""
    stages = {"mini-progressive": ["near", "refined"], "mini": ["all"]}
    monkeypatch.setattr(comparison, "make_start", lambda start, work: work / start)
    monkeypatch.setattr(
        comparison,
        "trained",
        lambda run, work, output, seed: {stage: output / stage / "model" for stage in stages[run.recipe]},
    )
    seen = []

    def scored(folder, run, tasks, data, work, path):
        seen.append(path)
        seed = folder.parts[-3] if folder.name == "model" else "9"
        return scores(float(seed) + (0.5 if "refined" in folder.parts else 0.0))

    monkeypatch.setattr(comparison, "model_scores", scored)
    monkeypatch.setattr(comparison, "find_tasks", lambda names: [SimpleNamespace(**FAKE)])
    return seen


FAKE = {
    "name": "TuxPaintNameToItem",
    "load": dict,
    "query_modalities": ["text"],
    "target_modalities": ["image"],
    "main_score": "recall_at_10",
    "family": "q2i",
    "group": "retrieval",
}


def test_recipes_stand_beside_each_other_stage_by_stage(staged, tmp_path, capsys) -> None:
    out = tmp_path / "progressive.json"
    words = ["recipes", "mini-progressive", "mini", "--seeds", "0", "1", "--set", "a=1 2"]
    comparison.main([*words, "--work", str(tmp_path), "--out", str(out)])
    made = read_report(out)
    assert made["tables"]["recipes"]["rows"]["TuxPaintNameToItem (en)"] == {
        "before": [9.0],
        "mini-progressive: near": [0.0, 1.0],
        "mini-progressive: refined": [0.5, 1.5],
        "mini": [0.0, 1.0],
    }
    assert made["command"].endswith("comparison recipes mini-progressive mini --seeds 0 1 --set 'a=1 2'")
    folder = tmp_path / "comparison"
    assert staged[:3] == [
        folder / "before" / "scores.json",
        folder / "mini-progressive" / "0" / "near" / "scores.json",
        folder / "mini-progressive" / "0" / "refined" / "scores.json",
    ]
    assert staged[3] == folder / "mini" / "0" / "scores.json"
    assert "mini-progressive: refined" in capsys.readouterr().out


def test_a_comparison_has_the_last_stage_alone_and_pools_the_histograms_of_its_seeds(staged, tmp_path) -> None:
    columns = {"SAIL": Run("warm", "mini-progressive")}
    found = comparison.compare(columns, [1, 2], [SimpleNamespace(**FAKE)], {}, tmp_path, tmp_path)
    assert [one["TuxPaintNameToItem"]["en"]["recall_at_10"] for one in found["SAIL"]] == [1.5, 2.5]
    found["SAIL"][1] = scores(2.5, count=4)
    made = comparison.histograms(found, [SimpleNamespace(**FAKE)])
    assert made == {
        "TuxPaintNameToItem (en)": {"SAIL": {"edges": [-1.0, 0.0, 1.0], "positive": [0, 5], "negative": [5, 5]}}
    }
    assert tables(found, [SimpleNamespace(**FAKE)], [1, 2])["q2i"]["rows"]["TuxPaintNameToItem (en)"]["SAIL"] == [
        1.5,
        2.5,
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes"], "recipes mini-plain mini-full"),
        (["peers", "mini"], "takes names of recipes"),
        (["ladder", "--set", "a=1"], "and --set"),
        (["peers", "--columns", "SAIL"], "there is no column 'SAIL'; there are 'dual tower'"),
        (["peer"], "invalid choice"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_any_work(words, said, capsys) -> None:
    with pytest.raises(SystemExit):
        comparison.main(words)
    assert said in capsys.readouterr().err


def test_a_cell_is_left_out_where_a_column_reads_nothing_of_a_side() -> None:
    speech, pictures = find_tasks(["TuxPaintPictureToSpeech", "TuxPaintSameName"])
    deaf, blind = "VLM-style (no audio)", "MiniLM text only"
    assert not readable(speech, deaf) and readable(pictures, deaf)
    assert not readable(pictures, blind) and readable(find_tasks(["MovieLensVanilla"])[0], blind)
    assert readable(speech, "SAIL (mini)")
