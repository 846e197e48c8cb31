"""The CUDA kernels in the emulator: what tests/test_<op>.py doesn't ask of them.

INTI_CUDA_LIBRARY names the emulator, which asks for this file: INTI_CUDA_LIBRARY=$(echo build/emulator/_cuda*.so).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import op_suite
import pytest
import torch
from op_subject import Subject, allocate_by, as_tuple, assert_same_bits, gradients, with_room

from inti_kernels import FusedInTI, InTI, backends, ops, reference
from inti_kernels.__main__ import main
from inti_kernels.backends import cuda
from inti_kernels.cli import _traffic, check
from inti_kernels.testing import assert_close_three_way, module_case, op_cases, three_way, three_way_module

ROOT = Path(__file__).resolve().parent.parent
SOME = [
    pytest.param({}, id="default"),
    pytest.param({"fusion": "add", "head": "sigmoid", "context": ("cube", "global")}, id="add-sigmoid"),
    pytest.param({"fusion": "cat", "head": "attention"}, id="cat-attention"),
    pytest.param({"fusion": "cat", "hidden": 7}, id="cat"),
    pytest.param({"fusion": "add"}, id="add"),
    pytest.param({"context": ()}, id="none"),
    pytest.param({"context": ("cube",)}, id="cube"),
    pytest.param({"context": ("frame", "global"), "prefix": 0}, id="frame-global"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# --- The module of InTI -----------------------------------------------------------------------------------------------


def kernels(module: InTI) -> set[tuple[str, str]]:
    """The kernels that a module of this ablation must run, forward and backward."""
    names = ["depthwise_conv3d"] * ("cube" in module.context)
    names += {
        "softmax": ["token_features", "interpolation_head"],
        "sigmoid": ["token_features"],
        "attention": ["pair_interpolate"],
    }[module.head_type]
    names += ["inti"] * (module.head_type == "softmax" and module.fusion == "separate")
    return {(name + direction, "cuda") for name in names for direction in ("", "_backward")}


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_inti(dtype: torch.dtype, ablation: dict[str, object]) -> None:
    inti, x = module_case(dim=10, frames=4, grid=(2, 3), dtype=dtype, **ablation)
    before = backends.executed.copy()
    assert_close_three_way(three_way_module(FusedInTI.from_reference(inti, backend="cuda"), x))
    assert set(backends.executed - before) == kernels(inti)


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_inti_under_autocast(dtype: torch.dtype, ablation: dict[str, object]) -> None:
    inti, x = module_case(dim=10, frames=4, grid=(2, 3), **ablation)
    before = backends.executed.copy()
    assert_close_three_way(three_way_module(FusedInTI.from_reference(inti, backend="cuda"), x, autocast=dtype))
    assert set(backends.executed - before) == kernels(inti)


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtypes_that_inti_has(
    dtype: torch.dtype, autocast: torch.dtype, ablation: dict[str, object]
) -> None:
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), **ablation)
    inti.to(torch.float64 if dtype == torch.float64 else torch.float32)
    results = []
    for module in (inti, FusedInTI.from_reference(inti, backend="cuda")):
        value = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=autocast):
            outputs = module(value, return_weights=True)
        gradient = torch.autograd.grad(sum(out.double().square().sum() for out in outputs), value)
        results.append((*outputs, *gradient))
    for plain, kernel in zip(*results, strict=True):
        assert kernel.dtype == plain.dtype
        eps = 1e-12 if dtype == torch.float64 else torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(kernel, plain, rtol=0, atol=16 * eps * float(plain.detach().abs().max()))


def test_fused_inti_at_the_width_of_vit_b() -> None:
    inti, x = module_case(dim=768, frames=2, grid=(3, 3), dtype=torch.float32)
    assert_close_three_way(
        three_way_module(FusedInTI.from_reference(inti, backend="cuda"), x, autocast=torch.float16, draws=2)
    )


def test_fused_inti_compiles_whole_and_exports() -> None:
    inti, x = module_case(dim=8, frames=4, grid=(2, 3))
    fused = FusedInTI.from_reference(inti, backend="cuda")
    leaves = [x.requires_grad_(), *fused.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    actual, expected = (
        gradients(lambda *_, m=module: m(x, return_weights=True), leaves) for module in (compiled, fused)
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(fused, (x.detach(),))
    assert_same_bits(program.module()(x.detach()), fused(x))
    assert "inti_kernels.inti.default" in {str(node.target) for node in program.graph.nodes}


def test_a_hook_on_a_part_of_the_head_is_called() -> None:
    inti, x = module_case(dim=6, frames=4, grid=(2, 3))
    calls = []
    for part in (inti.head.linear2, inti.token.norm):
        part.register_forward_hook(lambda *_: calls.append(1))
    fused = FusedInTI.from_reference(inti, backend="cuda")
    torch.testing.assert_close(fused(x), inti(x))
    assert len(calls) == 4


# --- Threads' order, and the GPU that is played -----------------------------------------------------------------------

CASES = {
    "pair_interpolate": {"dim": 40},
    "depthwise_conv3d": {"dim": 24, "grid": (14, 14), "batch": 1},
    "token_features": {"dim": 40, "grid": (5, 7)},
    "interpolation_head": {"dim": 40, "grid": (5, 7)},
}


@pytest.fixture
def emulator() -> Iterator[object]:
    module = cuda.load()
    yield module
    module.set_seed(1)
    module.set_compute_capability(70)


def run(op: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    subject = Subject(op, (), CASES[op], backend="cuda")
    leaves, call = subject.leaves(dtype)
    return (*as_tuple(call(*leaves)), *gradients(call, leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ops.OPS)
def test_no_order_of_threads_changes_a_bit(op: str, dtype: torch.dtype, emulator: object) -> None:
    """A missing barrier shows where another thread has been first."""
    expected = run(op, dtype)
    for seed in (2, 3, 5):
        emulator.set_seed(seed)
        assert_same_bits(run(op, dtype), expected)


@pytest.mark.parametrize("op", ops.OPS)
def test_bfloat16_with_tensor_cores_and_without(op: str, emulator: object) -> None:
    """Below compute capability 8.0 its products are sums of float32 products."""
    results, products = [], []
    for capability in (70, 80):
        emulator.set_compute_capability(capability)
        emulator.start_recording()
        results.append(run(op, torch.bfloat16))
        kernels = {launch["kernel"] for launch in emulator.stop_recording()}
        products.append({kernel for kernel in kernels if kernel.endswith(("_fma_kernel", "_wmma_kernel"))})
    has_products = op in ("token_features", "interpolation_head")
    assert products == ([{f"{op}_fma_kernel"}, {f"{op}_wmma_kernel"}] if has_products else [set(), set()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.detach().float().abs().max()))


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("token_features", {"dim": 264, "frames": 2, "grid": (2, 3)}),
        ("interpolation_head", {"dim": 24, "hidden": 264, "frames": 2, "grid": (2, 3)}),
    ],
    ids=["token_features", "interpolation_head"],
)
def test_bfloat16_products_on_tensor_cores(op: str, sizes: dict[str, object], emulator: object) -> None:
    """Several tiles of columns, the last of them ragged, and a last step that isn't whole: of the head's two sources
    each has one, where its rows go over from features to the cube."""
    emulator.set_compute_capability(80)
    emulator.start_recording()
    rows = three_way(op, *op_cases(op, dtype=torch.bfloat16, **sizes), backend="cuda")
    products = {launch["kernel"]: launch["blocks"] for launch in emulator.stop_recording()}
    assert products[f"{op}_wmma_kernel"] > 1
    assert_close_three_way(rows)


WIDE = {"dim": 16, "grid": (4, 9)}  # rows of 16 bytes, and strips of patches that end at the grid's edge
CONVOLUTION = ("x", "weight", "bias", "position")


SUBJECTS = pytest.mark.parametrize(
    "subject",
    [
        Subject("pair_interpolate", ("x", "logits", "position"), WIDE, "cuda"),
        Subject("depthwise_conv3d", CONVOLUTION, WIDE, "cuda"),
        Subject("depthwise_conv3d", CONVOLUTION, {**WIDE, "temporal_stride": 1}, "cuda"),
        Subject("depthwise_conv3d", CONVOLUTION, {**WIDE, "kernel": (3, 1, 1), "temporal_stride": 1}, "cuda"),
        Subject(
            "token_features", ("x", "norm_weight", "norm_bias", "weight", "bias", "position"), WIDE, "cuda", (1e-5,), 2
        ),
    ],
    ids=["pair_interpolate", "3x3x3 / 2", "3x3x3 / 1", "3x1x1 / 1", "token_features"],
)


@SUBJECTS
def test_accumulates_sixteen_bytes_at_a_time(subject: Subject) -> None:
    op_suite.accumulates_into_a_buffer(subject)


@SUBJECTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [24, 21])
def test_touches_nothing_past_an_end(
    subject: Subject, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that the last block of a row has no use for are not read either: they may be in no memory of ours."""
    sector, behind = 32, []

    def guarded(*args, **kwargs):  # type: ignore[no-untyped-def]
        inside, _, room = with_room(*args, **kwargs)
        behind.append((room, range(-(-room.data_ptr() // sector), (room.data_ptr() + room.nbytes) // sector)))
        return inside

    allocate_by(monkeypatch, guarded)
    leaves, run = subject.leaves(dtype, dim=dim)
    leaves = [guarded(leaf.shape, leaf).copy_(leaf.detach()).requires_grad_() for leaf in leaves]
    with _traffic.emulated() as launches:
        gradients(run, leaves)
    touched = {at for launch in launches for at, _ in launch.touches()}
    assert touched.intersection(range(leaves[0].data_ptr() // sector, behind[0][1].start))
    assert not any(touched.intersection(sectors) for _, sectors in behind)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_heads_small_weights_keep_their_digits(sign: int) -> None:
    inputs, _ = op_cases("interpolation_head", dim=8, frames=2, grid=(2, 2))
    inputs["bias2"] = torch.tensor([15.0 * sign, -15.0 * sign])
    _, weights = ops.interpolation_head(**inputs, backend="cuda")
    exact = {name: None if value is None else value.double() for name, value in inputs.items()}
    torch.testing.assert_close(weights.double(), reference.interpolation_head(**exact)[1], rtol=1e-4, atol=0)


def test_launches_are_recorded(emulator: object) -> None:
    case = op_cases("pair_interpolate", dim=8, frames=2, grid=(1, 1))
    emulator.start_recording()
    ops.pair_interpolate(**case.inputs, backend="cuda")
    (launch,) = emulator.stop_recording()
    assert launch["kernel"] == "interpolate_forward_kernel"
    assert launch["blocks"] == len(launch["traffic"])
    assert launch["shared_bytes"] <= 96 * 1024


def test_a_refused_launch_names_its_kernel_and_sizes(emulator: object) -> None:
    """More blocks than a grid has; and the next launch is none the worse."""
    case = op_cases("depthwise_conv3d", dim=8, frames=2, grid=(40, 8), dtype=torch.float32)
    expected = ops.depthwise_conv3d(**case.inputs, **case.kwargs, backend="cuda")
    x = case.inputs["x"].expand(2**31, *case.inputs["x"].shape[1:])
    said = r"depthwise_conv3d_forward_kernel \(4294967296 blocks of 160 threads, \d+ bytes of shared memory\)"
    with pytest.raises(RuntimeError, match=said):
        emulator.depthwise_conv3d_forward(**forward_arguments(x, case.inputs["weight"], expected))
    assert_same_bits(ops.depthwise_conv3d(**case.inputs, **case.kwargs, backend="cuda"), expected)


def forward_arguments(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
    """What the binding takes; nothing is read or written by a launch that is refused."""
    shape = (x.shape[0], x.shape[1], 1, 40, 8, x.shape[3], 2, 3, "float32", "float32")
    tensors = {"x": x, "weight": weight, "bias": None, "position": None, "y": y}
    addresses = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    return {"shape": shape, "x_strides": x.stride()[:3], "stream": 0, **addresses}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_tile_is_never_more_than_its_threads_bring_in(dtype: str, emulator: object) -> None:
    """depthwise_conv3d refuses a tile that would be; there is none."""
    for height in range(1, 90):
        for width in range(1, 90):
            shape = (1, 16, 1, height, width, 16, 2, 3, dtype, dtype)
            tiles, runs = emulator.depthwise_conv3d_tiling(shape)
            assert tiles >= 1
            assert runs >= 1


@pytest.mark.parametrize("grid", [(40, 8), (3, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_turing_has_shared_memory_enough(dtype: torch.dtype, grid: tuple[int, int], emulator: object) -> None:
    """The tallest and the widest tiles of patches; T4 has 64 KiB for a block where V100 has 96."""
    emulator.set_compute_capability(75)
    case = op_cases("depthwise_conv3d", dim=16, frames=2, grid=grid, dtype=dtype)
    assert_close_three_way(three_way("depthwise_conv3d", *case, backend="cuda"))


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [("70", 70, 70), ("70", 72, 70), ("70;75+PTX", 90, 75), ("70;80;90", 86, 80), ("80+PTX", 90, 80),
     ("75;80", 80, 80), ("90", 80, 70), ("", 90, 70)],
)  # fmt: skip
def test_which_code_a_gpu_runs(archs: str, capability: int, code: int, emulator: object) -> None:
    """bfloat16 goes to the tensor cores where the code that runs has them, however new the GPU."""
    assert emulator.code_for(archs, capability) == code


@pytest.mark.parametrize(
    ("archs", "capability"), [("70", (8, 0)), ("70;75;80;86;90", (10, 0)), ("90+PTX", (7, 5)), ("80;120", (10, 0))]
)
def test_code_for_other_gpus_is_said_by_a_launch_as_by_the_backend(
    archs: str, capability: tuple[int, int], emulator: object
) -> None:
    major, minor = capability
    (reason,) = cuda.why_not_by_capability(capability, archs.split(";")) or [None]
    assert emulator.built_for_others(archs, 10 * major + minor) == reason


def test_code_for_gpus_that_are_not_known(emulator: object) -> None:
    """As of a build by hand, which has no INTI_CUDA_ARCHS."""
    assert emulator.built_for_others("", 80) == (
        "the CUDA kernels were built for GPUs that nobody noted, and this GPU has compute capability 8.0: rebuild with "
        "INTI_CUDA_ARCHS=80."
    )


def test_every_launch_has_its_kernels_launch_bounds() -> None:
    """The emulator refuses more threads by what a Launch says: the kernel's own word it can't read."""
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").iterdir()))
    text = re.sub(r"\s", "", text)
    bounds = {name: most for most, name in re.findall(r"__launch_bounds__\(([^,]*),[^;{]*?\)(\w+_kernel)\(", text)}
    assert len(bounds) == text.count("__global__")
    for name, members in re.findall(r'Launch(?:how)?\{"(\w+_kernel)",([^{}]*)\}', text):
        assert members.rpartition(",")[2] == bounds.pop(name), name
    # Those of convolutions and of products are launched by one function.
    assert set(bounds.values()) == {"kLanes*kMostStrips<T>", "WmmaTile::kThreads", "FmaTile<T>::kThreads"}
    assert "stream,kLanes*kMostStrips<T>}" in text
    assert "Launch{name,down*across,Tile::kThreads,Tile::kSharedBytes,stream,Tile::kThreads}" in text


# --- Traffic ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=_traffic.COUNTED["cuda"])
def traffic(request: pytest.FixtureRequest) -> list[_traffic.Traffic]:
    """At batch 1, dim 768, 14×14, 16 frames, float16."""
    return _traffic.count(request.param, torch.float16, backend="cuda")


def test_traffic(traffic: list[_traffic.Traffic]) -> None:
    passes = {"pair_interpolate": 2, "depthwise_conv3d": 12, "token_features": 5, "interpolation_head": 2}
    assert len(traffic) == passes[traffic[0].op]
    for row in traffic:
        print(row)
    for row in traffic:
        product = row.stage == "forward" and row.op in ("token_features", "interpolation_head")
        assert row.programs >= (150 if product else 160), row
        # A prefix token isn't read by a convolution, so that a little less than everything can be moved.
        assert 0.95 < row.through_l2 <= row.traffic, row
        # Tiles of the same rows find them in the L2 cache.
        assert row.traffic <= 1.3 or product, row
        assert row.through_l2 <= 1.15, row


def test_what_is_read_again_after_a_barrier_counts_again(emulator: object) -> None:
    """A product's blocks measure their rows before they multiply them; an L2 that holds nothing sees both."""
    case = op_cases("token_features", dim=64, frames=2, grid=(1, 1), dtype=torch.float16)
    with _traffic.emulated() as launches:
        ops.token_features(**case.inputs, backend="cuda")
    (launch,) = launches
    touched = [sector for sector, written in launch.touches() if not written]
    assert len(touched) > len(set(touched)) == len(launch.programs[0].read)
    assert _traffic.through_l2(launches, capacity=1) > _traffic.through_l2(launches)


def test_a_row_that_no_blocks_shared_memory_holds() -> None:
    """LayerNorm's backward shares such rows out among blocks, by columns."""
    case = op_cases("token_features", dim=2400, frames=2, grid=(1, 2), dtype=torch.float16)
    assert_close_three_way(three_way("token_features", *case, backend="cuda"))


# --- check, bench, info -----------------------------------------------------------------------------------------------


def test_check_covers_every_op(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one dtype, which is enough to see the rows; `make cuda-check` runs them all."""
    monkeypatch.setattr(check, "DTYPES", (torch.float16,))
    monkeypatch.setattr(check, "PREFIXES", (1,))
    assert main(["check", "--backend", "cuda", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["counts"]) == {"pass"}
    assert {row["what"] for row in report["rows"]} == {*ops.OPS, "FusedInTI"}
    assert all("cuda" in row["backend"] for row in report["rows"])


def test_bench_prints_the_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--dim", "32", "--frames", "2", "--grid", "2x2", "--dtype", "float16"]
    assert main(["bench", "--traffic", "--backend", "cuda", *small]) == 0
    out = capsys.readouterr().out
    assert "Bytes moved by the CUDA kernels" in out
    assert "backward to weight, bias" in out


def test_info_says_that_it_is_emulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cuda"]["build"]["emulated"] is True
    assert facts["backends"]["cpu"]["ops"]["token_features"]["cuda"] == []
