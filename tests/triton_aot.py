"""Compiles every Triton kernel ahead of time, as launches at real sizes do, and holds it to tests/triton_budget.json.

    python tests/triton_aot.py [--arch 70 …] [--update] [--json FILE]

No GPU is needed. Launches are intercepted where a kernel would start (`_launch.run`), so what is compiled is what a
user's call compiles. A process of its own, since TRITON_INTERPRET is read when a kernel is defined. Of each kernel are
held: registers, spills and local memory (none), shared memory, and the global accesses in its PTX: those of 16 bytes,
and those that are narrower; a kernel with a product of its own must have it on the tensor cores. The budget has a
section for each version of Triton; --update writes the one of the Triton at hand. Exit status 1 if a figure is over its
budget. A Triton without a section is held to what no budget may allow.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are defined
os.environ.pop("INTI_AUTOTUNE", None)  # the table's settings are compiled

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inti_kernels.backends import _arguments
from inti_kernels.backends.triton import (
    _launch,
    _products,
    depthwise_conv3d,
    interpolation_head,
    pair_interpolate,
    token_features,
)
from inti_kernels.ops.depthwise_conv3d import CASES
from inti_kernels.testing import op_cases

BUDGET = Path(__file__).with_name("triton_budget.json")
ARCHS = (70, 75, 80, 86, 90)
DTYPES = {"float16": torch.float16, "float32": torch.float32}
# CLIP ViT-B/16 and ViT-L/14 at 224². Both compile to the same code as long as they get the same settings.
SIZES = ({"dim": 768, "grid": (14, 14)}, {"dim": 1024, "grid": (16, 16)})
CLIP = {"frames": 16, "batch": 1, "prefix": 1}


@dataclass
class Launch:
    """A kernel as one of its launches would compile it."""

    name: str  # kernel, case, dtype and what else tells it from its like
    kernel: Any
    arch: int
    signature: dict[str, str] = field(repr=False)
    constants: dict[str, Any] = field(repr=False)
    aligned: tuple[str, ...] = field(repr=False)
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """The same key, the same code."""
        return (self.kernel.__name__, *map(str, (self.signature, self.constants, self.aligned, self.options)))


@dataclass
class Figures:
    """What a compiled kernel needs; every figure has a budget."""

    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int
    wide: int  # global accesses of 16 bytes, in the code
    narrow: int  # of less


def launches(arch: int) -> list[Launch]:
    """Every kernel that the ops launch at the real sizes, each that compiles differently once."""
    found: dict[tuple[Any, ...], Launch] = {}
    for name, calls in _workloads(arch):
        for case, call in calls:
            for launch in _intercepted(call, arch, f"{case} {name}"):
                found.setdefault(launch.key, launch)
    names = [launch.name for launch in found.values()]
    assert len(set(names)) == len(names), "two kernels of one name"
    return list(found.values())


def _workloads(arch: int) -> Iterator[tuple[str, Iterator[tuple[str, Callable[[], object]]]]]:
    """float16 and float32 in full; of what else runs, InTI's own two ops at one size: float16 tokens beside float32
    parameters and logits, which autocast makes, bfloat16 where there is any, and float64."""
    for name, dtype in DTYPES.items():
        for sizes in SIZES:
            for full in (True, False):
                yield name, _calls(dtype, dtype, CASES, full, **sizes)
    yield "float16 beside float32", _calls(torch.float16, torch.float32, CASES[:1], True, **SIZES[0])
    if arch >= 80:
        yield "bfloat16", _calls(torch.bfloat16, torch.bfloat16, CASES[:1], True, **SIZES[0])
    yield "float64", _calls(torch.float64, torch.float64, CASES[:1], True, **SIZES[0])


_case = cache(op_cases)  # the same tensors for every architecture


def _calls(
    dtype: torch.dtype, others_dtype: torch.dtype, cases: Sequence[Any], full: bool, **sizes: Any
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a training step calls; ``full``: with position, and a buffer that grad_x is added to."""
    suffix = "" if full else " plain"
    inputs = _case("pair_interpolate", dtype=others_dtype, position=full, **sizes, **CLIP).inputs
    x, logits, position = inputs["x"].to(dtype), inputs["logits"], inputs["position"]
    buffer = torch.empty_like(x) if full else None
    arguments, needs = (x, logits, position), (True, True, full)
    yield f"pair{suffix}", lambda: pair_interpolate.pair_interpolate_forward(*arguments)
    yield (
        f"pair{suffix}",
        lambda: pair_interpolate.pair_interpolate_backward(x[:, ::2], logits, *arguments, needs, buffer),
    )
    for kernel, stride in cases:
        options = {"kernel": kernel, "temporal_stride": stride, "position": full}
        inputs, kwargs = _case("depthwise_conv3d", dtype=others_dtype, **options, **sizes, **CLIP)
        given = (x, *list(inputs.values())[1:], kwargs["grid"], stride, 1)
        case, y = f"{'×'.join(map(str, kernel))}/{stride}{suffix}", x[:, ::stride]
        yield case, partial(depthwise_conv3d.depthwise_conv3d_forward, *given)
        yield case, partial(depthwise_conv3d.depthwise_conv3d_backward, y, *given, (True,) * 3 + (full,), buffer)
    yield from _calls_of_token_features(dtype, others_dtype, full, sizes)
    yield from _calls_of_the_head(dtype, others_dtype, full, sizes)


def _calls_of_token_features(
    dtype: torch.dtype, others_dtype: torch.dtype, full: bool, sizes: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The Linear in the tokens' dtype; ``full`` also keeps what the backward needs."""
    inputs, _ = _case("token_features", dtype=others_dtype, position=full, **sizes, **CLIP)
    x, weight, bias = (inputs[name].to(dtype) for name in ("x", "weight", "bias"))
    given = (x, inputs["norm_weight"], inputs["norm_bias"], weight, bias, inputs["position"], 1e-5)
    statistics = x.new_empty((*x.shape[:3], 2), dtype=_arguments.wide_dtype(x))
    # A column slice of a wider matrix, as the head's backward leaves it.
    features = x.new_empty((1, x.shape[1] // 2, x.shape[2], 3 * weight.shape[0]))[..., : 2 * weight.shape[0]]
    preactivation, needs = x.new_empty((*x.shape[:3], weight.shape[0])), (True,) * 5 + (full,)
    suffix, buffer = "" if full else " plain", torch.empty_like(x) if full else None
    yield f"forward{suffix}", lambda: token_features.token_features_forward(*given, full)
    if full:
        yield "again", lambda: token_features.token_features_activation(preactivation)
    kept = (statistics, preactivation)
    yield f"backward{suffix}", lambda: token_features.token_features_backward(features, *given, *kept, needs, buffer)


def _calls_of_the_head(
    dtype: torch.dtype, x_dtype: torch.dtype, full: bool, sizes: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The network in one dtype beside x in another; ``full``: with cube and context, and what the backward needs."""
    context = ("cube", "frame") if full else ()
    inputs, _ = _case("interpolation_head", dtype=dtype, position=full, context=context, **sizes, **CLIP)
    given = [value.to(x_dtype) if name == "x" else value for name, value in inputs.items()]
    features, x, hidden = given[0], given[3], inputs["weight1"].shape[0]
    suffix, buffer = "" if full else " plain", torch.empty_like(x) if full else None
    yield f"forward{suffix}", lambda: interpolation_head.interpolation_head_forward(*given, full)
    if full:
        first = (*given[:3], *given[4:6])
        yield "again", lambda: interpolation_head.interpolation_head_preactivation(*first)
    pairs = features.shape[:3]
    kept = (features.new_empty(pairs, dtype=_arguments.wide_dtype(x)), features.new_empty(*pairs, hidden))
    upstream = (x[:, ::2], features.new_empty(*pairs, 2))
    needs = [tensor is not None for tensor in given]
    yield (
        f"backward{suffix}",
        lambda: interpolation_head.interpolation_head_backward(*upstream, *given, *kept, needs, buffer),
    )


def _intercepted(call: Callable[[], object], arch: int, suffix: str) -> list[Launch]:
    found = []

    def record(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        arguments = dict(arguments)
        options = {name: arguments.pop(name) for name in ("num_warps", "maxnreg", "num_stages") if name in arguments}
        signature, constants, aligned = {}, {}, []
        for param in kernel.params:
            value = arguments.pop(param.name)
            if param.is_constexpr or value is None:
                signature[param.name], constants[param.name] = "constexpr", value
            elif isinstance(value, Tensor):
                names = {"float16": "fp16", "float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}
                signature[param.name] = "*" + names[str(value.dtype).removeprefix("torch.")]
                aligned += [param.name] if value.data_ptr() % 16 == 0 else []
            else:
                assert param.do_not_specialize, f"{param.name} would compile {kernel.__name__} anew for other sizes"
                signature[param.name] = param.annotation_type or "i32"
        assert not arguments, f"not the kernel's: {arguments}"
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        if name == "sum_partials":  # the same for all that has partial sums of these dtypes
            tensors = [value.removeprefix("*") for value in signature.values() if value.startswith("*")]
            name += f" {constants['TOKENS']}×{constants['CHANNELS']} {' → '.join(tensors)}"
        else:
            name += f" {suffix}" + (f" dim {constants['DIM']}" if "DIM" in constants else "")
        found.append(Launch(name, kernel, arch, signature, constants, tuple(aligned), options))

    def not_multiplied(a: Tensor, b: Tensor, *, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1]) if out is None else out

    before = _launch.run, _launch.capability, _products.product
    _launch.run, _launch.capability, _products.product = record, lambda x: arch, not_multiplied
    try:
        call()
    finally:
        _launch.run, _launch.capability, _products.product = before
    return found


def compiled(launch: Launch) -> Figures:
    """Compiles a launch and reads its figures off the cubin and the PTX."""
    places = {name: (number,) for number, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        launch.kernel,
        launch.signature,
        {places[name]: value for name, value in launch.constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    read = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout))
    if "INNER" in launch.constants and not re.search(r"\bw?g?mma\.", made.asm["ptx"]):
        raise AssertionError(f"{launch.name} for sm_{launch.arch} has no product on the tensor cores")
    accesses = [_bytes(line) for line in made.asm["ptx"].splitlines() if re.search(r"\b(ld|st)\.global\.", line)]
    return Figures(
        registers=int(read["REG"]),
        spilled=int(read["STACK"]) + int(read["LOCAL"]),
        shared=int(made.metadata.shared),
        wide=sum(size == 16 for size in accesses),
        narrow=sum(size < 16 for size in accesses),
    )


_work: list[Launch] = []  # in a worker


def _compiled_by_number(number: int) -> Figures:
    return compiled(_work[number])


def _bytes(line: str) -> int:
    """How much a line of PTX such as `ld.global.v4.b32` moves."""
    (operation,) = re.findall(r"\b(?:ld|st)\.global\.[\w.:]+", line)
    vector = re.search(r"\.v(\d)", operation)
    return int(vector.group(1) if vector else 1) * int(re.findall(r"\.[bfsu](\d+)", operation)[-1]) // 8


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, such as 70")
    parser.add_argument("--update", action="store_true", help="write what was measured into the budget")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    args = parser.parse_args()
    work = [launch for arch in args.arch for launch in launches(arch)]
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    known = budget.get(triton.__version__, {})
    mine: dict[str, dict[str, Any]] = {}
    # Processes, for Triton's front end is Python; forked ones, for a kernel can't be pickled.
    workers = concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("fork"), initializer=_work.extend, initargs=(work,)
    )
    with workers as pool:
        results = list(pool.map(_compiled_by_number, range(len(work)), chunksize=4))
    over = []
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':62} sm  {'regs':>4} {'spilled':>7} {'shared':>6} {'16 B':>5} {'narrower':>8}")
    for launch, figures in zip(work, results, strict=True):
        row = asdict(figures)
        mine.setdefault(str(launch.arch), {})[launch.name] = row
        allowed = known.get(str(launch.arch), {}).get(launch.name)
        problems = _wrong(row, launch) + (_over(row, allowed) if known and not args.update else [])
        over += [f"{launch.name} for sm_{launch.arch}: {problem}" for problem in problems]
        cells = (f"{row[name]:{width}}" for name, width in zip(row, (4, 7, 6, 5, 8), strict=True))
        print(f"{launch.name:62} {launch.arch}  {' '.join(cells)}{'  OVER' if problems else ''}")
    if args.update:
        budget.setdefault(triton.__version__, {}).update(mine)
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    if args.json:
        args.json.write_text(json.dumps(mine, indent=1, sort_keys=True) + "\n")
    if not known:
        print(f"No budget for Triton {triton.__version__}: held to no spills, an SM's registers and 16-byte accesses.")
    print("\n".join(over))
    print(f"{len(work) - len({line.split(':')[0] for line in over})} passed, {len(over)} failed")
    return 1 if over else 0


def _over(row: dict[str, int], allowed: dict[str, int] | None) -> list[str]:
    if allowed is None:
        return [f"no budget; run {Path(__file__).name} --update and look at what it wrote"]
    return [f"{name} {row[name]}, budget {allowed[name]}" for name in row if row[name] > allowed[name]]


def _wrong(row: dict[str, int], launch: Launch) -> list[str]:
    """What no budget may allow."""
    problems = ["spills"] if row["spilled"] else []
    if row["registers"] * 32 * launch.options["num_warps"] > _launch.SM_REGISTERS:
        problems.append(f"{row['registers']} registers for {launch.options['num_warps']} warps are more than an SM has")
    # Tiles of tokens: 16 bytes a thread. What is narrower are the logits and weights of single token pairs, and rows of
    # partial sums, of which a thread has one or two numbers.
    whole = "conv3d_forward" in launch.name or "token_features_activation" in launch.name
    if row["narrow"] and (whole or ("backward_x" in launch.name and "plain" in launch.name)):
        problems.append(f"{row['narrow']} accesses of less than 16 bytes")
    return problems


if __name__ == "__main__":
    sys.exit(main())
