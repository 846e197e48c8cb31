"""Matrix products on the CPU, by the fastest for the dtype and the processor: PyTorch's, or the compiled module's."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import native
from .._memory import empty
from ._call import call


def _vendor_is(name: str) -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return name in file.read(512)
    except OSError:
        return False


AMD, INTEL = _vendor_is("AuthenticAMD"), _vendor_is("GenuineIntel")


def _mkl_is_slow() -> bool:
    """MKL, which torch.mm calls in float32, makes no use of AVX-512 on AMD's processors; oneDNN, which convolutions
    call, does. Measured on an EPYC (Zen 5) at [1576, 1536]·[1536, 768], two threads: 391 GFLOP/s instead of 186
    forward, 395 instead of 182 and 326 instead of 180 in the two products of the backward."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and AMD


BY_ONEDNN = _mkl_is_slow()
# With AVX2 and no more, the compiled module's products are faster than MKL's on AMD's processors, or as fast where all
# is in the caches, and what comes before and behind them takes no pass of its own. Measured on an EPYC (Zen 3), two
# threads, operands in memory: [3152, 768]·[768, 384] 160 GFLOP/s instead of 126, [1576, 1536]·[1536, 768] 169 instead
# of 138, [1576, 768]·[768, 1536] 161 instead of 136, the gradients of the weights 164 and 144 instead of 165 and 141.
BY_KERNEL = torch.backends.cpu.get_cpu_capability() == "AVX2" and AMD
# With AVX-512 on Intel's they are as fast as MKL's, but for the gradients of the weights. Measured on a Xeon (Emerald
# Rapids), two threads: in one pass the module's forward took 29.8 and 33.2 ms instead of 30.4 and 34.8. Those with
# a first cache of 32 KB, before Ice Lake, were not measured.
IN_ONE_PASS = torch.backends.cpu.get_cpu_capability() == "AVX512" and INTEL


@lru_cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a network of a dtype is multiplied here: in the dtype itself, or 16-bit numbers in float32 where PyTorch
    has no fast products of them.

    oneDNN has those of bfloat16 with AVX-512 or Arm's instructions, those of float16 with AVX512-FP16 or AMX-FP16. By
    PyTorch's own loops, bfloat16 took 184 ms instead of 28 ms on an EPYC (Zen 3), and 3.5 s with a matrix transposed.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if not torch.backends.mkldnn.is_available():
        return torch.float32
    has = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return dtype if getattr(torch.ops.mkldnn, has)() else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a·b.

    Args:
        a: [rows, k], rows contiguous.
        b: [k, n], any strides.
        out: [rows, n], where the product goes if it has to go somewhere.

    Returns:
        ``out``, or fresh memory where that is what the fastest product gives.
    """
    if _by_onednn(a):
        return _as_convolution(a, b)
    if by_kernel(a.dtype) and a.numel():
        multiply(a, b, out, accumulate=False)
        return out
    return torch.mm(a, b, out=out)


def add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a·b, of the shapes of :func:`product`."""
    if _by_onednn(a):
        to += _as_convolution(a, b)
    elif by_kernel(a.dtype) and a.numel():
        multiply(a, b, to, accumulate=True)
    else:
        to.addmm_(a, b)


def add_product_over_rows(to: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """to += aᵀ·b, or = with ``first``: a weight's gradient.

    Args:
        to: [m, n], rows contiguous; of a and b's dtype, or float32 for 16-bit ones.
        a, b: [rows, m] and [rows, n], rows contiguous.
    """
    if by_kernel(a.dtype) and a.numel():
        multiply(a.t(), b, to, accumulate=not first)
        return
    if to.dtype == a.dtype and not _by_onednn(a):
        to.addmm_(a.t(), b, beta=0 if first else 1)
        return
    term = _weight_gradient(a, b) if _by_onednn(a) else a.t() @ b
    if first:
        to.copy_(term)
    else:
        to += term


def multiply(a: Tensor, b: Tensor, to: Tensor, *, accumulate: bool) -> None:
    """to = a·b, or to += a·b, by the compiled module: the same bits at any number of threads.

    Args:
        a: [rows, k], float32, any strides; no size is 0.
        b: [k, n], float32, any strides.
        to: [rows, n], float32, rows contiguous.
    """
    (rows, depth), columns, threads = a.shape, b.shape[1], torch.get_num_threads()
    call(
        "product",
        shape=(rows, columns, depth),
        a=a,
        a_strides=a.stride(),
        b=b,
        b_strides=b.stride(),
        c=to,
        c_pitch=to.stride(0),
        accumulate=accumulate,
        workspace=empty((native.load().product_workspace(columns, depth, threads),), a),
    )


def by_kernel(dtype: torch.dtype) -> bool:
    """Whether products of their own are the compiled module's in a dtype. INTI_CPU may have forced an instruction set
    by which it is slow."""
    return BY_KERNEL and dtype == torch.float32 and native.cpu_isa() == "avx2"


def in_one_pass(dtype: torch.dtype) -> bool:
    """Whether a forward's product and what is around it is one kernel of the compiled module's."""
    forward_only = IN_ONE_PASS and dtype == torch.float32 and native.cpu_isa() == "avx512"
    return forward_only or by_kernel(dtype)


def _by_onednn(a: Tensor) -> bool:
    return BY_ONEDNN and a.dtype == torch.float32 and bool(a.numel())


def _pixels(rows: Tensor) -> Tensor:
    """[rows, k] → [1, k, 1, rows]: the rows as channels-last pixels, without a copy."""
    return rows[None, None].permute(0, 3, 1, 2)


def _as_convolution(a: Tensor, b: Tensor) -> Tensor:
    y = torch.nn.functional.conv2d(_pixels(a), b.t()[:, :, None, None])
    return y.permute(0, 2, 3, 1)[0, 0]


def _weight_gradient(a: Tensor, b: Tensor) -> Tensor:
    size = (a.shape[1], b.shape[1], 1, 1)
    return torch.nn.grad.conv2d_weight(_pixels(b), size, _pixels(a))[:, :, 0, 0]
