"""How every Triton kernel is launched: on x's device, in the current stream, with settings from a table or tuned."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import wide_dtype
from .._memory import empty

VECTOR_BYTES = 16  # the widest access that a thread makes
LEAST_PROGRAMS = 160  # two for each of V100's 80 SMs
SM_REGISTERS = 65536  # of 32 bits; a program that wants more than an SM has does not start


@dataclass(frozen=True)
class Settings:
    """Launch settings of a kernel.

    Attributes:
        tokens: tokens of a program's tile, a power of 2.
        channels: channels of a tile, a power of 2.
        warps: of a program.
        frames: input frames of a program's run, where it walks along them.
        registers: the most that a thread may take. ptxas, left alone, spills a little where that lets one more program
            into an SM; told a number, it takes that many.
        inner: of a matrix product, what a step multiplies of the inner axis; its tile is tokens × channels.
        stages: of a matrix product, how many steps are in shared memory at a time.
    """

    tokens: int
    channels: int
    warps: int
    frames: int = 1
    registers: int | None = None
    inner: int | None = None
    stages: int = 3

    def blocks(self, dim: int) -> int:
        """How many blocks of channels cover them all."""
        return triton.cdiv(dim, self.channels)


# kernel -> rows of (least compute capability, least dim, settings for 16-bit tokens); the first row that fits is taken.
# V100 relies on this table: nothing is measured before the first step. What it is chosen for, at batch 1, dim 768,
# 14×14, 16 frames:
# * at least LEAST_PROGRAMS; narrow models get there by smaller tiles, GPUs of more SMs, whose L2 holds the clip, by
#   shorter runs;
# * rows of 32 bytes or more, so that no sector is read by halves;
# * a 16-byte access a thread and tile (two in pair_interpolate), and registers for two programs an SM, 16 warps; one
#   with nine sums a thread, whose ten loads at a time hide as much.
_WALK = (
    (80, 512, Settings(tokens=128, channels=16, warps=8, frames=4, registers=128)),
    (80, 0, Settings(tokens=64, channels=16, warps=4, frames=4, registers=128)),
    (70, 512, Settings(tokens=128, channels=16, warps=8, frames=8, registers=128)),
    (70, 0, Settings(tokens=64, channels=16, warps=4, frames=8, registers=128)),
)
_PASS = (
    (70, 512, Settings(tokens=16, channels=128, warps=4)),
    (70, 0, Settings(tokens=16, channels=64, warps=2)),
)
# Of products at the same sizes, 3152 rows by 384 columns and 1576 by 768: at least one program for each of A100's and
# H100's SMs, three steps within the 100 KiB of the smaller GPUs' SMs, a warp group's 64 rows.
_DOT = (
    (70, 512, Settings(tokens=64, channels=128, warps=4, inner=64)),
    (70, 0, Settings(tokens=64, channels=64, warps=4, inner=32)),
)
_PASS_OF_HALF = tuple((c, d // 2, at) for c, d, at in _PASS)  # over what the Linear leaves of the channels
_TABLE: dict[str, tuple[tuple[int, int, Settings], ...]] = {
    "pair_interpolate_forward": _PASS,
    "pair_interpolate_backward": tuple((c, d, replace(at, registers=168)) for c, d, at in _PASS),
    "token_features_normalize": tuple((c, d, replace(at, registers=128)) for c, d, at in _PASS),
    # Its prologue needs registers beside the sums.
    "token_features_dot": tuple((c, d, replace(at, warps=2 * at.warps, registers=255)) for c, d, at in _DOT),
    "token_features_activation": _PASS_OF_HALF,
    "token_features_backward_activation": _PASS_OF_HALF,
    "token_features_backward_norm": tuple((c, d, replace(at, registers=168)) for c, d, at in _PASS),
    "interpolation_head_dot": _DOT,
    "interpolation_head_forward": _PASS,
    "interpolation_head_backward": tuple((c, d, replace(at, registers=168)) for c, d, at in _PASS),
    "depthwise_conv3d_forward": _WALK,
    "depthwise_conv3d_backward_x": _WALK,
    "depthwise_conv3d_backward_weight": tuple((c, d, replace(at, registers=255)) for c, d, at in _WALK),
}


def capability(x: Tensor) -> int:
    """Compute capability of x's device, 70 for 7.0; the interpreter runs V100's settings."""
    if not x.is_cuda:
        return 70
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def settings(kernel: str, x: Tensor) -> Settings:
    """A kernel's settings for tokens like x, by device, dim and dtype."""
    dim = x.shape[-1]
    found = next(at for least, width, at in _TABLE[kernel] if capability(x) >= least and dim >= width)
    # Half as many elements in a 16-byte access: as many accesses a thread, if an SM has registers for so many threads.
    if x.element_size() > 2 and (found.registers or 0) <= SM_REGISTERS // (2 * 32 * found.warps):
        found = replace(found, warps=2 * found.warps)
    if x.element_size() == 8:
        found = replace(found, channels=found.channels // 2, registers=found.registers or 128)
    return found


def unit(tensor: Tensor, *sizes: int) -> int:
    """Elements of the widest access that divides sizes and strides: a power of 2, up to 16 bytes.

    Kernels take sizes in units of it: Triton then knows what the sizes are multiples of, without compiling anew for
    every divisibility of every size. (Whether an address allows it, Triton sees for itself.)
    """
    found = VECTOR_BYTES // tensor.element_size()
    while any(size % found for size in sizes):
        found //= 2
    return found


def vector(x: Tensor) -> int:
    """`unit` of x's rows and strides."""
    return unit(x, x.shape[-1], *strides(x, 1).values())


def strides(x: Tensor, step: int) -> dict[str, int]:
    """The strides of [B, T, N, C] as kernels take them, in units of `vector`; that of an axis of one is nothing."""
    names = ("stride_batch", "stride_frame", "stride_token")
    return {name: x.stride(axis) // step if x.shape[axis] > 1 else 0 for axis, name in enumerate(names)}


def rounds_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor is bfloat16 where a GPU can't round to it: float32 holds it, and PyTorch rounds what comes."""
    return tensor.dtype == torch.bfloat16 and capability(tensor) < 80


def wide(x: Tensor) -> tl.dtype:
    """What x's dtype is summed in, as Triton names it."""
    return tl.float64 if wide_dtype(x) == torch.float64 else tl.float32


def launch(kernel: Any, programs: Callable[[Settings], int], at: Settings, **arguments: Any) -> None:
    """Runs a kernel.

    Args:
        kernel: of @triton.jit.
        programs: how many programs of given settings there are.
        at: the settings of the table, which apply unless INTI_AUTOTUNE=1 finds better ones.
        **arguments: the kernel's, but for TOKENS, CHANNELS and INNER.
    """
    if not programs(at):
        return
    first = next(value for value in arguments.values() if isinstance(value, Tensor))

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (programs(replace(at, channels=meta["CHANNELS"])),)

    arguments |= {"TOKENS": at.tokens} | ({"INNER": at.inner} if at.inner else {})
    with torch.cuda.device_of(first):
        if autotunes(first):
            # One at a time: the tuner keeps what it restores on itself, and two GPUs' backward passes are two threads.
            with _tuning:
                tuned = _tuned(kernel, at, bool(arguments.get("ACCUMULATE")), first.device)
                run(tuned, grid, arguments)
        else:
            options = {"CHANNELS": at.channels, "num_warps": at.warps, "maxnreg": at.registers}
            options |= {"num_stages": at.stages} if at.inner else {}
            run(kernel, grid, arguments | options)


def run(kernel: Any, grid: Callable[[dict[str, Any]], tuple[int]], arguments: dict[str, Any]) -> None:
    """The one place where a kernel starts; what compiles kernels ahead of time takes its place."""
    kernel[grid](**arguments)


# --- Tuning -----------------------------------------------------------------------------------------------------------


_tuning = threading.Lock()


def autotunes(x: Tensor) -> bool:
    """Whether a launch is tuned: INTI_AUTOTUNE=1, unless PyTorch is told to be deterministic (other settings sum in
    another order, and which of two are faster is not the same every day) or a CUDA graph is being captured."""
    if os.environ.get("INTI_AUTOTUNE") != "1" or torch.are_deterministic_algorithms_enabled():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@cache
def _tuned(kernel: Any, at: Settings, accumulates: bool, device: torch.device) -> Any:
    """The kernel behind triton.autotune, for one device. The table's settings are the first candidate, and TOKENS stays
    theirs: the number of partial sums hangs on it, as that of a product's hangs on its CHANNELS."""
    configs = [triton.Config({"CHANNELS": at.channels}, num_warps=at.warps, maxnreg=at.registers, num_stages=at.stages)]
    if at.inner:
        for warps in (at.warps, 2 * at.warps):
            for stages in (2, 3, 4):
                configs.append(triton.Config({"CHANNELS": at.channels}, num_warps=warps, num_stages=stages))
    for channels in (at.channels // 2, at.channels, 2 * at.channels) if not at.inner else ():
        for warps in (at.warps // 2, at.warps, 2 * at.warps):
            # 4 to 16 elements a thread and sum: more don't fit the registers, fewer leave accesses narrow.
            if warps and channels >= 8 and 4 <= at.tokens * channels // (32 * warps) <= 16:
                configs.append(triton.Config({"CHANNELS": channels}, num_warps=warps))
    sizes = ("frames", "pairs", "tokens", "height", "width", "dim", "context", "hidden",
             "TOKENS", "STRIDE", "SPACE", "VECTOR")  # fmt: skip
    key = [name for name in sizes if name in kernel.arg_names]
    # A buffer that is added to would take the gradient once for every run of the tuner.
    restore = {"restore_value": ["grad_x"]} if accumulates else {}
    cached = {"cache_results": True} if caches_tuning() else {}
    return triton.autotune(configs, key=key, **restore, **cached)(kernel)


def caches_tuning() -> bool:
    """Whether this Triton keeps what triton.autotune found on disk (3.4 and newer); else it's found once a process."""
    import inspect

    return "cache_results" in inspect.signature(triton.autotune).parameters


# --- What kernels share -----------------------------------------------------------------------------------------------


@triton.jit
def store_rounded(to, value, mask):
    """Stores a value in the pointer's dtype; float64 goes to bfloat16 by way of float32: the interpreter needs it."""
    if to.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    tl.store(to, value.to(to.dtype.element_ty), mask=mask)


def small(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter or position as kernels take it: contiguous, in x's dtype or the wide one. Another dtype would compile
    anew, and bfloat16 beside other tokens not at all on V100."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in (x.dtype, wide_dtype(x)) else tensor.to(wide_dtype(x))).contiguous()


# --- Partial sums -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "stride", "rows", "columns", "row_step", "column_step"])
def _sum_partials_kernel(
    partials,  # [count, rows, columns], wide
    out,  # element (row, column) at row · row_step + column · column_step
    count,
    stride: tl.int64,  # this and columns in units of VECTOR elements
    rows,
    columns,
    row_step,
    column_step,
    VECTOR: tl.constexpr,
    TOKENS: tl.constexpr,  # rows of a tile
    CHANNELS: tl.constexpr,  # columns of a tile
):
    columns *= VECTOR
    blocks = tl.cdiv(columns, CHANNELS)
    row = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    # Eight at a time, so that a large batch's many partial sums don't wait for each other.
    sums = tl.zeros((8, TOKENS, CHANNELS), partials.dtype.element_ty)
    for first in range(0, count, 8):
        number = first + tl.arange(0, 8)
        at = partials + (number.to(tl.int64) * stride * VECTOR)[:, None, None] + offsets[None, :, :]
        sums += tl.load(at, mask=(number < count)[:, None, None] & mask[None, :, :], other=0)
    total = tl.sum(sums, 0)
    store_rounded(out + row.to(tl.int64)[:, None] * row_step + column[None, :] * column_step, total, mask)


def sum_partials(partials: Tensor, out: Tensor, steps: Sequence[int]) -> None:
    """Sums partial sums in a fixed order: out[row·steps[0] + column·steps[1]] = Σ_i partials[i, row, column].

    Args:
        partials: [count, rows, columns], rows and columns contiguous, float32 or float64.
        out: written, of any dtype.
        steps: how far apart out's rows and columns lie.
    """
    if out.dtype == torch.bfloat16 and capability(out) < 80:
        rounded, out = out, empty(out.shape, out, torch.float32)
        sum_partials(partials, out, steps)
        rounded.copy_(out)  # GPUs without bfloat16 arithmetic have PyTorch round
        return
    count, rows, columns = partials.shape
    step = unit(partials, columns, partials.stride(0))
    # A program has all rows of its columns, up to 32: the rows of a depthwise weight lie side by side.
    height = min(triton.next_power_of_2(rows), 32)
    launch(
        _sum_partials_kernel,
        lambda at: triton.cdiv(rows, at.tokens) * at.blocks(columns),
        Settings(tokens=height, channels=16 if height > 1 else 64, warps=4 if height > 8 else 1),
        partials=partials,
        out=out,
        count=count,
        stride=partials.stride(0) // step,
        rows=rows,
        columns=columns // step,
        row_step=steps[0],
        column_step=steps[1],
        VECTOR=step,
    )
