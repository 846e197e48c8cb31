"""`make test-full`: everything that is too long for `make test`, and its result written to tests/FULL_RESULTS.md.

It takes hours. `make test-full STEPS="sanitize mutants-gemm"` runs only these, and leaves the others' results as they
are: each says which revision it is of. What has run is written at once.

One wheel is built in an environment without torch and checked beside each torch of TORCHES, in fresh environments.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "full"
RESULTS = ROOT / "tests" / "FULL_RESULTS.md"
# The newest, and what a V100 user has.
TORCHES = ("2.14.1", "2.7.1")
# Lines of a log that say how it went: the counts of pytest, check and the mutants, and the coverage.
TELLING = re.compile(r"\b\d+ pass(ed)?\b|\b\d+ fail(ed)?\b|^TOTAL", re.IGNORECASE)


@dataclass
class Step:
    name: str
    ok: bool
    seconds: float
    summary: str


def run(name: str, command: list[str], *, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Step:
    """Run one command, show and keep its output, and sum it up."""
    print(f"\n==== {name}: {' '.join(command)}", flush=True)
    log = WORK / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.log"
    start, telling = time.monotonic(), []
    with log.open("w") as file:
        environment = {**os.environ, **(env or {})}
        with subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                if TELLING.search(line):
                    telling.append(line.strip(" =\n"))
    return Step(name, process.returncode == 0, time.monotonic() - start, "; ".join(telling[-3:]).replace("|", "/"))


def environment(name: str, *packages: str) -> Path:
    """A fresh virtual environment with these packages; returns its python."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    if packages:
        subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", *packages], check=True)
    return python


def wheel_steps() -> list[Step]:
    """Build the wheel with build isolation and no torch, then check it beside every torch."""
    wheels = WORK / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    builder = environment("builder")
    build = [str(builder), "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(wheels)]
    steps = [run("wheel without torch", build, env={"INTI_NATIVE": "require"})]
    if not steps[0].ok:
        return steps
    (wheel,) = wheels.glob("*.whl")
    steps[0].summary = wheel.name
    for version in TORCHES:
        python = environment(f"torch-{version}", f"torch=={version}", str(wheel))
        check = [str(python), "-m", "inti_kernels", "check", "--backend", "cpu"]
        # From another folder than the sources, or they would be imported in the wheel's place.
        steps.append(run(f"wheel beside torch {version}", check, cwd=WORK))
        shutil.rmtree(WORK / f"torch-{version}")
    return steps


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def revision() -> str:
    """Of what is in the working tree; "-dirty" with changes that aren't committed, but for the results themselves."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", ".", f":!{RESULTS.relative_to(ROOT)}").returncode
    return (git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown") + ("-dirty" if changed else "")


def write(steps: list[Step], of: str) -> None:
    """Put the results of a revision in their rows of the table. The rows of other steps stay; what is no step goes."""
    head = ["| step | result | revision | day | processor | seconds | summary |", "| --- |" + " --- |" * 6]
    old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = {line.split("|")[1].strip(): line for line in old[old.index(head[1]) + 1 :]} if head[1] in old else {}
    for s in steps:
        result = "passed" if s.ok else "FAILED"
        told = (s.name, result, of, str(datetime.date.today()), processor(), f"{s.seconds:.0f}", s.summary)
        rows[s.name] = "| " + " | ".join(told) + " |"
    known = [row for name in STEPS for row in sorted(rows) if row == name or row.startswith(f"{name} ")]
    RESULTS.write_text("\n".join(["# The last `make test-full`", "", *head, *(rows[name] for name in known), ""]))


def make(name: str, target: str, *variables: str) -> list[Step]:
    """A target of the Makefile."""
    return [run(name, ["make", "--no-print-directory", target, *variables])]


_TARGETS = ("test", "test-slow", "triton-check", "cuda-model", "sanitize", "test-triton-versions", "test-nvcc")
STEPS: dict[str, Callable[[], list[Step]]] = {target: partial(make, target, target) for target in _TARGETS}
for _suite in sorted(MUTANTS):
    _name = f"mutants-{_suite.replace(' ', '-')}"
    STEPS[_name] = partial(make, _name, "test-mutants", f"SUITE={_suite}")
STEPS["wheel"] = wheel_steps


def main() -> int:
    """Run the steps, also after one has failed; exit status 1 if any did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"default: all, in this order: {', '.join(STEPS)}")
    wanted = parser.parse_args().steps or list(STEPS)
    if unknown := [name for name in wanted if name not in STEPS]:
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(STEPS)}")
    WORK.mkdir(parents=True, exist_ok=True)
    ok = True
    for name in wanted:
        of = revision()
        done = STEPS[name]()
        write(done, of)
        ok = ok and all(step.ok for step in done)
    print("\n" + RESULTS.read_text())
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
