"""Items a second and share of the matrix-product peak by modality mix: a preset with random weights, no folder needed.

    python -m modeling_sail.evaluation.benchmarks gpu --preset mini small 2b

Unusual: batches are made as tensors, on the device, so it is the model alone that is measured. The peak is that of
torch.mm in the same run; operations are counted from shapes. Padding is shown too: the same ragged items in passes cut
by tokens, beside fixed batches as they come. The same code runs on a CPU.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, TrainingArguments

from ...configuration_sail import AUDIO, EXTRA_CONFIGS, PAD, TEXT, VISION, preset_config
from ...kernels_sail import PACKED
from ...modeling_sail import SailEmbeddingModel
from ...processing_sail import token_batches
from ...training.grad_cache import select
from ...training.objective import Objective
from ...training.trainer import ContrastiveTrainer
from .child import measured
from .figures import figure
from .items import MIXES, TOKENS
from .models import FIXED, check_device
from .peak import flops_of, matrix_peak
from .turns import in_turn, synchronize

MODES = ("encode", "train")
LONGEST = 256  # tokens of a ragged item
BUDGET = 16_384  # padded tokens of a pass on a device that has room
PEAK_SIDES = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # a GPU is filled by larger products alone

# Sizes of the towers that `mini` and `small` take from pretrained ones (training/build.py).
LITE0 = {
    "model_type": "efficientnet",
    "image_size": 224,
    "hidden_act": "relu6",
    "squeeze_expansion_ratio": 0.01,
    "depthwise_padding": [],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "dropout_rate": 0.2,
}
WHISPER_BASE = {"model_type": "whisper", "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8}
WHISPER_BASE |= {"encoder_ffn_dim": 2048, "max_source_positions": 250}  # 5 s
MINILM = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
MINILM |= {"intermediate_size": 1536}
SMOLLM2 = {"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM2 |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {},
    "mini": {"text_config": MINILM, "vision_config": LITE0, "audio_config": WHISPER_BASE},
    "small": {"text_config": SMOLLM2, "vision_config": LITE0, "audio_config": WHISPER_BASE},
    "2b": {},
}


def gpu_benchmark(
    presets: Sequence[str],
    device: str,
    dtype: str,
    size: int,
    rounds: int,
    mixes: Sequence[str] = tuple(MIXES),
    modes: Sequence[str] = MODES,
) -> Iterator[dict[str, Any]]:
    """Figures by preset, mix and mode. A batch that the device has no memory for is said, and passed over.

    Args:
        presets: of `PRESETS`.
        device: "cuda" or "cpu".
        dtype: "bfloat16" or "float32": of the weights in encoding, of mixed precision in training.
        size: items of a batch.
        rounds: that are counted.
        mixes: of `items.MIXES`: what each item has besides 32 tokens.
        modes: of `MODES`.

    Raises:
        ValueError: no such device, no items.
    """
    check_device(device)
    if size < 1:
        raise ValueError(f"--size {size}: at least one item is needed.")
    peak = max(matrix_peak(getattr(torch, dtype), device, PEAK_SIDES[torch.device(device).type]).values())
    yield figure("gpu", f"{device}, {dtype}", "matrix-product peak", "GFLOP/s", peak, None, "")
    for preset in presets:
        for mode in modes:
            for mix in mixes:
                case = f"{preset}, {mode}, {mix}, {size} items, {device}, {dtype}"
                try:
                    yield from _case_figures(case, preset, mode, mix, size, rounds, device, dtype, peak)
                except torch.OutOfMemoryError:
                    print(f"{case}: the device has too little memory; take a smaller --size.", file=sys.stderr)


def _case_figures(
    case: str, preset: str, mode: str, mix: str, size: int, rounds: int, device: str, dtype: str, peak: float
) -> Iterator[dict[str, Any]]:
    kind, line = getattr(torch, dtype), partial(figure, "gpu", case)
    model = random_model(preset, device, kind if mode == "encode" else torch.float32)
    batch = made_batch(model, mix, torch.full((size,), TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        step = encode_step(model) if mode == "encode" else train_step(model, folder, dtype == "bfloat16")
        work = partial(step, batch)
        # Counted on few items, since operators are counted one by one; without the optimizer, which has no products.
        few = min(size, 4)
        flops = flops_of(partial(step, made_batch(model, mix, torch.full((few,), TOKENS))))["all"] * size / few
        seconds = in_turn({"ours": work}, rounds).seconds["ours"]
        memory = measured(work, 1)["extra_bytes"]
    yield line("items", "items/s", size / seconds, None, "")
    yield line("all operations", "GFLOP/s", flops / seconds / 1e9, peak, "matrix-product peak")
    yield line("peak extra memory", "MB", max(memory, 4096) / 1e6, None, "")
    if mode == "encode" and mix == "text":
        yield from _padding_figures(line, model, size, rounds)


def _padding_figures(
    line: Callable[..., Any], model: SailEmbeddingModel, size: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Ragged texts: passes of one length each, beside fixed batches in which the longest pads all."""
    generator = torch.Generator().manual_seed(0)
    lengths = (4 + torch.empty(size).exponential_(1 / 48, generator=generator)).clamp_max(LONGEST).long()
    whole, step = made_batch(model, "text", lengths), encode_step(model)
    cuts = [torch.tensor(cut) for cut in token_batches(lengths.tolist(), BUDGET)]
    fixed = list(torch.arange(size).split(FIXED))

    def run(places: list[Tensor]) -> Tensor:
        found = torch.cat([step(select(whole, cut)) for cut in places])
        return found[torch.cat(places).argsort().to(found.device)]

    def end_to_end() -> Tensor:
        padded = model.text_tower.config._attn_implementation
        model.text_tower.set_attn_implementation(PACKED)
        try:
            return run(cuts)
        finally:
            model.text_tower.set_attn_implementation(padded)

    sides = {"padded": partial(run, cuts), "packed": end_to_end, "fixed": partial(run, fixed)}
    turns = in_turn(sides, rounds)
    names = {"padded": "the same passes, padded", "fixed": f"fixed batches of {FIXED}, as they come"}
    for ours, said, peer in (
        ("padded", "ragged texts, passes cut by tokens", "fixed"),
        ("packed", "ragged texts, passes cut by tokens, rows end to end", "padded"),
    ):
        speeds = (size / turns.seconds[name] for name in (ours, peer))
        yield line(said, "items/s", *speeds, names[peer])
        difference = float((turns.results[ours] - turns.results[peer]).abs().max())
        yield line(f"{said}: largest difference of vectors", "", difference, None, names[peer])


def random_model(preset: str, device: str, dtype: torch.dtype) -> SailEmbeddingModel:
    """A preset of random weights on a device."""
    torch.manual_seed(0)
    towers = {name: _config(fields) for name, fields in PRESETS[preset].items()}
    with torch.device(device):
        model = SailEmbeddingModel(preset_config(preset, **towers))
    return model.to(device, dtype).eval()


def _config(fields: dict[str, Any]) -> Any:
    rest = dict(fields)
    model_type = rest.pop("model_type")
    return (
        EXTRA_CONFIGS[model_type](**rest) if model_type in EXTRA_CONFIGS else AutoConfig.for_model(model_type, **rest)
    )


def made_batch(model: SailEmbeddingModel, mix: str, lengths: Tensor) -> dict[str, Tensor]:
    """The model's keyword arguments for items of (B,) text lengths, each with what its mix names; random numbers."""
    config, device, count = model.config, model.device, len(lengths)
    media = [(AUDIO, 1)] * ("audio" in MIXES[mix]) + [(VISION, config.num_latents)] * ("image" in MIXES[mix])
    before = [segment for segment, number in media for _ in range(number)]
    text = torch.where(torch.arange(int(lengths.max())) < lengths[:, None], TEXT, PAD)  # (B, L)
    segments = torch.cat([torch.tensor(before, dtype=torch.long).expand(count, -1), text], dim=1)
    ids = torch.randint(5, min(config.text_config.vocab_size, 20_000), segments.shape)
    batch = {"input_ids": ids, "attention_mask": (segments != PAD).long(), "modality_ids": segments}
    owner = torch.arange(count)
    if "image" in MIXES[mix]:
        side = config.vision_config.image_size
        batch |= {"pixel_values": torch.randn(count, 3, side, side), "image_owner": owner}
        batch |= {"frame_positions": torch.zeros(count, dtype=torch.long)}
    if "audio" in MIXES[mix]:
        batch |= {"input_features": torch.randn(count, *_window_shape(config.audio_config)), "audio_owner": owner}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _window_shape(config: Any) -> tuple[int, ...]:
    """As the audio tower takes a window: Whisper's mels by time, CLAP's time by mels."""
    if config.model_type == "clap_audio_model":
        return 1, config.spec_size**2 // config.num_mel_bins, config.num_mel_bins
    return config.num_mel_bins, 2 * config.max_source_positions


def encode_step(model: SailEmbeddingModel) -> Callable[[dict[str, Tensor]], Tensor]:
    """A batch to its (B, D) unit vectors in float32."""

    @torch.no_grad()
    def step(batch: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.normalize(model(**batch).embeddings.float(), dim=-1)

    return step


def train_step(model: SailEmbeddingModel, folder: str, bfloat16: bool) -> Callable[[dict[str, Tensor]], None]:
    """A whole step of `ContrastiveTrainer` on a batch whose first half are queries, the second their targets."""
    arguments = TrainingArguments(
        output_dir=folder, max_steps=1, report_to=[], bf16=bfloat16, use_cpu=model.device.type == "cpu"
    )
    trainer = ContrastiveTrainer(model, arguments, objective=Objective())
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()

    def step(batch: dict[str, Tensor]) -> None:
        trainer.training_step(model, as_pairs(batch))
        optimizer.step()
        optimizer.zero_grad()
        synchronize()

    return step


def as_pairs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """A batch of an even number of items as `Collator` gives it."""
    pairs = len(batch["input_ids"]) // 2
    return {
        "items": select(batch, torch.arange(2 * pairs)),
        "parts": torch.zeros(2 * pairs, 5, dtype=torch.bool),
        "target_ids": torch.arange(pairs),
        "negative_slots": torch.zeros(0, 2, dtype=torch.long),
        "negative_mask": torch.zeros(0, dtype=torch.bool),
        "scores": torch.full((pairs,), float("nan")),
        "teacher_scores": torch.full((pairs, 1), float("nan")),
        **{"dataset": "default", "patterns": [], "losses": {}, "skipped": [], "asked": pairs},
    }
