"""The floor of the module: the bare matrix products that no implementation of InTI can do without.

Forward: mm(x[BTN, C] · Wᵀ[C, C/2]), the token level's Linear, and mm(f[BTN/2, 2C] · W₁ᵀ[2C, C]), the head's first.
Backward: the two input and the two weight gradients of these. Contiguous, in the compute dtype, no bias, fresh outputs;
timed in the same interleaved run as what is compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .workload import Sizes


class Floor:
    """Random operands of the products; ``forward()`` and ``backward()`` do them, and return them so that none is freed
    early."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        c = sizes.dim
        self.x, self.weight, self.grad_y = draw(sizes.tokens, c), draw(c // 2, c), draw(sizes.tokens, c // 2)
        self.features, self.weight1, self.grad_h = draw(sizes.pairs, 2 * c), draw(c, 2 * c), draw(sizes.pairs, c)

    def forward(self) -> tuple[Tensor, ...]:
        """y [BTN, C/2] and h [BTN/2, C]."""
        return torch.mm(self.x, self.weight.t()), torch.mm(self.features, self.weight1.t())

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients of x, W, f and W₁."""
        return (
            torch.mm(self.grad_y, self.weight),
            torch.mm(self.grad_y.t(), self.x),
            torch.mm(self.grad_h, self.weight1),
            torch.mm(self.grad_h.t(), self.features),
        )
