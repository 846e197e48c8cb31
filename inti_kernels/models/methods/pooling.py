"""The baselines that put something simpler in InTI's place: LinearPooling and ConvPooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import _recipe as recipe
from ...reference import functional


class PairPooling(nn.Module):
    """What LinearPooling and ConvPooling share: the arguments of :class:`~inti_kernels.InTI`, and their checks.

    Args:
        dim: width C of the tokens.
        frames: T, even.
        grid: (H, W), the patches of a frame.
        prefix: tokens before the patches.

    Raises:
        ValueError, TypeError: sizes that can't be; ``frames`` is odd.
    """

    def __init__(self, dim: int, frames: int, grid: tuple[int, int], *, prefix: int = 1) -> None:
        super().__init__()
        functional.check_at_least_1(dim=dim)
        functional.check_whole(frames=frames)
        functional.check_pairs(frames)
        functional.check_grid(grid)
        functional.check_prefix(prefix)
        self.dim, self.frames, self.grid, self.prefix = dim, frames, (int(grid[0]), int(grid[1])), prefix

    def _check_input(self, x: Tensor, grid: tuple[int, int]) -> None:
        recipe.check_tokens(x)
        functional.check_pairs(x.shape[1])
        if x.shape[3] != self.dim:
            raise ValueError(f"x must have dim {self.dim}, got {x.shape[3]}")
        recipe.check_grid(x, grid, self.prefix)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, frames={self.frames}, grid={self.grid}, prefix={self.prefix}"


class LinearPooling(PairPooling):
    """z[j,k] = c₀·x[2j,k] + c₁·x[2j+1,k]: two learned coefficients for every token of every pair.

    Where the paper is silent, this implementation chooses **(choice)**: the coefficients are free (they need not sum
    to 1), two an insertion, and start at ½, the mean of the pair.

    Args, raises: as :class:`PairPooling`.
    """

    def __init__(self, dim: int, frames: int, grid: tuple[int, int], *, prefix: int = 1) -> None:
        super().__init__(dim, frames, grid, prefix=prefix)
        self.coefficients = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Replaces each pair of frames by one.

        Args:
            x: tokens [B, T, prefix + H·W, dim], any floating dtype, T even.
            grid: (H, W) of this clip where it isn't the one the module was built for.

        Returns:
            [B, T/2, prefix + H·W, dim] in x's dtype.

        Raises:
            ValueError, TypeError: x is no such tensor.
        """
        self._check_input(x, self.grid if grid is None else grid)
        return functional.weighted_sum(x, self.coefficients)

    def macs(self, frames: int, tokens: int) -> int:
        """Multiply-accumulates in products and convolutions for one clip of ``frames`` × ``tokens``: none."""
        return 0


class ConvPooling(PairPooling):
    """A strided 3-D convolution over the tokens seen as [T, H, W], which halves the frames.

    Where the paper is silent, this implementation chooses **(choice)**: kernel 3×3×3, stride (2,1,1), padding 1, as at
    InTI's cube level, with 8 groups. A kernel of K taps on C/g channels costs C²·K/g multiply-accumulates a token pair,
    and has as many weights. Here that is 3.375·C², next to the 3·C² of InTI's linear layers: for two insertions in
    ViT-B/16 (12 output frames of 197 tokens) 4.7e9 multiply-accumulates and 4.0 M parameters, where InTI has 4.3e9 and
    4.9 M. The published figures can't all be met: its 12 M parameters (127 - 115) and the 13e9 on Something-Something
    (234 - 221) ask for 9 to 10·C², its 5e9 on Kinetics (184 - 179) for 3.6·C². The costs are said to be close to
    InTI's, which decides for about 3·C²; a dense kernel of three taps in time, (3,1,1), has exactly that, but would see
    no neighbours in space, which is what a 3-D convolution is for. So it is 27 taps in groups.
    **(choice)** Inflated from the mean: ½ at the kernel's spatial centre on the two taps of the pair, from each channel
    to itself, all else and the bias 0, so that training starts from the mean of the pair.
    **(choice)** A prefix token has no place on the grid: it is a 1×1 grid of its own, and sees the kernel's spatial
    centre alone.

    Args:
        dim, frames, grid, prefix: as :class:`PairPooling`.
        kernel: (KT, KH, KW), KT at least 2, KH and KW odd.
        groups: of the convolution; divides dim.

    Raises:
        ValueError, TypeError: as :class:`PairPooling`; another kernel or number of groups.
    """

    def __init__(
        self,
        dim: int,
        frames: int,
        grid: tuple[int, int],
        *,
        prefix: int = 1,
        kernel: tuple[int, int, int] = (3, 3, 3),
        groups: int = 8,
    ) -> None:
        super().__init__(dim, frames, grid, prefix=prefix)
        if len(kernel) != 3 or kernel[0] < 2 or not all(size > 0 and size % 2 for size in kernel[1:]):
            raise ValueError(f"kernel must be (KT, KH, KW), KT at least 2 and KH and KW odd, got {kernel}")
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide dim {dim}, got {groups}")
        before = (kernel[0] - 1) // 2  # frames that an output sees before its pair
        padding = (before, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(dim, dim, tuple(kernel), stride=(2, 1, 1), padding=padding, groups=groups)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        channel = torch.arange(dim)
        with torch.no_grad():
            self.conv.weight[channel, channel % (dim // groups), before : before + 2, padding[1], padding[2]] = 0.5

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """As :meth:`LinearPooling.forward`; x's dtype is the parameters', but under autocast."""
        grid = self.grid if grid is None else grid
        self._check_input(x, grid)
        patches = functional.grid_to_tokens(self.conv(functional.tokens_to_grid(x, grid, self.prefix)), 0)
        if not self.prefix:
            return patches.to(x.dtype)
        alone = x[:, :, : self.prefix].permute(0, 2, 3, 1).flatten(0, 1)[..., None, None]  # [B·prefix, C, T, 1, 1]
        z = self.conv(alone)[..., 0, 0].unflatten(0, (-1, self.prefix)).permute(0, 3, 1, 2)
        return torch.cat((z, patches), dim=2).to(x.dtype)

    def macs(self, frames: int, tokens: int) -> int:
        """Multiply-accumulates for one clip of ``frames`` × ``tokens``: all taps of every output, padding too."""
        return frames // 2 * tokens * self.conv.weight.numel()
