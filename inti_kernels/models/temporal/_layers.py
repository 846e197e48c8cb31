"""What both kinds of temporal modules are built of: a convolution on tokens, and the bottleneck around one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops import _recipe as recipe


class TokenConv3d(nn.Conv3d):
    """A depthwise convolution over the patches of all frames, with bias and padded by zeros to keep their number.

    Parameters and ``state_dict`` are those of the ``nn.Conv3d`` that it is; its input are tokens, which
    :func:`inti_kernels.ops.depthwise_conv3d` reads where they lie. Under autocast it gets what an ``nn.Conv3d`` would.

    Args:
        dim: channels.
        kernel: (3, 3, 3) or (3, 1, 1).
        prefix: tokens before the patches; zero in the output.
        backend: of the op.

    Shape:
        tokens [B, T, prefix + H·W, dim], grid (H, W) → the same shape.
    """

    def __init__(self, dim: int, kernel: tuple[int, int, int], *, prefix: int, backend: str | None) -> None:
        super().__init__(dim, dim, kernel, padding=tuple(size // 2 for size in kernel), groups=dim)
        self.prefix, self.backend = prefix, backend

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x.to(recipe.product_dtype(x))
        return ops.depthwise_conv3d(
            x, self.weight, self.bias, grid, temporal_stride=1, prefix=self.prefix, backend=self.backend
        )

    def macs(self, outputs: int) -> int:
        """Multiply-accumulates for a number of output patches, every tap at each."""
        return self.weight.numel() * outputs


class TokenBatchNorm(nn.BatchNorm1d):
    """A batch norm over rows of tokens, whose running statistics take every batch once: not again when its module runs
    a second time in the backward, for gradient checkpointing.

    Shape:
        rows [R, dim] → the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Inside a compiled graph the buffers are written behind the forward, whatever runs again.
        runs_again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (self.training and runs_again):
            return super().forward(x)
        # Copies, as the backward saves as many tensors as the first time.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)


class TemporalBottleneck(nn.Module):
    """x + up(conv(down(norm(x)))) on the patch tokens, conv being depthwise 3×1×1; prefix tokens pass unchanged.

    In token layout throughout: the 1×1×1 convolutions of a channels-first description are linear layers ``down`` and
    ``up`` (a weight [width, dim, 1, 1, 1] of theirs flattens to ``down``'s), and its BatchNorm3d a BatchNorm1d over the
    B·T·H·W patches (:class:`TokenBatchNorm`), which has the same statistics and the same names and shapes in the
    ``state_dict``.

    Args:
        dim: width C of the tokens.
        width: of the bottleneck.
        prefix: tokens before the patches.
        normalized: whether there is a batch norm.
        backend: of the convolution.

    Shape:
        x [B·T, prefix + H·W, C], frames T, grid (H, W) → the same shape.

    Raises:
        ValueError: in ``forward``, if x hasn't prefix + H·W tokens a frame.
    """

    def __init__(self, dim: int, width: int, *, prefix: int, normalized: bool, backend: str | None) -> None:
        super().__init__()
        self.prefix = prefix
        self.norm = TokenBatchNorm(dim) if normalized else nn.Identity()
        self.down = nn.Linear(dim, width)
        self.conv = TokenConv3d(width, (3, 1, 1), prefix=0, backend=backend)
        self.up = nn.Linear(width, dim)

    def forward(self, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        recipe.check_grid(x[None], grid, self.prefix)
        patches = x[:, self.prefix :]
        y = self.down(self.norm(patches.flatten(0, 1)))  # [B·T·HW, width]
        y = self.conv(y.unflatten(0, (-1, frames, patches.shape[1])), grid)
        y = patches + self.up(y).flatten(0, 1)
        return torch.cat((x[:, : self.prefix], y), dim=1)

    def macs(self, patches: int) -> int:
        """Multiply-accumulates for a clip of B = 1 and T·H·W patches."""
        return patches * (self.down.weight.numel() + self.up.weight.numel()) + self.conv.macs(patches)
