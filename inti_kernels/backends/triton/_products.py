"""Matrix products of the triton backend: 16 bits from sm_80 on are `tl.dot` in kernels with a prologue and an epilogue;
all others are cuBLAS's, through PyTorch, between passes of Triton's.

Below sm_80 Triton has no tensor-core products; of float32, `tl.dot` would be TF32's, or slow.
"""

# No `from __future__ import annotations` here: Triton reads the annotations of the kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import LEAST_FOR_DOT, _launch, interprets


def dots(tensor: Tensor) -> bool:
    """Whether products of a tensor's dtype, on its device, are kernels of this backend."""
    return tensor.element_size() == 2 and _launch.capability(tensor) >= 10 * LEAST_FOR_DOT[0] + LEAST_FOR_DOT[1]


def operand(tensor: Tensor) -> tl.dtype:
    """What `tl.dot` takes a tensor's numbers in: its dtype, but for the interpreter, which has no bfloat16."""
    if tensor.dtype == torch.float16:
        return tl.float16
    return tl.float32 if interprets() else tl.bfloat16


def product(a: Tensor, b: Tensor, *, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a · b, or add + a · b, by cuBLAS; the one place for it: what compiles kernels ahead of time multiplies nothing.

    Args:
        a, b: matrices.
        add: a row, or a matrix; may be ``out``.
        out: where it goes, columns next to each other; fresh memory by default.
    """
    return torch.mm(a, b, out=out) if add is None else torch.addmm(add, a, b, out=out)


@triton.jit
def load_factor(weight, column, inner, pitch, columns, inners, PRODUCT: tl.constexpr):
    """A tile of weightᵀ for `tl.dot` [INNER, COLUMNS].

    weight: a pointer to a matrix [columns, ≥ inners] of rows ``pitch`` apart; column [COLUMNS]; inner [INNER].
    """
    at = weight + column.to(tl.int64)[None, :] * pitch + inner[:, None]
    return tl.load(at, mask=(column < columns)[None, :] & (inner < inners)[:, None], other=0).to(PRODUCT)
