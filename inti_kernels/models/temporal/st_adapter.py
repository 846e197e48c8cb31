"""ST-Adapter: a bottleneck with a convolution in time before every block, for towers that stay frozen."""

from __future__ import annotations

from torch import Tensor, nn

from ...reference import functional
from ._base import TemporalModules
from ._layers import TemporalBottleneck

PLACES = ("attention", "mlp")


class STAdapter(TemporalModules):
    """ST-Adapters: x + Linear_up(conv(Linear_down(x))) on the patch tokens in every block, conv depthwise 3×1×1.

    There is no activation. The convolution and the biases of both linear layers start at zero, as its authors' code has
    it, so that the tower starts as it was.

    Args:
        dim, blocks, grid, prefix, backend: as :class:`TemporalModules`.
        width: of the bottleneck.
        before: "attention" or "mlp": what of the block the adapter stands before, on the residual stream.

    Raises:
        ValueError, TypeError: as :class:`TemporalModules`; a width below 1, another place.
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        grid: tuple[int, int],
        *,
        prefix: int = 1,
        width: int = 384,
        before: str = "attention",
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, blocks, grid, prefix=prefix, backend=backend)
        functional.check_at_least_1(width=width)
        if before not in PLACES:
            raise ValueError(f"before must be one of {PLACES}, got {before!r}")
        self.width, self.before = width, before
        self.adapters = nn.ModuleList(
            TemporalBottleneck(dim, width, prefix=prefix, normalized=False, backend=backend) for _ in range(blocks)
        )
        for adapter in self.adapters:
            for parameter in (adapter.conv.weight, adapter.conv.bias, adapter.down.bias, adapter.up.bias):
                nn.init.zeros_(parameter)

    def precedes(self, number: int) -> bool:
        return self.before == "attention"

    def splits(self, number: int) -> bool:
        return self.before == "mlp"

    def before_attention(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self.adapters[number - 1](x, frames, grid) if self.precedes(number) else x

    def before_mlp(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self.adapters[number - 1](x, frames, grid) if self.splits(number) else x

    def macs(self, number: int, frames: int, tokens: int | None = None) -> int:
        return self.adapters[number - 1].macs(frames * self._patches(tokens))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}, before={self.before!r}"
