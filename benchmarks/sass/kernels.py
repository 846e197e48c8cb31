"""What each CUDA kernel does in an iteration of its steady-state loop: the models, beside which its code is held.

A model says how the code is to be recognised (marks: how often an instruction comes on the path of each step of the
steady state), what a launch looks like, and the bytes that no implementation can do without. Constants are read from
the headers that have them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from . import cubins
from .disassembly import AtLeast

DTYPES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Size:
    """Of the tokens, [batch, frames, 1 + side², dim]."""

    dim: int
    side: int
    batch: int
    frames: int = 16

    @property
    def tokens(self) -> int:
        return 1 + self.side**2

    @property
    def key(self) -> tuple[int, ...]:
        """As launches.cpp has it in names."""
        return self.dim, self.side, self.batch, self.frames

    def __str__(self) -> str:
        return f"{self.dim}, {self.side}×{self.side}, batch {self.batch}"


SIZES = (Size(768, 14, 8), Size(768, 14, 1), Size(1024, 16, 8), Size(1024, 16, 1))


@dataclass(frozen=True)
class Launch:
    """A launch, and a block's share of it."""

    blocks: int
    threads: int
    shared_bytes: int
    iterations: float  # of a block, through the steady-state loop; ends that cost more are counted in `walked`
    walked: float  # iterations' worth of loop that a block really goes through, run-in and run-out included
    outputs: int  # elements of the op's output, by which all figures are divided
    least_bytes: float  # every input read once, every output written once
    vectors: float = math.inf  # 16-byte loads of a lane in a step, on average over the lanes; more are predicated off


@dataclass(frozen=True)
class Model:
    """A kernel; functions of (model's size)."""

    title: str
    source: str
    name: str  # as nm -C has it
    steps: tuple[Mapping[str, int], ...]
    launch: Callable[[Size], Launch]
    sizes: tuple[Size, ...] = SIZES
    avoid: str = ""  # lines of source whose loads aren't on the path
    trips: Mapping[str, int] = field(default_factory=dict)  # of loops inside, by their line of source
    cached: str = "position|norm_weight|norm_bias|statistics"  # and those whose loads a cache answers
    bandwidth: float | None = None  # the aim: the share of memory's that it must be able to reach
    tensor: float | None = None  # the aim: HMMA's share of issue cycles


@cache
def _facts() -> dict[str, list[int]]:
    return cubins.launches(n for size in SIZES for n in (size.dim, size.side, size.batch, size.frames))


def fact(*name: object) -> list[int]:
    """The numbers that launches.cpp gives under a name."""
    return _facts()["_".join(map(str, name))]


def _source(title: str) -> str:
    """The file that has a kernel; titles begin with the op."""
    return re.match(r"\w+", title)[0] + ".cu"  # type: ignore[index]


def up(a: float, b: float) -> int:
    return int(-(-a // b))


# --- pair_interpolate ------------------------------------------------------------------------------------------------


def _pair(op: str, dtype: str, backward: bool) -> Model:
    item, vector = DTYPES[dtype], 16 // DTYPES[dtype]
    warps, *of_warp = fact("pair")
    tokens = of_warp[backward]

    def launch(size: Size) -> Launch:
        pairs = size.batch * size.frames // 2
        tiles = fact("pair_tiles", *size.key)[0] if backward else up(size.tokens, tokens * warps)
        outputs = pairs * size.tokens * size.dim
        steps = up(size.dim, 32 * vector)
        shared = 2 * warps * 2 * 32 * vector * 4 if backward else 0
        # z and x (forward); grad_z, x and grad_x; logits, weights and what is theirs; position and its gradient.
        tensors = (5 if backward else 3) * outputs * item
        small = pairs * size.tokens * 2 * item * (3 if backward else 2)
        position = size.frames * size.dim * 4 * (2 if backward else 1)
        return Launch(pairs * tiles, 32 * warps, shared, steps, steps, outputs, tensors + small + position)

    kind = "backward" if backward else "forward"
    weights = "Logits" if op == "pair_interpolate" else "Differences" if backward else "PartialDifferences"
    return Model(
        f"{op} {kind}, {dtype}",
        _source(op),
        f"inti::cuda::interpolate_{kind}_kernel<{_cpp(dtype)}, {vector}, inti::cuda::{weights}<float> >",
        # The position's sums over the warps are read back from shared memory, and added up.
        ({"STG.128": AtLeast(2 * tokens), "LDS.128": warps},) if backward else ({"STG.128": tokens},),
        launch,
        avoid=r"\bold_",
        bandwidth=0.85,
    )


# --- depthwise_conv3d ------------------------------------------------------------------------------------------------


def _convolution(dtype: str, which: str, patches: int, space: int, stride: int) -> Model:
    item, vector = DTYPES[dtype], 16 // DTYPES[dtype]
    lanes, *slabs = fact("slab")
    slab, taps = slabs[item == 4], 3 * space * space
    channels = slab // lanes
    side = 14 if patches == 7 else 16
    forward, whole = which == "forward", which == "backward"
    # FFMA of a frame's tile by the taps of one time step, and by as many of the weight's sums
    feed = space * space * patches * channels * (2 if whole else 1)

    def launch(size: Size) -> Launch:
        rows, strips, tiles, slabs, run, runs, threads, shared, shared_whole = fact(
            "convolution", item, patches, space, stride, *size.key
        )
        x = size.batch * size.frames * size.tokens * size.dim
        y = x // stride
        position = size.frames * size.dim * 4
        least = ((2 * x if whole else x) + y) * item + (position + size.dim * taps * item) * (2 if whole else 1)
        # The frames that open and end a run, as parts of an iteration by the products that they take. The clip's own
        # ends have none.
        extra = {1: 1.0, 2: 1 / 3}[stride]
        walked = run + extra * (1 - 1 / runs)
        vectors = min(rows, size.side) * min(strips * patches, size.side) * slab * item // 16
        outputs = y if forward else x
        return Launch(
            size.batch * slabs * tiles * runs, threads, shared_whole if whole else shared, run, walked,
            outputs, least, vectors / threads,
        )  # fmt: skip

    # Vectors of a frame's tile that a thread stages: at these sizes the tile is the whole frame, and so without halo.
    staged = {"STS.128": AtLeast(2)}
    stores = {"STG.128": up(4 * patches * slab * item // 16, 32)}
    steps: tuple[Mapping[str, int], ...]
    if forward and stride == 2:
        steps = ({"FFMA": feed, "STG.128": 0, **staged}, {"FFMA": 2 * feed, **stores, **staged})
    elif stride == 2:
        steps = ({"FFMA": 3 * feed, "STG.128": 2 * stores["STG.128"], **staged},)
    else:
        steps = ({"FFMA": 3 * feed, **stores, **staged},)
    direction = "forward" if forward else "backward"
    arguments = f"{_cpp(dtype)}, {vector}, {patches}, {space}, {stride}"
    if not forward:
        arguments += f", {str(whole).lower()}"
    kernel = "3×3×3" if space == 3 else "3×1×1"
    return Model(
        f"depthwise_conv3d {kernel} / {stride} {which.replace('_', ' to ')}, {dtype}, P = {patches}",
        "depthwise_conv3d.cu",
        f"inti::cuda::depthwise_conv3d_{direction}_kernel<{arguments}>",
        steps,
        launch,
        sizes=tuple(size for size in SIZES if size.side == side or item == 4 or space == 1),
        avoid=r"\bold\b",
        trips={r"int h = 0; h < SPACE": space},
        cached=r"position|added|\bold\b",  # and what is predicated off
        bandwidth=0.70,
    )


# --- The products ----------------------------------------------------------------------------------------------------


def _product(op: str, dtype: str) -> Model:
    item, vector = DTYPES[dtype], 16 // DTYPES[dtype]
    tensor = dtype == "float16"
    rows, columns, depth, threads, shared = fact("product", dtype)
    # A fragment's product is 16 instructions of 8×8×4.
    hmma = {"HMMA": rows * columns * depth // 4096 * 16 // (threads // 32)}
    steps: tuple[Mapping[str, int], ...] = (hmma if tensor else {},)

    def launch(size: Size) -> Launch:
        pairs = size.batch * size.frames // 2 * size.tokens
        m, n, k = (2 * pairs, size.dim // 2, size.dim) if op == "token_features" else (pairs, size.dim, 2 * size.dim)
        blocks = up(m, rows) * up(n, columns)
        least = (m * k + n * k) * item + (m * n * item if op == "token_features" else m * (n // 64) * 4)
        return Launch(blocks, threads, shared, k / depth, k / depth, m * n, least)

    kind = "wmma" if tensor else "fma"
    return Model(
        f"{op}'s product, {dtype}",
        f"{op}.cu",
        f"inti::cuda::{op}_{kind}_kernel<{_cpp(dtype)}, {vector}>",
        steps,
        launch,
        avoid=r"(fetch|load_packed<[\w:]+>)\(.*\bleft",
        tensor=0.60 if tensor else None,
    )


# --- What goes over rows of tokens -----------------------------------------------------------------------------------

_WARPS, _IN_FLIGHT = 4, 4  # of a block, and tokens of a warp at once: kWarps, kInFlight and their like


def _over_tiles(
    title: str, name: str, dtype: str, *, halved: bool, columns_halved: bool, tensors: int
) -> Model:  # fmt: skip
    """A kernel whose block has a tile of a frame's tokens and a warp's width of columns.

    halved: the rows are token pairs; columns_halved: they are dim / 2 wide; tensors: read and written, of the rows'
    size.
    """
    item, vector = DTYPES[dtype], 16 // DTYPES[dtype]

    def launch(size: Size) -> Launch:
        frames = size.batch * size.frames // (2 if halved else 1)
        width = size.dim // (2 if columns_halved else 1)
        tiles, tile_tokens = fact("token_tiles", frames, size.side)
        across, outputs = up(width, 32 * vector), frames * size.tokens * width
        iterations, blocks = up(tile_tokens, _WARPS * _IN_FLIGHT), frames * tiles * across
        return Launch(blocks, 32 * _WARPS, 0, iterations, iterations, outputs, tensors * outputs * item)

    kernel = f"inti::cuda::{name}_kernel<{_cpp(dtype)}, {vector}>"
    return Model(
        f"{title}, {dtype}", _source(title), kernel, ({"STG.128": _IN_FLIGHT},), launch,
        cached="position|weight|bias|statistics",
    )  # fmt: skip


def _norm(dtype: str) -> Model:
    """A block has a few rows at once: a warp each for their means, then a thread a vector of columns of them all."""
    item, vector = DTYPES[dtype], 16 // DTYPES[dtype]
    rows, term_bytes, column_bytes = fact("norm", item)
    columns = 2 if item == 4 else 1  # trips of the loop over columns; at these sizes as many over chunks of a row

    def launch(size: Size) -> Launch:
        frames = size.batch * size.frames
        tiles, tile_tokens = fact("token_tiles", frames, size.side)
        outputs, steps = frames * size.tokens * size.dim, up(tile_tokens, rows)
        shared = term_bytes + column_bytes * size.dim
        vectors = 2 * size.dim / vector / 32
        return Launch(frames * tiles, 32 * rows, shared, steps, steps, outputs, 3 * outputs * item, vectors)

    return Model(
        f"token_features's backward of LayerNorm, {dtype}",
        "token_features.cu",
        f"inti::cuda::token_features_backward_norm_kernel<{_cpp(dtype)}, {vector}, false>",
        # Into shared memory go the sums, and four vectors of x and of the gradient.
        ({"STG.128": rows * columns, "STS.128": AtLeast(6 + 8 * columns), "SHFL": AtLeast(10)},),
        launch,
        trips={r"column = threadIdx\.x \* V": columns, r"base = lane \* V": columns, r"int r = 0; r < rows": rows},
        cached=r"load(_wide)?<V>\((position|p\.norm_weight)|p\.statistics|\bold\b",  # and what is predicated off
    )


def _over_rows(dtype: str) -> Iterator[Model]:
    yield _over_tiles(
        "token_features's backward of GELU", "token_features_backward_activation", dtype,
        halved=False, columns_halved=True, tensors=3,
    )  # fmt: skip
    yield _over_tiles(
        "token_features's activation", "token_features_activation", dtype,
        halved=False, columns_halved=True, tensors=2,
    )  # fmt: skip
    yield _over_tiles(
        "token_features's normalize", "token_features_normalize", dtype, halved=False, columns_halved=False, tensors=2
    )
    yield _norm(dtype)
    yield _over_tiles(
        "interpolation_head's backward of GELU", "interpolation_head_hidden", dtype,
        halved=True, columns_halved=False, tensors=2,
    )  # fmt: skip


def _cpp(dtype: str) -> str:
    return {"float16": "inti::float16", "float32": "float"}[dtype]


def models() -> Iterator[Model]:
    """All of them, in the order of the table."""
    for dtype in DTYPES:
        yield _pair("pair_interpolate", dtype, False)
        yield _pair("pair_interpolate", dtype, True)
    for dtype in DTYPES:
        for space, stride in ((3, 2), (3, 1), (1, 1)):
            for patches in (7, 8) if dtype == "float16" and space == 3 else (8,):
                for which in ("forward", "backward_x", "backward"):
                    yield _convolution(dtype, which, patches, space, stride)
    for dtype in DTYPES:
        yield _product("token_features", dtype)
        yield _product("interpolation_head", dtype)
    for dtype in DTYPES:
        yield from _over_rows(dtype)
        yield _pair("interpolation_head's interpolation", dtype, False)
        yield _pair("interpolation_head's interpolation", dtype, True)
