"""Benchmarks run, compare what is equal on both sides, and print the agreed keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
import transformers
from modeling_sail.evaluation.benchmarks import __main__ as command
from modeling_sail.evaluation.benchmarks import cache, encode, gpu, loss, mine, parts, peak, peers, picture, train
from modeling_sail.evaluation.benchmarks.child import run_child
from modeling_sail.evaluation.benchmarks.exact import SAID, exact_benchmark
from modeling_sail.evaluation.benchmarks.figures import KEYS, figure
from modeling_sail.evaluation.benchmarks.items import HZ, SECONDS, TOKENS, items_for, made_items, write_media
from modeling_sail.evaluation.benchmarks.models import as_encoder, embed, encoded, module_of
from modeling_sail.evaluation.benchmarks.turns import in_turn
from PIL import Image
from transformers import ClapAudioConfig, CLIPConfig

from modeling_sail import kernels_sail
from modeling_sail.kernels_sail import plain_kernels


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return as_encoder(tiny_folder)


@pytest.fixture(autouse=True)
def small_products(monkeypatch) -> None:
    """The machine's peak is not what is tested."""
    monkeypatch.setattr(peak, "SIDES", (64,))
    monkeypatch.setattr(gpu, "PEAK_SIDES", {"cpu": (64,)})


def check(figures) -> dict[tuple[str, str, str], dict]:
    """Every line has the keys, can be written, and its ratio is ours over the peer's; by case, figure and peer."""
    found, seen = {}, set()
    for one in figures:
        assert tuple(one) == KEYS
        assert json.loads(json.dumps(one, allow_nan=False)) == one
        assert (one["ratio"] is None) == (not one["peer"])
        if one["peer"]:
            assert one["ratio"] == pytest.approx(one["ours"] / one["peer"], rel=1e-2)
        key = one["case"], one["figure"], one["peer_name"]
        assert (*key, one["unit"]) not in seen, f"{key} twice"
        seen.add((*key, one["unit"]))
        found[key] = one
    return found


# --- figures, items, turns --------------------------------------------------------------------------------------------


def test_a_figure_holds_ours_the_peers_and_their_ratio() -> None:
    check([figure("b", "c", "speed", "items/s", 3.0, 2.0, "peer"), figure("b", "c", "alone", "", 3.0, None, "")])
    assert figure("b", "c", "f", "s", 3.0, 2.0, "p")["ratio"] == 1.5
    assert figure("b", "c", "f", "s", 3.0, 0.0, "p")["ratio"] is None


def test_full_items_have_a_picture_five_seconds_and_thirty_two_tokens_and_ragged_ones_differ(encoder) -> None:
    tokenizer = module_of(encoder).tokenizer
    for item in items_for(module_of(encoder), 5, "omni-full"):
        assert item["image"].size == (224, 224)
        assert len(item["audio"][0]) == SECONDS * HZ
        assert TOKENS - 12 < len(tokenizer(item["title"], add_special_tokens=False)["input_ids"]) <= TOKENS
    ragged = made_items(12, "omni")
    assert ["image" in item for item in ragged] == [True, False] * 6
    assert ["audio" in item for item in ragged] == [True, False, False] * 4
    assert len({len(item["title"]) for item in made_items(12, "text")}) > 6
    assert made_items(12, "text")[3] == made_items(12, "text")[3]
    with pytest.raises(ValueError, match="no kind of items 'video'"):
        made_items(1, "video")
    with pytest.raises(ValueError, match="0 items"):
        items_for(module_of(encoder), 0, "text")


@pytest.fixture
def sleep(monkeypatch) -> Callable[[float], None]:
    """Passes time for `time.perf_counter`, exactly and at once."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_sides_run_in_turn_after_a_round_that_is_not_counted(sleep) -> None:
    ran, waits = [], iter([300.0, 0.0, 1.0, 2.0, 5.0, 2.0, 1.0, 2.0])

    def side(name: str):
        def run() -> str:
            ran.append(name)
            sleep(next(waits))
            return name

        return run

    turns = in_turn({"a": side("a"), "b": side("b")}, 3)
    assert ran == ["a", "b"] * 4
    assert turns.results == {"a": "a", "b": "b"}
    assert turns.seconds == {"a": 1.0, "b": 2.0}  # the median: neither the uncounted 300 s nor the slow 5 s
    assert turns.spread == 4.0


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bfloat16"), [("text", False), ("omni", True), ("omni-full", False)])
def test_encode_compares_speed_and_vectors_with_fixed_batches(tiny_folder, kind, bfloat16) -> None:
    found = check(encode.kind_figures(str(tiny_folder), 6, 1, kind, bfloat16, peers=False))
    speeds = [one for one in found.values() if one["unit"] == "items/s"]
    assert {one["peer_name"] for one in speeds} >= set(encode.PEERS.values())
    assert all(one["ratio"] > 0 for one in speeds)
    differences = [one["ours"] for one in found.values() if "largest difference" in one["figure"]]
    assert len(differences) == 3 and max(differences) < 1e-5
    assert found[kind, "operations", ""]["ours"] > 0
    if bfloat16:
        lowest = found[kind, "bfloat16: lowest cosine with float32", ""]["ours"]
        assert 0.99 < lowest <= found[kind, "bfloat16: mean cosine with float32", ""]["ours"] <= 1
        assert 1e-5 < found[kind, "bfloat16: farthest from float32", ""]["ours"] < 0.1
        assert len(speeds) == 7


def test_padding_that_is_not_computed_is_not_counted(tiny_folder) -> None:
    module = module_of(as_encoder(tiny_folder))
    texts = ["a long text " * 9, "b"]
    loaded, _ = module.processor.load(texts)
    alone = [embed_of(module, [item]) for item in loaded]
    together = embed_of(module, loaded)
    real = sum(peak.flops_of(work)["linears"] for work in alone)
    assert peak.flops_of(together, module.model.text_tower)["linears"] == real < peak.flops_of(together)["linears"]
    assert module.model.text_tower.config._attn_implementation == "sdpa"


def embed_of(module, loaded):
    """A run of the model over items as one batch."""
    batch = module.processor.collate(loaded)
    return lambda: embed(module, loaded, [(range(len(loaded)), batch)])


def test_the_fixed_side_is_one_pass_a_batch_with_plain_kernels_and_ours_is_neither(encoder, monkeypatch) -> None:
    module, seen = module_of(encoder), []
    whole = type(module)._embed

    def watched(self, batch):
        seen.append((len(batch["input_ids"]), kernels_sail._plain.get()))
        return whole(self, batch)

    monkeypatch.setattr(type(module), "_embed", watched)
    sides = encode.own_sides(encoder, made_items(40, "text"))
    sides[encode.PEERS[encode.ENCODE]]()
    assert seen == [(32, True), (8, True)]
    seen.clear()
    sides[encode.ENCODE]()
    assert len(seen) > 2 and not any(plain for _, plain in seen)


def test_shares_of_the_peak_are_below_it_and_operations_are_counted_whole(tiny_folder) -> None:
    found = check(encode.peak_figures(str(tiny_folder), 4, 1))
    alone, whole = (
        found["text, float32, ours", f"linear layers {name}", "matrix-product peak"] for name in ("alone", "in all")
    )
    assert 0 < whole["ours"] < alone["ours"]
    assert 0 < found["text, float32", "tokens that are no padding, share", ""]["ours"] <= 1


@pytest.mark.parametrize("plain", [True, False])
def test_operations_of_linears_are_two_for_each_weight_and_row(plain) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False))
    rows = torch.randn(6, 24)

    def work() -> None:
        with torch.no_grad():
            layers(rows)

    assert peak.flops_of(work) == {"linears": 2 * 6 * (24 * 40 + 40 * 8), "all": 2 * 6 * (24 * 40 + 40 * 8)}
    assert 0 < peak.linear_seconds(work, plain) < 1
    assert peak.linear_seconds(lambda: rows.sin(), plain) == 0


def test_the_other_models_take_the_same_items() -> None:
    items = made_items(2, "omni-full")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPConfig(
        text_config={**sizes, "vocab_size": 2000}, vision_config={**sizes, "image_size": 32}, projection_dim=8
    )
    clap = ClapAudioConfig(patch_embeds_hidden_size=8, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2])
    clap.hidden_size = 64
    vectors = peers.clip_and_clap(clip, clap)(peers.at_rate(items))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert len(peers.at_rate(items)[0]["audio"][0]) == SECONDS * 48_000


def test_embedding_gemma_is_fed_pictures_sounds_and_text() -> None:
    if not hasattr(transformers, "EmbeddingGemma2Config"):
        with pytest.raises(ValueError, match="has no EmbeddingGemma 2"):
            peers.embedding_gemma(torch.float32)
        return
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {**sizes, **heads, "vocab_size": 2000, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    names = ("boi_token_id", "eoi_token_id", "image_token_id", "boa_token_id", "eoa_token_index", "audio_token_id")
    config = transformers.EmbeddingGemma2Config(
        text_config=text,
        vision_config={"model_type": "gemma4_vision", **sizes, **heads},
        audio_config={"model_type": "gemma4_audio", "subsampling_conv_channels": [128, 8], **audio},
        **{name: 10 + place for place, name in enumerate(names)},
    )
    one, other = peers.embedding_gemma(torch.float32, config)(made_items(2, "omni-full"))
    assert float(one.norm()) == pytest.approx(1, abs=1e-5)
    assert not torch.equal(one, other)


def test_embedding_gemma_has_the_size_that_its_name_says() -> None:
    if not hasattr(transformers, "EmbeddingGemma2Config"):
        pytest.skip("this version of transformers has no EmbeddingGemma 2")
    with torch.device("meta"):
        model = transformers.EmbeddingGemma2Model(peers.gemma_config())
    assert model.vision_tower is not None and model.audio_tower is not None
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert f"({millions:.0f}M)" in peers.GEMMA


# --- profile ----------------------------------------------------------------------------------------------------------


def test_parts_sum_to_the_whole_and_every_part_of_a_full_item_is_there(tiny_folder) -> None:
    found = check(parts.parts_benchmark(tiny_folder, 4, 1, ["omni-full"]))
    by_name = {name: one for (_, name, _), one in found.items()}
    whole = by_name["whole"]
    assert set(parts.PARTS) <= set(by_name)
    for side in ("ours", "peer"):
        assert sum(by_name[part][side] for part in parts.PARTS) == pytest.approx(whole[side], rel=0.01)
    shares = [by_name[f"{part}, share"]["ours"] for part in parts.PARTS]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert by_name["largest difference of vectors"]["ours"] < 1e-5
    assert any(name.startswith("fusion backbone: aten::") for name in by_name)


def test_a_part_within_a_part_is_counted_once_and_the_methods_come_back(encoder, sleep) -> None:
    clock = parts.Clock()
    with clock.part("outer"):
        sleep(2.0)
        with clock.part("inner"):
            sleep(5.0)
        sleep(1.0)
    assert clock.seconds == {"inner": 5.0, "outer": 3.0}
    module = module_of(encoder)
    with pytest.raises(RuntimeError, match="stopped"), parts.stood_in(module, clock):
        assert "_fuse" in vars(module.model)
        raise RuntimeError("stopped")
    assert not set(parts.MODEL) & set(vars(module.model))
    assert not set(parts.PROCESSOR) & set(vars(module.processor))


def test_standing_in_for_methods_changes_neither_vectors_nor_kernels(encoder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SAIL_ONEDNN", "1")
    items = write_media(made_items(3, "omni-full"), tmp_path)
    wanted, operators = encoded(encoder, items), {}
    with parts.stood_in(module_of(encoder), parts.Clock()):
        torch.testing.assert_close(encoded(encoder, items), wanted, atol=0, rtol=0)
    with plain_kernels():
        operators["plain"] = parts.operators_by_part(module_of(encoder), lambda: encoded(encoder, items))
    operators["ours"] = parts.operators_by_part(module_of(encoder), lambda: encoded(encoder, items))
    packed = "mkldnn::_linear_pointwise"
    assert packed not in operators["plain"]["fusion backbone"]
    if packed in operators["ours"]["fusion backbone"]:  # this build of torch has oneDNN
        assert "aten::addmm" not in operators["ours"]["fusion backbone"]


# --- train ------------------------------------------------------------------------------------------------------------


def test_all_sides_of_the_training_benchmark_have_the_same_first_loss(tiny_folder, tmp_path) -> None:
    found = {}
    assert train.fill(str(tiny_folder), "omni-full", 4, str(tmp_path))["seconds"] > 0
    cached = sorted(path for path in tmp_path.rglob("*.safetensors"))
    assert len(cached) == 2  # pictures and sounds
    for kind, sides in train.PAIRS.items():
        for side in dict.fromkeys(side for pair in sides for side in pair):
            found[side] = [train.one_side(side, str(tiny_folder), kind, 4, str(tmp_path))]
            assert len(found[side][0]["steps"]) == train.STEPS
        lines = check(train.train_figures(kind, found, sides))
        differences = [one["ours"] for (_, name, _), one in lines.items() if "difference" in name]
        assert len(differences) == len(sides) and max(differences) < 2e-3
        assert found[sides[0][0]][0]["items"] == 8
        assert sorted(path for path in tmp_path.rglob("*.safetensors")) == cached  # nothing was computed anew
        assert any(one["unit"] == "tokens/s" and one["ratio"] > 0 for one in lines.values())


# --- random weights, on any device ------------------------------------------------------------------------------------


def test_the_gpu_benchmark_runs_on_a_cpu_too(capsys) -> None:
    found = check(gpu.gpu_benchmark(["tiny"], "cpu", "float32", 4, 1, ["text", "omni"]))
    for mode in gpu.MODES:
        for mix in ("text", "omni"):
            case = f"tiny, {mode}, {mix}, 4 items, cpu, float32"
            assert found[case, "items", ""]["ours"] > 0
            assert found[case, "all operations", "matrix-product peak"]["ours"] > 0
    differences = [one["ours"] for (_, name, _), one in found.items() if "largest difference" in name]
    assert len(differences) == 2 and max(differences) < 1e-5
    assert not capsys.readouterr().err


def test_presets_of_random_weights_have_the_sizes_of_the_built_ones() -> None:
    models = {name: gpu.random_model(name, "meta", torch.bfloat16) for name in gpu.PRESETS}
    sizes = {name: sum(part.numel() for part in model.parameters()) for name, model in models.items()}
    assert 48e6 < sizes["mini"] < 55e6
    assert 155e6 < sizes["small"] < 175e6
    assert 1.8e9 < sizes["2b"] < 2.2e9


def test_a_device_that_is_not_there_is_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        list(gpu.gpu_benchmark(["tiny"], "cuda", "bfloat16", 4, 1))


# --- pictures and the command -----------------------------------------------------------------------------------------

LINES = [
    figure("encode", "omni <full>", "items", "items/s", 20.0, 10.0, "fixed & plain"),
    figure("encode", "omni <full>", "items", "items/s", 20.0, 5.0, "CLIP + CLAP"),
    figure("encode", "omni <full>", "no peer", "items/s", 20.0, None, ""),
]


def test_a_picture_has_a_bar_for_ours_and_each_peer_as_long_as_its_value(tmp_path) -> None:
    picture.draw(LINES, tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text(encoding="utf-8")
    widths = [float(width) for width in re.findall(r"<rect x=.*? width='([\d.]+)'", svg)]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 0.5, 0.25])
    assert "omni &lt;full&gt;" in svg and "10  fixed &amp; plain" in svg and "no peer" not in svg


def test_lines_of_a_file_are_drawn_as_png_and_what_is_no_figure_is_said(tmp_path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    command.main(["picture", str(lines), "--out", str(tmp_path / "x.png")])
    blue = Image.open(tmp_path / "x.png").convert("RGB").getcolors(1 << 20)
    assert (0x33, 0x66, 0xAA) in {color for _, color in blue}
    for broken, said in (("{", "line 4 is not JSON"), ('{"case": "x"}', "line 4 is no figure"), ("7", "line 4 is no")):
        lines.write_text("".join(json.dumps(line) + "\n" for line in LINES) + broken, encoding="utf-8")
        with pytest.raises(SystemExit, match=said):
            command.main(["picture", str(lines), "--out", str(tmp_path / "y.png")])
    with pytest.raises(ValueError, match="no figure with a peer and a unit"):
        picture.draw(LINES[2:], tmp_path / "z.svg")
    with pytest.raises(ValueError, match=r"pictures are .svg or .png"):
        picture.draw(LINES, tmp_path / "z.pdf")


def test_the_command_prints_lines_appends_them_and_draws_them(tmp_path, capsys, monkeypatch) -> None:
    given = {}

    def stand_in(args):
        given.update(vars(args))
        yield from LINES

    monkeypatch.setitem(command.BENCHMARKS, "loss", ("stands in", stand_in, command._size(3, "B")))
    command.main(["--rounds", "2", "--default-allocator", "--out", str(tmp_path / "l.jsonl"), "loss", "--size", "5"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == LINES
    assert (tmp_path / "l.jsonl").read_text(encoding="utf-8").count("\n") == 3
    assert (tmp_path / "l.svg").is_file()
    assert (given["rounds"], given["size"], list(given["allocators"].values())) == (2, 5, [{}])
    monkeypatch.setitem(command.BENCHMARKS, "loss", ("stands in", lambda args: LINES[2:], {}))
    command.main(["--out", str(tmp_path / "alone.jsonl"), "loss"])
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    assert not (tmp_path / "alone.svg").exists()  # nothing with a peer: no picture, and no error after the run
    for wrong, said in (
        (["encode", "--model", str(tmp_path)], "holds no model"),
        (["profile", "--model", str(tmp_path / "none")], "holds no model"),
        (["train", "--model", str(tmp_path)], "holds no model"),
        (["--rounds", "0", "loss"], "at least one round"),
        (["--out", str(tmp_path / "x.svg"), "loss"], "x.svg: lines are appended there, .* a picture is --picture"),
        (["--out", str(notes), "loss"], "notes.txt, line 1 is not JSON"),
        (["--picture", str(tmp_path / "x.pdf"), "loss"], "x.pdf: pictures are .svg or .png"),
    ):
        with pytest.raises(SystemExit, match=said):
            command.main(wrong)
    assert notes.read_text() == "mine\n"
    assert {path.name for path in tmp_path.iterdir()} == {"l.jsonl", "l.svg", "alone.jsonl", "notes.txt"}


def test_encode_runs_in_processes_of_its_own(tiny_folder, monkeypatch) -> None:
    asked = []

    def child(module, settings, environment):
        asked.append((module, settings["task"], environment))
        if settings["task"] == "first":
            return {"loading": 1.0, "query": 2.0}
        return {"figures": [figure("encode", settings.get("kind", "machine"), "items", "items/s", 2.0, 1.0, "p")]}

    monkeypatch.setattr(encode, "run_child", child)
    found = check(encode.encode_benchmark(tiny_folder, 4, 1, {"one": {}, "two": {"A": "1"}}, ["text"]))
    assert [task for _, task, _ in asked] == ["first", "first", "kind", "peak"] * 2
    assert {case.split("allocator: ")[1] for case, _, _ in found} == {"one", "two"}


# --- the others -------------------------------------------------------------------------------------------------------


def test_both_sides_of_the_loss_benchmark_compute_the_same() -> None:
    ours, dense = (loss._one(side, 96) for side in ("ours", "dense"))
    assert ours["sums"] == pytest.approx(dense["sums"], rel=1e-4)
    assert len(ours["seconds"]) == 1


def test_all_sides_of_the_cache_benchmark_compute_the_same_gradient() -> None:
    norms = [cache._one(side, 8, mini)["norm"] for side, mini in (("ours", 0), ("direct", 0), ("peer", 4))]
    assert norms == pytest.approx([norms[1]] * 3, rel=1e-4)


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="benchmarks.loss .*'side': 'nobody'.* failed"):
        run_child("modeling_sail.evaluation.benchmarks.loss", {"side": "nobody", "size": 4})


def test_an_item_is_the_same_alone_and_in_a_batch_and_bfloat16_is_not_float32(tiny_folder) -> None:
    found = {(line["case"], line["figure"]): line["ours"] for line in exact_benchmark(tiny_folder)}
    assert found["float32, alone and in a batch", "largest difference"] < 1e-5
    assert 1e-5 < found["bfloat16 and float32", "largest difference"] < 0.1
    assert found["bfloat16 and float32", "lowest cosine"] > 0.99
    rounded = found["float32 with weights of bfloat16, and float32", "largest difference"]
    assert 1e-5 < rounded < 0.1 and rounded != found["bfloat16 and float32", "largest difference"]


def test_real_items_in_bfloat16_stand_beside_float32(tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(SAID, "gap", lambda cosines: float(1 - cosines.min()))
    source = tmp_path / "films.jsonl"
    source.write_text('{"title": "one"}\n{broken\n{"image": "missing.png"}\n{"title": "two"}\n')
    lines = [line for line in exact_benchmark(tiny_folder, [source]) if "films" in line["case"]]
    found = {line["figure"]: line for line in lines if line["peer_name"] == "bfloat16, plain kernels"}
    weights = {line["figure"]: line for line in lines if line["peer_name"] == "float32, weights of bfloat16"}
    assert len(lines) == len(found) + len(weights)
    assert {line["case"] for line in found.values()} == {"films.jsonl: 2 real items, bfloat16 and float32"}
    assert 0.99 < found["lowest cosine"]["ours"] <= found["mean cosine"]["ours"] <= 1
    assert found["items whose cosine is below 0.99"]["ours"] == 0
    assert weights["gap"]["peer"] != found["gap"]["ours"], "the weights alone are to be rounded"
    assert min(weights["gap"]["peer"], found["gap"]["ours"], found["gap"]["peer"]) > 1e-7, "something was in float32"
    source.write_text('{"image": "missing.png"}\n')
    with pytest.raises(ValueError, match="films.jsonl has no good item; the first: no such file"):
        list(exact_benchmark(tiny_folder, [source]))
    source.write_text("{broken\n")
    with pytest.raises(ValueError, match="has no items"):
        list(exact_benchmark(tiny_folder, [source]))


def test_the_miners_side_finds_what_is_planted_and_the_peer_runs(monkeypatch) -> None:
    given = mine.planted(300)
    found = mine.ours(*given)
    assert 0.6 < found["f1"] < 1.0 and found["false_negatives"] > 0
    assert mine.peer(*given)["rows"] == 300
    assert mine.ours(*mine.planted(300, "a weak model"))["f1"] < 0.5
    monkeypatch.setattr(mine, "run_child", lambda module, settings, environment: mine._one(**settings))
    lines = list(mine.mine_benchmark(400, 1, {"default": {}}, ["200 names"]))
    assert {line["peer_name"] for line in lines} >= set(mine.NAMES.values())
