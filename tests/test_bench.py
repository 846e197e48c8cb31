"""`python -m inti_kernels bench`: what it times and counts, when it fails, and what it must not print."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch

from inti_kernels import backends, ops
from inti_kernels.__main__ import main
from inti_kernels.cli import _stopwatch, _sweep, _timing, _towers, bench

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(bool(backends.why_not("cpu", "pair_interpolate")), reason="no kernel can run here")


class NotInstalled:
    """A finder that knows one module, and that it isn't there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name, *_):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


SMALL = ["--dim", "8", "--frames", "4", "--grid", "3x2", "--repeats", "2"]


def benchmark(tmp_path, *arguments: str, compiled: bool = False):
    path = tmp_path / f"bench-{len(list(tmp_path.iterdir()))}.json"
    status = main(["bench", *SMALL, "--json", str(path), *arguments, *([] if compiled else ["--no-compile"])])
    return status, json.loads(path.read_text())["rows"]


@needs_kernels
def test_bench_rows_carry_everything(tmp_path, capsys):
    status, rows = benchmark(tmp_path)
    assert status == 0
    assert {row["op"] for row in rows} == {*ops.OPS, "inti"}
    assert {row["mode"] for row in rows} == {"forward", "backward", "forward+backward"}
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["device"] == "cpu"
        assert (row["dim"], row["frames"], row["grid"], row["batch"], row["prefix"]) == (8, 4, [3, 2], 1, 1)
        assert row["dtype"] == "float32"
        assert row["threads"] == torch.get_num_threads()
        covered = row["contender"] != "fused" or row["op"] == "inti" or "cpu" in backends.HAS_KERNEL[row["op"]]
        assert row["status"] == ("ok" if covered else "not covered")
        assert (row["ms_50"] is not None) == covered
        if covered:
            assert 0 < row["ms_20"] <= row["ms_50"] <= row["ms_80"]
            assert row["rounds"] == 2
            if row["contender"] != "floor":
                assert row["gb_per_s"] == pytest.approx(row["least_bytes"] / row["ms_50"] / 1e6)
    assert {row["contender"] for row in rows if row["op"] == "inti"} == {"eager", "fused", "recompute", "floor"}
    assert all((row["over_floor"] is not None) == (row["op"] == "inti") for row in rows)
    out = capsys.readouterr().out
    assert "/ floor" in out
    assert "3×2" in out


def test_bench_says_what_to_do_where_the_benchmarks_are_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(bench.BENCHMARKS), *sys.meta_path])
    for name in [name for name in sys.modules if name.startswith(bench.BENCHMARKS)]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench", *SMALL]) == 1
    captured = capsys.readouterr()
    assert "pip install -e ." in captured.err
    assert "make bench" in captured.err
    assert not captured.out


@needs_kernels
def test_bench_prints_no_time_of_a_kernel_that_is_wrong(tmp_path, capsys, monkeypatch):
    right = ops.pair_interpolate
    monkeypatch.setattr(ops, "pair_interpolate", lambda x, *a, **k: (right(x, *a, **k)[0] * 1.01, right(x, *a, **k)[1]))
    status, rows = benchmark(tmp_path, "--op", "pair_interpolate")
    assert status == 1
    fused = [row for row in rows if row["contender"] == "fused"]
    assert fused
    for row in fused:
        assert row["status"] == "FAIL"
        assert "out 0" in row["note"]
        assert row["ms_50"] is row["ms_20"] is row["gb_per_s"] is row["speedup_eager"] is None
    assert "FAIL" in capsys.readouterr().out


@needs_kernels
def test_bench_of_autocast_and_of_16_bit_tensors(tmp_path):
    _, rows = benchmark(tmp_path, "--dtype", "bfloat16", "--op", "inti")
    assert all(row["autocast"] and row["status"] == "ok" for row in rows)
    _, rows = benchmark(tmp_path, "--dtype", "bfloat16", "--op", "depthwise_conv3d")
    assert not any(row["autocast"] for row in rows)
    assert all(row["status"] == "ok" for row in rows)


def test_bench_goes_on_without_torch_compile(tmp_path, monkeypatch):
    def fails(function):
        raise_later = RuntimeError("no compiler\nand a long log")

        def call(*args, **kwargs):
            raise raise_later

        return call

    monkeypatch.setattr(torch, "compile", fails)
    status, rows = benchmark(tmp_path, "--op", "pair_interpolate", compiled=True)
    assert status == 0
    compiled = [row for row in rows if row["contender"] == "compile"]
    assert {row["status"] for row in compiled} == {"not run"}
    assert all("no compiler" in row["note"] and "long log" not in row["note"] for row in compiled)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_bench_times_torch_compile(tmp_path):
    _, rows = benchmark(tmp_path, "--op", "pair_interpolate", compiled=True)
    compiled = [row for row in rows if row["contender"] == "compile"]
    assert len(compiled) == 3
    assert all(row["ms_50"] and row["compile_seconds"] > 0 and row["share_of_bound"] < 16 for row in compiled)


def test_bench_says_when_the_process_that_times_dies(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_stopwatch.sys, "executable", shutil.which("false"))
    assert main(["bench", *SMALL, "--no-compile", "--op", "pair_interpolate"]) == 1
    assert "ended with status 1" in capsys.readouterr().err


def test_a_kept_heap_reaches_the_process_that_times(tmp_path, monkeypatch):
    seen = {}

    class Spy(subprocess.Popen):
        def __init__(self, *args, env, **kwargs):
            seen.update(env)
            super().__init__(*args, env=env, **kwargs)

    monkeypatch.setattr(_stopwatch.subprocess, "Popen", Spy)
    _, rows = benchmark(tmp_path, "--op", "pair_interpolate", "--heap", "kept")
    assert seen.keys() >= _stopwatch.KEPT_HEAP.keys()
    assert {row["heap"] for row in rows} == {"kept"}


def test_bench_counts_traffic_and_times_nothing(tmp_path, capsys):
    path = tmp_path / "traffic.json"
    assert main(["bench", *SMALL, "--op", "pair_interpolate", "--traffic", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["traffic"]
    assert [row["stage"] for row in rows] == ["forward", "backward"]
    assert all(row["traffic"] >= row["through_l2"] > 0.9 and row["dim"] == 8 for row in rows)
    out = capsys.readouterr().out
    assert "through 6 MiB L2" in out
    assert " ms " not in out


@needs_kernels
@pytest.mark.slow
def test_bench_sweeps_the_module(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status, rows = benchmark(tmp_path, "--sweep", "--plot", str(tmp_path / "sweep.png"))
    assert status == 0
    forward = [row for row in rows if row["mode"] == "forward"]
    swept = [
        (row["batch"], row["frames"], row["grid"], row["tokens"]) for row in forward if row["contender"] == "fused"
    ]
    assert swept == [
        (1, 2, [3, 2], 14),
        (1, 4, [3, 2], 28),
        (1, 8, [3, 2], 56),
        (1, 4, [6, 2], 52),
        (2, 4, [3, 2], 56),
        (4, 4, [3, 2], 112),
    ]
    assert {row["contender"] for row in rows} == {"fused", "floor"}
    assert all(row["status"] == "ok" and row["ms_50"] > 0 and row["speedup_eager"] is None for row in rows)
    out = capsys.readouterr().out
    assert "ms / 1000 tokens" in out
    assert out.count("through the origin, R² ") == 4
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_through_the_origin():
    line = _sweep.fit([1, 2, 4], [3.0, 6.0, 12.0])
    assert (line.slope, line.r_squared, line.worst) == pytest.approx((3, 1, 0))
    # A quadratic, and what doesn't grow at all, are far from it.
    assert _sweep.fit([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0]).r_squared < 0.95
    assert _sweep.fit([1, 2, 4, 8], [5.0, 5.1, 4.9, 5.0]).r_squared < 0


def test_no_line_through_sizes_that_were_not_timed():
    rows = [{"mode": "forward", "contender": "fused", "tokens": n, "ms_50": n if n > 1 else None} for n in (1, 2, 3)]
    rows += [{"mode": "forward", "contender": "floor", "tokens": n, "ms_50": n} for n in (1, 2, 3)]
    assert list(_sweep.lines(rows)) == [("forward", "floor")]


@needs_kernels
@pytest.mark.slow
def test_bench_of_a_whole_model(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "model.json", tmp_path / "model.png"
    files = ["--json", str(path), "--plot", str(picture)]
    assert main(["bench", "--model", "vit_tiny", "--repeats", "2", "--dtype", "bfloat16", *files]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = [(row["mode"], row["contender"]) for row in rows]
    assert names == list(itertools.product(_towers.MODES, _towers.WAYS))
    assert {row["model"] for row in rows} == {"vit_tiny"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["status"] == "ok"
        assert row["rounds"] == 2
        assert row["ms_20"] <= row["ms_50"] <= row["ms_80"]
        naive = next(r for r in rows if (r["mode"], r["contender"]) == (row["mode"], "Naive"))
        assert row["over_naive"] == pytest.approx(row["ms_50"] / naive["ms_50"])
        assert row["executed"] == ("cpu" if row["contender"] in _towers.OURS else "torch")
        # At the least what is kept of the 16 frames' 17 tokens of 32 channels, in bfloat16.
        assert row["peak_bytes"] > 16 * 17 * 32 * 2
        assert bool(row["setting"]) == (row["contender"] in ("ToMe", "STA"))
    # Half the frames are left after block 1 of 4, a quarter after block 2; the patches' embedding is of all frames.
    macs = {row["contender"]: row["macs"] for row in rows}
    assert macs["mean"] == macs["LinearPooling"] < macs["InTI"] == macs["FusedInTI"] < macs["Naive"]
    assert all(0.9 * macs["InTI"] < macs[way] <= macs["InTI"] for way in ("ToMe", "STA"))
    assert all(row["over_budget"] == row["macs"] / macs["InTI"] for row in rows)
    block, embedding = 17 * 12 * 32**2 + 2 * 17**2 * 32, 16 * 3 * 16**2 * 32
    expected = (embedding + (1 + 1 / 2 + 2 / 4) * block) / (embedding + 4 * block)
    assert macs["mean"] / macs["Naive"] == pytest.approx(expected, abs=0.005)
    captured = capsys.readouterr()
    assert "÷ Naive" in captured.out
    assert "GMAC ÷ InTI" in captured.out
    assert "The matrix products of this run take" in captured.err


@needs_kernels
def test_bench_times_no_model_with_a_kernel_that_is_wrong(tmp_path, capsys, monkeypatch):
    right = ops.inti
    monkeypatch.setattr(ops, "inti", lambda *args, **kwargs: tuple(1.01 * out for out in right(*args, **kwargs)))
    path = tmp_path / "model.json"
    assert main(["bench", "--model", "vit_tiny", "--repeats", "1", "--json", str(path)]) == 1
    for row in json.loads(path.read_text())["rows"]:
        assert (row["ms_50"] is None) == (row["status"] == "FAIL") == (row["contender"] in _towers.OURS)
    assert "out 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "model", "--dim", "8", "--batch", "2"], "leave out --dim, --batch"),
        (["--model", "vit_tiny", "--op", "inti"], "--model is the tower of --op model, got --op inti"),
        (["--op", "token_features", "--sweep"], "--sweep is of the module"),
        (["--op", "model", "--traffic"], "--traffic counts at one size"),
        (["--sweep", "--traffic"], "--traffic counts at one size"),
    ],
    ids=str,
)
def test_bench_says_what_does_not_go_together(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_bench_never_overwrites(tmp_path, capsys, option):
    path = tmp_path / "there.png"
    path.write_text("precious")
    assert main(["bench", *SMALL, option, str(path)]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert main(["bench", *SMALL, option, str(tmp_path / "nowhere" / "file")]) == 1
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "3"], "--frames must be even"),
        (["--dim", "7"], "--dim must be even"),
        (["--prefix", "-1"], "prefix"),
    ],
    ids=str,
)
def test_bench_checks_its_sizes(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@needs_kernels
def test_bench_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    benchmark(tmp_path, "--op", "inti", "--plot", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_least_multiply_accumulates_by_counting():
    from inti_kernels.benchmarks import Sizes, depthwise_conv3d, inti

    sizes = Sizes(dim=4, frames=6, grid=(3, 5), batch=2, prefix=1)
    inside = 0
    for t, h, w in itertools.product(range(0, 6, 2), range(3), range(5)):
        for dt, dh, dw in itertools.product((-1, 0, 1), repeat=3):
            inside += 0 <= t + dt < 6 and 0 <= h + dh < 3 and 0 <= w + dw < 5
    assert depthwise_conv3d.forward_macs(sizes) == 2 * 4 * inside
    # PAPER.md: the token-wise linears cost 3·C² a token pair, and the rest of InTI little beside them.
    big = Sizes()
    assert 1 < inti.forward_macs(big) / (3 * big.dim**2 * big.pairs) < 1.03


def test_the_floor_is_the_products_of_the_design():
    from inti_kernels.benchmarks import Sizes
    from inti_kernels.benchmarks.floor import Floor

    sizes = Sizes(dim=4, frames=2, grid=(2, 2), batch=3)
    floor = Floor(sizes, torch.float32, torch.device("cpu"))
    assert [tuple(t.shape) for t in floor.forward()] == [(30, 2), (15, 4)]
    assert [tuple(t.shape) for t in floor.backward()] == [(30, 4), (2, 4), (15, 8), (4, 8)]


def test_contenders_take_turns():
    order = []

    def contender(name):
        return _timing.Contender(lambda: order.append(name), lambda _: None)

    seconds = _timing.interleave({n: contender(n) for n in "abc"}, 4, torch.device("cpu"), lambda _: None)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab"] * 2 + ["abc"]
    assert {name: len(steps) for name, steps in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    modes = _timing.by_mode([_timing.Step(1.0, 2.0, 0), _timing.Step(3.0, 4.0, 5)])
    assert modes == {"forward": [1.0, 3.0], "backward": [2.0, 4.0], "forward+backward": [3.0, 7.0]}


def test_quantiles():
    assert _timing.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert _timing.quantiles([float(n) for n in range(11)]) == pytest.approx((2, 5, 8))


def test_kept_for_backward_counts_storages_once_and_no_leaves():
    x = torch.randn(100, requires_grad=True)
    y = torch.randn(100, requires_grad=True)

    def forward():
        product = x * y  # keeps x and y, which were there before
        return product.exp() * product  # keeps exp's result, twice, and the product

    assert _stopwatch._kept_bytes(_timing.Contender(forward, lambda _: None), [x, y]) == 2 * 400
