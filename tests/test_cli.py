"""The command line, `info` and `check`: what they say, when they fail, and what they must not print."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from inti_kernels import backends, ops
from inti_kernels.__main__ import COMMANDS, main
from inti_kernels.cli import _environment, _tables, check


def run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: `python -m inti_kernels …`, or ``code``."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "inti_kernels")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=280)


pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(bool(backends.why_not("cpu", "pair_interpolate")), reason="no kernel can run here")


# The command line itself


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["info", "--loudly"], ["bench", "--grid", "14"], ["cost", "--after", "5 7"]], ids=str
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m inti_kernels" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


# info


def test_info_is_json_that_says_everything(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["environment"]) == set(_environment.VARIABLES)
    assert facts["devices"][0]["device"] == "cpu"
    states = facts["backends"]["cpu"]
    assert set(states["backends"]) == set(backends.BACKENDS)
    assert set(states["ops"]) == set(ops.OPS)
    assert states["ops"]["token_features"]["cpu"] == []
    assert facts["plain_pytorch"]


def test_info_runs_without_any_optional_package_or_command():
    """And imports no other command, whose packages may be missing too."""
    code = (
        "import sys\n"
        "sys.modules.update({name: None for name in ('rich', 'tqdm', 'matplotlib', 'av', 'transformers')})\n"
        "from inti_kernels.__main__ import main\n"
        "status = main(['info'])\n"
        "assert not [m for m in sys.modules if m.startswith('inti_kernels.cli.') and m.endswith(('demo', 'bench'))]\n"
        "sys.exit(status)"
    )
    result = run(code=code)
    assert result.returncode == 0, result.stderr
    for word in ("torch", "pair_interpolate", "INTI_BACKEND", "reference", "frame level"):
        assert word in result.stdout


def test_info_says_why_the_compiled_module_is_missing():
    result = run("info", INTI_NATIVE_LIBRARY="/nowhere/_native.so")
    assert result.returncode == 0, result.stderr
    assert "INTI_NATIVE_LIBRARY" in result.stdout
    assert "/nowhere/_native.so" in result.stdout.replace("\n", "")


def test_info_shows_a_bad_backend_and_everything_else():
    sentence = "INTI_BACKEND must be one of ('auto', 'reference', 'cpu', 'triton', 'cuda'), got 'fastest'"
    result = run("info", "--json", INTI_BACKEND="fastest")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert sentence in facts["active_backend"]
    assert facts["environment"]["INTI_BACKEND"] == "fastest"
    assert facts["backends"]["cpu"]["backends"]["reference"] == []
    result = run("info", INTI_BACKEND="fastest")
    assert result.returncode == 0, result.stderr
    assert "got 'fastest'" in result.stdout
    assert "Environment variables" in result.stdout


@needs_kernels
def test_info_shows_a_bad_instruction_set_as_the_reason():
    result = run("info", "--json", INTI_CPU="abacus")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert "abacus" in facts["cpu"]["instruction_set"]
    assert "abacus" in " ".join(facts["backends"]["cpu"]["backends"]["cpu"])
    assert "abacus" in " ".join(facts["backends"]["cpu"]["ops"]["pair_interpolate"]["cpu"])


# check


@pytest.fixture
def small_check(monkeypatch):
    """One dtype, one ablation, few options: the rows are the same, only fewer."""
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(check, "ABLATIONS", ({},))
    monkeypatch.setattr(check, "PREFIXES", (1,))
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    monkeypatch.setattr(check, "AUTOCASTS", ())
    monkeypatch.setattr(check, "SIZES", {"dim": 20, "frames": 4, "grid": (3, 3), "batch": 2})


def checked(capsys, *arguments: str):
    status = main(["check", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


@needs_kernels
def test_check_passes_and_says_which_backend_executed(small_check, capsys):
    status, report = checked(capsys)
    assert status == 0
    assert not report["counts"].get("FAIL")
    by_what = {}
    for row in report["rows"]:
        by_what.setdefault(row["what"], []).append(row)
    assert set(by_what) == {*ops.OPS, "FusedInTI"}
    for op in ops.OPS:
        *rows, triton, cuda = by_what[op]
        assert (triton["case"], triton["status"]) == ("backend triton", "not run")
        assert (cuda["case"], cuda["status"]) == ("backend cuda", "not run")
        for row in rows:
            covered = "cpu" in backends.HAS_KERNEL[op]
            assert row["status"] == ("pass" if covered else "not covered")
            if covered:
                assert row["backend"] == "cpu"
    assert {row["case"] for row in by_what["pair_interpolate"]} >= {"gradcheck", "no position"}
    assert all(
        row["comparisons"] for row in report["rows"] if row["status"] != "not run" and row["case"] != "gradcheck"
    )
    assert {comparison["name"] for comparison in by_what["FusedInTI"][0]["comparisons"]} >= {
        "out 0",
        "grad cube.weight",
    }
    assert report["environment"]["torch"] == torch.__version__


@needs_kernels
def test_check_prints_a_table(small_check, capsys):
    assert main(["check", "--backend", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "pair_interpolate" in out
    assert "not covered" in out
    assert " 0 FAIL" in out


@needs_kernels
@pytest.mark.parametrize("fault", ["wrong gradient", "raises"])
def test_check_fails_for_a_broken_kernel(small_check, capsys, monkeypatch, fault):
    right = ops.pair_interpolate

    def broken(x, *args, **kwargs):
        if fault == "raises":
            raise ZeroDivisionError("planted")
        # The value is right, the gradient of x is 1.05 times what it should be.
        return right(1.05 * x - 0.05 * x.detach(), *args, **kwargs)

    monkeypatch.setattr(ops, "pair_interpolate", broken)
    status, report = checked(capsys)
    assert status == 1
    failed = [row for row in report["rows"] if row["status"] == "FAIL"]
    assert {row["what"] for row in failed} >= {"pair_interpolate"}
    assert all(("planted" if fault == "raises" else "grad x") in row["note"] for row in failed if row["comparisons"])
    assert "gradcheck" in {row["case"] for row in failed}


def test_check_of_the_reference_is_never_a_pass(small_check, capsys):
    status, report = checked(capsys, "--backend", "reference")
    assert status == 1
    assert {row["status"] for row in report["rows"]} == {"not covered"}


def test_check_says_why_a_backend_or_device_cannot_run(capsys):
    result = run("check", "--backend", "cpu", INTI_NATIVE_LIBRARY="/nowhere/_native.so")
    assert result.returncode == 1
    assert "backend 'cpu' can't run on cpu" in result.stderr
    assert "/nowhere/_native.so" in result.stderr
    assert main(["check", "--device", "toaster"]) == 1
    assert "must be cpu, cuda or cuda:N" in capsys.readouterr().err


def test_check_without_any_kernel_has_rows_that_say_so():
    result = run("check", "--json", INTI_NATIVE_LIBRARY="/nowhere/_native.so")
    assert result.returncode == 1
    rows = json.loads(result.stdout)["rows"]
    assert {row["status"] for row in rows} == {"not run"}
    assert {row["case"] for row in rows} == {"backend cpu", "backend triton", "backend cuda"}
    assert all(("/nowhere/_native.so" in row["note"]) == (row["case"] == "backend cpu") for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_gpu_that_is_not_there_is_an_error(command, capsys):
    assert main([command, "--device", "cuda"]) == 1
    captured = capsys.readouterr()
    assert "finds no CUDA device" in captured.err
    assert not captured.out


# What they print with


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    _tables.print_table("Title", ("name", "figure"), [("a", "1"), ("long name", "22")], right=("figure",))
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "  name       figure",
        "  ---------  ------",
        "  a               1",
        "  long name      22",
    ]
    _tables.print_table("Pairs", (), [("a", "b")])
    assert capsys.readouterr().out == "Pairs\n  a  b\n"


def test_byte_counts_for_people():
    figures = [_tables.kibibytes(count) for count in (None, 0, 1023, 1536, 5 << 20, 3 << 30)]
    assert figures == ["", "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB"]
