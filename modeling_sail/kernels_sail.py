"""What a CPU computes faster at equal results: folded batch norms and paddings, channels last, packed linears, batches
that fit its cache.

Unusual: the model is never changed. A module gets a twin that shares its weights; it is kept outside of the module
tree, so that nothing of it is saved, trained or moved, and is made anew when the weights change. Only inference in
float32 or bfloat16 on a CPU takes twins. A tower's twin that does not give the tower's own numbers is dropped, with a
warning; `packing_sail` tries the backbone's.
"""

from __future__ import annotations

import copy
import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# On a CPU small batches of pictures and windows stay in the cache: measured 2 to 4 times faster than batches of 32, and
# by another quarter with half as many where the maps of convolutions are large. Elsewhere the batch only bounds the
# memory of items with many frames; that number is not measured.
TOWER_BATCH = 8
CONVOLUTION_BATCH = 4
TOWER_BATCH_ELSEWHERE = 128

PACKED = "packed"  # the attention of `packing_sail`, by the name that it is registered by

# A packed weight is a second copy. Towers with more than this in their linears are left as they are.
MAX_PACKED_BYTES = 2 << 30

# How far a twin's numbers may lie from the module's. In float32 the farthest, as a share of the largest; folding moves
# them by about 1e-6. In bfloat16 the norm of the differences over the norm: single numbers of a deep tower lie far from
# float32's there by any attention, torch's own or products, and the whole does not.
TOLERANCE = 1e-4
TOLERANCE_HALF = 0.1
_TYPES = (torch.float32, torch.bfloat16)

_IN_PLACE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
Gains = tuple[bool, bool, str | None]  # what a twin has: folded batch norms, packed linears, another attention
_TWINS: WeakKeyDictionary[nn.Module, dict[Gains, tuple[Any, nn.Module | None]]] = WeakKeyDictionary()
_plain: ContextVar[bool] = ContextVar("sail_plain_kernels", default=False)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within it the model runs as it is written, without twins and without cache-sized batches: what to compare with.

    >>> with plain_kernels():
    ...     model(**batch)
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def run_tower(tower: Any, values: Tensor, field: str) -> Tensor:
    """One field of a tower's output for N pictures or windows of sound.

    Args:
        tower: a transformers model that takes pictures (N, C, H, W), or windows of sound (N, ...).
        values: its input; cast to the tower's type.
        field: "last_hidden_state" or "pooler_output".
    """
    dtype = next(tower.parameters()).dtype
    if torch.is_grad_enabled() or _plain.get() or not len(values):
        return tower(values.to(dtype))[field]
    by_products = dtype == torch.bfloat16 and onednn_pays(dtype) and attention_of(tower) == "sdpa"
    tower = for_inference(tower, values[:1], field, attention=PACKED if by_products else None)
    values = values.to(next(tower.parameters()).dtype)
    size = TOWER_BATCH if values.device.type == "cpu" else TOWER_BATCH_ELSEWHERE
    if getattr(tower, "takes_channels_last", False):
        values, size = values.contiguous(memory_format=torch.channels_last), CONVOLUTION_BATCH
    return torch.cat([tower(part)[field] for part in values.split(size)]).to(dtype)


def for_inference(module: Any, probe: Tensor | None = None, field: str = "", attention: str | None = None) -> Any:
    """The module, or its faster twin where one is worth having and this is inference on a CPU.

    The twin of a module in bfloat16 that has batch norms is in float32: its convolutions are faster there than the
    module's own, and folded weights that are rounded once more would move vectors.

    Args:
        module: its class, hooks and weights decide whether it has a twin.
        probe: an input of the module; what counts is its shape. Batch norms are folded only where it is given: which
            of them follows which convolution is told from the order of their names, so the outputs of both are
            compared once. So are they where the twin attends otherwise. With it, calls have few shapes, as a tower's
            batches have.
        field: of the output, to compare.
        attention: what the twin of a transformers model attends with, by the name that it is registered by.
    """
    gains = (probe is not None and _folds(module), onednn_pays(_type(module)), attention)
    if not any(gains) or not _may_have_twin(module):
        return module
    key = (attention_of(module), _state(module))
    twins = _TWINS.setdefault(module, {})
    known = twins.get(gains)
    if known is None or known[0] != key:
        twin = _twin(module, probe, field, attention, folds=gains[0])
        if twin is None and attention is not None and any(gains[:2]):
            twin = _twin(module, probe, field, None, folds=gains[0])  # what else is faster is no worse for it
        known = twins[gains] = (key, twin)
    return module if known[1] is None else known[1]


def in_few_sizes(rows: int) -> int:
    """The next of sixteen sizes an octave, 6% larger at most.

    oneDNN keeps what it makes for each shape, about a megabyte; ragged passes have ever new ones, and memory grew by
    gigabytes. A function of the number alone: what an item's vector is must not depend on what came before.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


@contextmanager
def small_caches() -> Iterator[None]:
    """A process whose first oneDNN call is within keeps what oneDNN made for 64 shapes, not 1024, until it ends.

    For long runs, whose memory is to be flat; what is not kept is made again, of which only the smallest models notice
    anything. What the environment says already is left alone, and it is left as it was.
    """
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # the second is PyTorch's own layer above it
    mine = [name for name in names if not {name, name.replace("ONEDNN", "DNNL")} & set(os.environ)]
    os.environ.update(dict.fromkeys(mine, "64"))
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def attention_of(module: nn.Module) -> str | None:
    """By what a transformers model attends: the name that it is registered by."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def onednn_pays(dtype: torch.dtype = torch.float32) -> bool:
    """Whether linears keep weights that oneDNN has laid out for itself: on AMD with AVX-512.

    In float32 MKL is PyTorch's choice, which does not use AVX-512 there: half as fast. In bfloat16 it is oneDNN, which
    lays the weights out anew in each call. Elsewhere both are equally fast in float32 (measured with AVX2), and on Arm
    oneDNN is PyTorch's own choice. ``SAIL_ONEDNN=1`` or ``0`` in the environment decides otherwise.
    """
    asked = os.environ.get("SAIL_ONEDNN")
    if asked in ("0", "1"):
        return asked == "1" and _onednn_works(dtype)
    return _amd() and torch.backends.cpu.get_cpu_capability() == "AVX512" and _onednn_works(dtype)


# --- twins ----------------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer of which oneDNN has laid out the weight for itself; for inference, in the weight's type.

    Args:
        linear: whose weight it is; shared.
        ragged: the number of rows differs from call to call: it is brought to one of few.
    """

    def __init__(self, linear: nn.Linear, ragged: bool = False) -> None:
        super().__init__()
        self.ragged = ragged
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # shared: some layers ask their linears for the type
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1024)

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype != self.weight.dtype or not hidden.numel():
            return nn.functional.linear(hidden, self.weight, self.bias)
        rows = hidden.numel() // self.in_features
        more = in_few_sizes(rows) - rows if self.ragged else 0
        if not more:
            return self._product(hidden)
        filled = nn.functional.pad(hidden.reshape(rows, self.in_features), (0, 0, 0, more))
        return self._product(filled)[:rows].view(*hidden.shape[:-1], self.out_features)

    def _product(self, hidden: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self.bias, "none", [], "")
        return product


def _twin(module: nn.Module, probe: Tensor | None, field: str, attention: str | None, folds: bool) -> nn.Module | None:
    """The module again, of the same weights, with what is faster in it; None where nothing is or the numbers differ."""
    if folds and _type(module) != torch.float32:
        module = copy.deepcopy(module).float()
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin: Any = copy.deepcopy(module, shared)
    if attention is not None:
        with suppress(ValueError):  # a name that is not registered; a model with an attention of its own keeps it
            twin.set_attn_implementation(attention)
    other = attention is not None and attention_of(twin) == attention
    changed = _fold(twin) + _widen(twin) + _open(twin) if folds else 0
    twin.takes_channels_last = folds
    if onednn_pays(_type(twin)):
        changed += _pack(twin, ragged=probe is None)
    if not other and not changed:
        return None
    agrees = probe is None or not (folds or other) or _agree(module, twin, probe.shape, field)
    return twin if agrees else None


def _fold(twin: nn.Module) -> int:
    """Put each batch norm into the convolution that is named just before it; how many."""
    folded = 0
    for parent in twin.modules():
        convolution: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and convolution and _fits(convolution[1], child):
                whole: Any = fuse_conv_bn_eval(convolution[1], child)  # type: ignore[type-var]
                setattr(parent, convolution[0], whole.to(memory_format=torch.channels_last))
                setattr(parent, name, nn.Identity())
                folded += 1
            convolution = (name, child) if isinstance(child, nn.Conv2d) else None
    for activation in twin.modules() if folded else ():
        if isinstance(activation, _IN_PLACE):
            activation.inplace = True  # a map less to write; seen by the comparison where the input is read again
    return folded


def _widen(twin: nn.Module) -> int:
    """Let each depthwise convolution pad for itself that has its padding from a module before it; how many.

    More zeros on the right and below than on the left and above, as EfficientNet has them where the stride is 2, become
    equal ones and a kernel with zeros in front: a padded copy of the largest maps costs several times the convolution.
    """
    widened = 0
    for parent in twin.modules():
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if before and isinstance(before[1], nn.ZeroPad2d) and _pads_nothing(child):
                left, right, top, bottom = before[1].padding
                if 0 <= left <= right and 0 <= top <= bottom:
                    _widen_kernel(child, right - left, bottom - top, (bottom, right))
                    setattr(parent, before[0], nn.Identity())
                    widened += 1
            before = (name, child)
    return widened


def _pads_nothing(module: nn.Module) -> bool:
    """Whether it is a convolution of one channel each, without padding of its own or holes."""
    if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels or module.padding_mode != "zeros":
        return False
    return module.padding in ("valid", (0, 0)) and module.dilation == (1, 1)


def _widen_kernel(convolution: Any, columns: int, rows: int, padding: tuple[int, int]) -> None:
    """Put zeros before the (C, 1, H, W) kernel's columns and rows; of the weight a copy."""
    weight = nn.functional.pad(convolution.weight.detach(), (columns, 0, rows, 0))
    convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
    convolution.kernel_size = tuple(weight.shape[2:])
    convolution.padding = padding


def _open(twin: nn.Module) -> int:
    """Leave out squeeze-and-excite gates that are 1 whatever they see (EfficientNet-lite has none); how many."""
    opened = 0
    for parent in twin.modules():
        for name, child in list(parent.named_children()):
            gate: Any = getattr(child, "expand", None)
            if isinstance(gate, nn.Conv2d) and isinstance(getattr(child, "act_expand", None), nn.Sigmoid):
                if gate.bias is not None and not gate.weight.any() and bool((gate.bias.sigmoid() == 1).all()):
                    setattr(parent, name, nn.Identity())
                    opened += 1
    return opened


def _fits(convolution: nn.Module, norm: nn.BatchNorm2d) -> bool:
    return norm.num_features == getattr(convolution, "out_channels", -1) and norm.running_mean is not None


def _pack(twin: nn.Module, ragged: bool) -> int:
    linears = [
        (parent, name, child)
        for parent in twin.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if sum(child.weight.nbytes for _, _, child in linears) > MAX_PACKED_BYTES:
        return 0
    for parent, name, child in linears:
        setattr(parent, name, PackedLinear(child, ragged))
    return len(linears)


@torch.no_grad()
def _agree(module: Any, twin: Any, shape: Sequence[int], field: str) -> bool:
    """Asked with the same random numbers in every process: the answer must not depend on which item comes first."""
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_type(module))
    own = module(probe)[field].float()
    layout = torch.channels_last if twin.takes_channels_last else torch.contiguous_format
    other = twin(probe.contiguous(memory_format=layout))[field].float()
    whole = probe.dtype != torch.float32
    order = 2 if whole else torch.inf
    difference = float((own - other).norm(order) / own.norm(order).clamp_min(1e-12))
    if difference <= (TOLERANCE_HALF if whole else TOLERANCE):
        return True
    warnings.warn(
        f"{type(module).__name__}: what is faster on this CPU moves its output by {difference:.1e} of its "
        f"{'norm' if whole else 'largest'}; it runs without, which is slower.",
        stacklevel=2,
    )
    return False


# --- whether --------------------------------------------------------------------------------------------------------


def _may_have_twin(module: nn.Module) -> bool:
    """Inference, in one of `_TYPES` on a CPU, of a module that nobody watches, traces or has wrapped."""
    if torch.is_grad_enabled() or module.training or _plain.get() or traced():
        return False
    if any(_watched(part) for part in module.modules()):
        return False
    tensors = (*module.parameters(), *module.buffers())
    dtype = _type(module)
    return dtype in _TYPES and all(
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32))
        and not tensor.is_inference()  # these have no version, so a change would not be seen
        for tensor in tensors
    )


def _watched(part: nn.Module) -> bool:
    """Hooks, another ``forward``, or an adapter (PEFT), which is switched on and off without a weight being written."""
    hooked = part._forward_hooks or part._forward_pre_hooks or hasattr(part, "_hf_hook")
    return bool(hooked) or "forward" in vars(part) or hasattr(part, "base_layer")


def traced() -> bool:
    """Whether a graph is made of what runs."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _type(module: nn.Module) -> torch.dtype:
    """Of its first parameter."""
    return next((tensor.dtype for tensor in module.parameters()), torch.float32)


def _state(module: nn.Module) -> tuple[tuple[int, int, bytes], ...]:
    """Where each weight lies, how often it was written, and its ends: differs when the weights do.

    Writes through ``.data`` or NumPy are not counted, as PEFT's when it merges; only the numbers tell of them.
    """
    return tuple(
        (tensor.data_ptr(), tensor._version, _ends(tensor)) for tensor in (*module.parameters(), *module.buffers())
    )


def _ends(tensor: Tensor) -> bytes:
    """The first and last 64 bytes; read as they lie: `Tensor.item` of each weight is slow, and each pass asks."""
    place, size = tensor.data_ptr(), tensor.nbytes
    if not place or not size:
        return b""
    if not tensor.is_contiguous():
        return ctypes.string_at(place, tensor.element_size())
    end = min(64, size)
    return ctypes.string_at(place, end) + ctypes.string_at(place + size - end, end)


def _folds(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@cache
def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False


@cache
def _onednn_works(dtype: torch.dtype) -> bool:
    """Whether the private operators are in this version of torch, and give a linear's numbers."""
    linear, rows = nn.Linear(24, 40).to(dtype), torch.linspace(-1, 1, 72, dtype=dtype).view(3, 24)
    near = 1e-5 if dtype == torch.float32 else 0.02
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear(linear)(rows), linear(rows), rtol=near, atol=near)
    except (AttributeError, RuntimeError, TypeError):  # another version of torch, or one built without oneDNN
        return False
