"""UniFormerV2's temporal modules: local ones inside the blocks, global ones beside the last, and their head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...reference import functional
from ._base import TemporalModules
from ._layers import TemporalBottleneck, TokenConv3d

LOCAL = (False, True, "double")


class QuickGELU(nn.Module):
    """x·σ(1.702·x), CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class GlobalBlock(nn.Module):
    """A pre-norm cross-attention block: one token of the clip reads all tokens of all frames.

    It reads a side copy of them to whose patches a depthwise 3×3×3 convolution was added, the position encoding. The
    attention's and the MLP's output projections start at zero, so that the token starts as it was; the projections
    before them start as their authors' code has them, Xavier-uniform.

    Args:
        dim: width C.
        heads: of the attention; dim is divisible by it.
        mlp_ratio: width of the MLP's hidden layer in units of dim.
        prefix: tokens before the patches.
        backend: of the convolution.

    Shape:
        token [B, 1, C], x [B, T, prefix + H·W, C], grid (H, W), present [B, T, prefix + H·W] (bool; x is zero where it
        is False) or None → token [B, 1, C].
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int, *, prefix: int, backend: str | None) -> None:
        super().__init__()
        self.position = TokenConv3d(dim, (3, 3, 3), prefix=prefix, backend=backend)
        self.query_norm = nn.LayerNorm(dim)
        self.token_norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), QuickGELU(), nn.Linear(mlp_ratio * dim, dim))
        self.prefix = prefix
        outputs = (self.attention.out_proj, self.mlp[2])
        for parameter in (self.position.bias, *(p for output in outputs for p in output.parameters())):
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.mlp[0].weight)  # the attention's are by default

    def forward(self, token: Tensor, x: Tensor, grid: tuple[int, int], present: Tensor | None = None) -> Tensor:
        tokens = self.token_norm((x + self.position(x, grid)).flatten(1, 2))  # [B, T·N, C]
        absent = None if present is None else ~present.flatten(1)
        read, _ = self.attention(self.query_norm(token), tokens, tokens, key_padding_mask=absent, need_weights=False)
        token = token + read
        return token + self.mlp(self.mlp_norm(token))

    def macs(self, frames: int, patches: int) -> int:
        """Multiply-accumulates for one clip."""
        dim, keys = self.attention.embed_dim, frames * (self.prefix + patches)
        attention = 2 * dim**2 + 2 * dim**2 * keys + 2 * dim * keys  # query and output, keys and values, two products
        return self.position.macs(frames * patches) + attention + 2 * dim * self.mlp[0].out_features


class UniFormerV2(TemporalModules):
    """UniFormerV2's temporal modules in a tower; with InTI between the blocks this is the paper's InTI^temp.

    *Local*, in every block: x + expand(conv(reduce(BatchNorm(x)))) on the patch tokens, of width ⌊C/1.5⌋ and without
    activation, conv being depthwise 3×1×1, before the attention and, "double", a second one before the MLP. The last
    projection starts at zero.

    *Global*, behind each of the last ``global_blocks`` blocks: one running token of the clip, from a learned start that
    is zero at first, reads all tokens of all frames (:class:`GlobalBlock`). The clip's features are then
    Dropout(LayerNorm(σ(b)·class token + (1 − σ(b))·global token)), with the class token averaged over the frames and
    b ∈ R^C from 0; the tower's own head, post-norm and projection, isn't used.

    Its authors' recipes are global blocks alone for Kinetics, and ``local="double"`` with 8 global blocks for
    Something-Something. **(choice)** Nothing is dropped inside the blocks. **(choice)** In towers without a class token
    the mean patch token of a frame stands in for it, with registers the class token is token 0. **(choice)** With no
    global block the tower keeps its own head.

    Args:
        dim, blocks, grid, prefix, backend: as :class:`TemporalModules`.
        heads: of the global blocks' attention; None for one in 64 channels, as CLIP has them.
        global_blocks: how many of the last blocks have one.
        local: False, True or "double".
        mlp_ratio: hidden width of the global blocks' MLP in units of dim.
        dropout: of the features.

    Raises:
        ValueError, TypeError: as :class:`TemporalModules`; heads that don't divide dim, more global blocks than blocks,
            neither local nor global modules, another ``local``, a dropout outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        grid: tuple[int, int],
        *,
        prefix: int = 1,
        heads: int | None = None,
        global_blocks: int = 4,
        local: bool | str = False,
        mlp_ratio: int = 4,
        dropout: float = 0.5,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, blocks, grid, prefix=prefix, backend=backend)
        heads = max(1, dim // 64) if heads is None else heads
        _check_arguments(dim, blocks, heads, global_blocks, local, mlp_ratio, dropout)
        self.heads, self.global_from, self.local = heads, blocks - global_blocks + 1, local
        self.replaces_head = global_blocks > 0
        if local:
            self.local_attention = self._local_modules()
        if local == "double":
            self.local_mlp = self._local_modules()
        if global_blocks:
            self.token = nn.Parameter(torch.zeros(1, 1, dim))
            self.global_blocks = nn.ModuleList(
                GlobalBlock(dim, heads, mlp_ratio, prefix=prefix, backend=backend) for _ in range(global_blocks)
            )
            self.balance = nn.Parameter(torch.zeros(dim))
            self.norm = nn.LayerNorm(dim)
            self.dropout = nn.Dropout(dropout)

    def _local_modules(self) -> nn.ModuleList:
        width = int(self.dim / 1.5)
        modules = nn.ModuleList(
            TemporalBottleneck(self.dim, width, prefix=self.prefix, normalized=True, backend=self.backend)
            for _ in range(self.blocks)
        )
        for module in modules:
            nn.init.zeros_(module.up.weight)
            nn.init.zeros_(module.up.bias)
        return modules

    def start(self, batch: int) -> Tensor | None:
        """The global token of every clip [B, 1, C]."""
        return self.token.expand(batch, -1, -1) if self.replaces_head else None

    def precedes(self, number: int) -> bool:
        return bool(self.local)

    def splits(self, number: int) -> bool:
        return self.local == "double"

    def reads(self, number: int) -> bool:
        return number >= self.global_from

    def before_attention(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self.local_attention[number - 1](x, frames, grid) if self.precedes(number) else x

    def before_mlp(self, number: int, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        return self.local_mlp[number - 1](x, frames, grid) if self.splits(number) else x

    def after_block(
        self,
        number: int,
        x: Tensor,
        frames: int,
        grid: tuple[int, int],
        present: Tensor | None,
        state: Tensor | None,
    ) -> Tensor | None:
        if not self.reads(number):
            return state
        clip = (-1, frames)
        present = None if present is None else present.unflatten(0, clip)
        return self.global_blocks[number - self.global_from](state, x.unflatten(0, clip), grid, present)

    def features(self, x: Tensor, state: Tensor) -> Tensor:
        share = torch.sigmoid(self.balance)
        cls = functional.class_tokens(x, self.prefix).mean(dim=1)
        return self.dropout(self.norm(share * cls + (1 - share) * state[:, 0]))

    def macs(self, number: int, frames: int, tokens: int | None = None) -> int:
        patches = self._patches(tokens)
        total = self.local_attention[number - 1].macs(frames * patches) if self.precedes(number) else 0
        total += self.local_mlp[number - 1].macs(frames * patches) if self.splits(number) else 0
        if self.reads(number):
            total += self.global_blocks[number - self.global_from].macs(frames, patches)
        return total

    def extra_repr(self) -> str:
        count = self.blocks - self.global_from + 1
        return f"{super().extra_repr()}, heads={self.heads}, global_blocks={count}, local={self.local!r}"


def _check_arguments(
    dim: int, blocks: int, heads: int, global_blocks: int, local: bool | str, mlp_ratio: int, dropout: float
) -> None:
    functional.check_at_least_1(heads=heads, mlp_ratio=mlp_ratio)
    functional.check_whole(global_blocks=global_blocks)
    if dim % heads:
        raise ValueError(f"dim must be divisible by heads, got {dim} channels and {heads} heads; give heads=")
    if not 0 <= global_blocks <= blocks:
        raise ValueError(f"global_blocks must be from 0 to the tower's {blocks} blocks, got {global_blocks}")
    if local not in LOCAL:
        raise ValueError(f"local must be one of {LOCAL}, got {local!r}")
    if local and dim < 2:
        raise ValueError(f"a local module works on ⌊dim/1.5⌋ channels: dim must be at least 2, got {dim}")
    if not (local or global_blocks):
        raise ValueError("there must be local modules or global blocks, got local=False and global_blocks=0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
