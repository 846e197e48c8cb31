"""The module InTI of arXiv 2408.06840 in plain PyTorch: what every other implementation is compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional

LEVELS = ("cube", "frame", "global")
FUSIONS = ("separate", "add", "cat")
HEADS = ("softmax", "sigmoid", "attention")


class NormLinearGELU(nn.Module):
    """T_{a→b} = LayerNorm(a) → Linear(a, b) → GELU (exact), as beside Eq. 9 of the paper.

    Shape: [..., a] → [..., b], any floating dtype.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(self.norm(x)))


class Head(nn.Module):
    """The network behind the features: two linear layers (softmax, sigmoid), or one and a learned query (attention).

    The last Linear (the query) starts at zero, so that training starts from the plain mean of the pair **(choice)**.
    """

    def __init__(self, in_features: int, hidden: int, attention: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_features, hidden)
        if attention:
            self.query = nn.Parameter(torch.zeros(hidden))
        else:
            self.linear2 = nn.Linear(hidden, 2)
            nn.init.zeros_(self.linear2.weight)
            nn.init.zeros_(self.linear2.bias)


class InTI(nn.Module):
    """Inter-frame Token Interpolation: halves the frames of a clip between two blocks of a ViT (Sec. 3.3, Eq. 7–13).

    Each pair of frames (2j, 2j+1) becomes one, token by token: z[j,k] = α·x[2j,k] + β·x[2j+1,k] (Eq. 7). (α, β) come
    from a small network on the token level (Eq. 9) and a context of cube (Eq. 10), frame (Eq. 11) and global (Eq. 12)
    level, summed (Eq. 13).

    Where the paper is silent, this implementation chooses: P starts as N(0, 0.02²), since zero P with zero σ would
    never train; the cube level's stride is (2,1,1) with padding 1, so output j is centred on frame 2j; prefix tokens
    have no place on the grid and a cube feature of 0; the frame level has projections of its own; without a class token
    (prefix 0) the mean patch token stands in for it, with registers the class token is token 0; the global level pads
    its convolutions by 1 and pools with kernel 2 in ceil mode, so every even T works; the head has one GELU, width
    ``hidden`` = dim, and starts at zero; the attention head's per-frame feature is f = GELU(Linear([T(x_frame),
    context])) with one Linear for both frames, score q·f.

    Args:
        dim: width C of the tokens; even (the token level makes C/2 of each frame).
        frames: T, even; fixed by the learned temporal position, see :meth:`resize_position`.
        grid: (H, W), the patches of a frame.
        prefix: tokens before the patches: 1 class token, 1 + R with R registers, 0 for towers without one.
        context: any subset of ("cube", "frame", "global"); with none F_token alone feeds the head.
        fusion: "separate" feeds the head concat(F_token, context) (2C), "add" their sum (C), "cat" the concatenation
            of F_token and every level ((1 + levels)·C).
        head: "softmax"; "sigmoid" (each logit on its own, the weights don't sum to 1); "attention" (score q·f per
            frame, softmax in each pair).
        hidden: width of the head's hidden layer; default dim.

    Raises:
        ValueError: for values that don't go together; the message says what was expected.
        TypeError: sizes that aren't whole numbers.
    """

    def __init__(
        self,
        dim: int,
        frames: int,
        grid: tuple[int, int],
        *,
        prefix: int = 1,
        context: Iterable[str] = LEVELS,
        fusion: str = "separate",
        head: str = "softmax",
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(context, Iterable):
            raise TypeError(f"context must be a subset of {LEVELS}, got {context!r}")
        context = (context,) if isinstance(context, str) else tuple(context)
        _check_arguments(dim, frames, grid, prefix, context, fusion, head, hidden)
        self.dim, self.frames, self.grid, self.prefix = dim, frames, (int(grid[0]), int(grid[1])), prefix
        self.context = tuple(level for level in LEVELS if level in context)
        self.fusion, self.head_type, self.hidden = fusion, head, dim if hidden is None else hidden

        self.position = nn.Parameter(torch.randn(frames, 1, dim) * 0.02)
        self.position_scale = nn.Parameter(torch.zeros(1))
        self.token = NormLinearGELU(dim, dim // 2)
        if "cube" in self.context:
            self.cube = nn.Conv3d(dim, dim, 3, stride=(2, 1, 1), padding=1, groups=dim)
        if "frame" in self.context:
            self.frame_pair = NormLinearGELU(dim, dim // 2)
            self.frame = NormLinearGELU(dim, dim)
        if "global" in self.context:
            self.global_convs = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=1, groups=dim) for _ in range(3))
        token_width = dim // 2 if head == "attention" else dim
        context_width = {"separate": dim * bool(self.context), "add": 0, "cat": dim * len(self.context)}[fusion]
        self.head = Head(token_width + context_width, self.hidden, attention=head == "attention")

    def forward(
        self, x: Tensor, return_weights: bool = False, grid: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Replaces each pair of frames by one.

        Args:
            x: tokens [B, frames, prefix + H·W, dim], any floating dtype.
            return_weights: also return (α, β).
            grid: (H, W) of this clip where it isn't the one the module was built for.

        Returns:
            z [B, frames/2, prefix + H·W, dim] in x's dtype; with ``return_weights`` also the weights
            [B, frames/2, prefix + H·W, 2].

        Raises:
            ValueError: x has another shape than the module was built for.
            TypeError: x isn't floating.
        """
        grid = self.grid if grid is None else grid
        self._check_input(x, grid)
        z, weights = self._forward(x, self.position_scale * self.position[:, 0], grid)
        return (z, weights) if return_weights else z

    def _forward(self, x: Tensor, position: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Steps 0 to 8 on checked tokens; position is σ·P [T, C]. Returns z and the weights."""
        x = functional.add_position(x, position)
        levels = self._context_levels(x, grid)
        if self.head_type == "attention":
            return self._interpolate(x, self._attention_scores(x, levels))
        logits = self._logits(self._token_features(x), levels)
        if self.head_type == "sigmoid":
            weights = torch.sigmoid(logits)
            return functional.weighted_sum(x, weights), weights
        return self._interpolate(x, logits)

    def _context_levels(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The levels in ``context``: cube [B, T/2, N, C], frame and global [B, T/2, C]."""
        levels = {}
        if "cube" in self.context:
            levels["cube"] = self._cube(x, grid)
        if "frame" in self.context or "global" in self.context:
            cls = functional.class_tokens(x, self.prefix)  # [B, T, C]
        if "frame" in self.context:
            halves = self.frame_pair(cls)
            levels["frame"] = self.frame(torch.cat((halves[:, 0::2], halves[:, 1::2]), dim=-1))
        if "global" in self.context:
            clip = cls.transpose(1, 2)  # [B, C, T]
            for convolution in self.global_convs[:2]:
                clip = F.gelu(F.max_pool1d(convolution(clip), 2, ceil_mode=True))
            clip = F.gelu(self.global_convs[2](clip).mean(dim=-1))  # [B, C]
            levels["global"] = clip[:, None].expand(-1, self.frames // 2, -1)
        return levels

    def _head_inputs(self, features: Tensor, levels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """features, cube and frame_context of :func:`functional.head_hidden`, by ``fusion``."""
        if self.fusion == "separate":
            per_frame = [levels[name] for name in ("frame", "global") if name in levels]
            return features, levels.get("cube"), sum(per_frame[1:], per_frame[0]) if per_frame else None
        per_token = [level if level.dim() == 4 else level[:, :, None] for level in levels.values()]
        if self.fusion == "add":
            return sum(per_token, features), None, None
        shape = (*features.shape[:-1], self.dim)
        return torch.cat([features, *(level.expand(shape) for level in per_token)], dim=-1), None, None

    def _logits(self, features: Tensor, levels: dict[str, Tensor]) -> Tensor:
        """[B, T/2, N, 2]."""
        return self.head.linear2(self._hidden(*self._head_inputs(features, levels)))

    def _attention_scores(self, x: Tensor, levels: dict[str, Tensor]) -> Tensor:
        """q·f of the two frames of every pair [B, T/2, N, 2]."""
        halves = self.token(x)  # [B, T, N, C/2]
        frames = (self._hidden(*self._head_inputs(half, levels)) for half in (halves[:, 0::2], halves[:, 1::2]))
        return torch.cat([F.linear(features, self.head.query[None]) for features in frames], dim=-1)

    # What FusedInTI does in its own way:

    def _cube(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """F_cube (Eq. 10): [B, T/2, N, C]."""
        return functional.grid_to_tokens(self.cube(functional.tokens_to_grid(x, grid, self.prefix)), self.prefix)

    def _token_features(self, x: Tensor) -> Tensor:
        """F_token (Eq. 9): [B, T/2, N, C]."""
        frames = self.token(x)  # [B, T, N, C/2]
        return torch.cat((frames[:, 0::2], frames[:, 1::2]), dim=-1)

    def _hidden(self, features: Tensor, cube: Tensor | None, frame_context: Tensor | None) -> Tensor:
        """The head's hidden layer [B, T/2, N, h]."""
        return F.gelu(self.head.linear1(functional.head_inputs(features, cube, frame_context)))

    def _interpolate(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax and Eq. 7: z [B, T/2, N, C] and the weights [B, T/2, N, 2]."""
        return functional.pair_interpolate(x, logits)

    def resize_position(self, frames: int) -> InTI:
        """Makes the module take another number of frames: P is interpolated linearly along time, in place.

        Args:
            frames: the new T, even.

        Returns:
            The module. ``position`` is a new Parameter [frames, 1, dim]; optimizers made before don't know it.

        Raises:
            ValueError: frames is odd or below 2.
        """
        functional.check_whole(frames=frames)
        functional.check_pairs(frames)
        table = self.position.detach()[:, 0].T[None]  # [1, C, T]
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        resized = F.interpolate(wide, frames, mode="linear", align_corners=True)[0].T[:, None]
        self.position = nn.Parameter(resized.to(table.dtype).contiguous(), self.position.requires_grad)
        self.frames = frames
        return self

    def _check_input(self, x: Tensor, grid: tuple[int, int]) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 4:
            raise ValueError(f"x must be [B, frames, prefix + H·W, dim], got {x.dim()} dimensions: {tuple(x.shape)}")
        if x.shape[1] != self.frames:
            functional.check_pairs(x.shape[1])
            raise ValueError(
                f"this InTI was built for {self.frames} frames, got {x.shape[1]}; "
                f"resize_position({x.shape[1]}) makes it take them"
            )
        if x.shape[3] != self.dim:
            raise ValueError(f"x must have dim {self.dim}, got {x.shape[3]}")
        functional.check_grid(grid)
        if x.shape[2] != self.prefix + grid[0] * grid[1]:
            raise ValueError(
                f"expected {self.prefix} prefix tokens + the grid {tuple(grid)} = "
                f"{self.prefix + grid[0] * grid[1]} tokens a frame, got {x.shape[2]}; pass another grid as grid=(H, W)"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, frames={self.frames}, grid={self.grid}, prefix={self.prefix}, context={self.context}, "
            f"fusion={self.fusion!r}, head={self.head_type!r}, hidden={self.hidden}"
        )


def _check_arguments(
    dim: int,
    frames: int,
    grid: tuple[int, int],
    prefix: int,
    context: tuple[str, ...],
    fusion: str,
    head: str,
    hidden: int | None,
) -> None:
    functional.check_whole(dim=dim, frames=frames)
    functional.check_prefix(prefix)
    functional.check_at_least_1(hidden=1 if hidden is None else hidden)
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive (the token level makes dim/2 of each frame), got {dim}")
    functional.check_pairs(frames)
    functional.check_grid(grid)
    if unknown := set(context) - set(LEVELS):
        raise ValueError(f"context must be a subset of {LEVELS}, got {sorted(unknown)}")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {FUSIONS}, got {fusion!r}")
    if head not in HEADS:
        raise ValueError(f"head must be one of {HEADS}, got {head!r}")
    if head == "attention" and fusion == "add" and context:
        raise ValueError(
            "fusion='add' sums F_token and the context, both of width dim; the attention head's per-frame feature has "
            "dim/2: use fusion='separate' or 'cat' with it"
        )
