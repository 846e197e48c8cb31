"""`make test-full`: everything that is too long for `make test`, and its result written to tests/FULL_RESULTS.md.

One wheel is built in an environment without torch and checked beside each torch of TORCHES, in fresh environments.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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


def write(steps: list[Step]) -> None:
    """Write the table of results."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# The last `make test-full`",
        "",
        f"{datetime.date.today()}, on revision {revision or 'unknown'}: {processor()}, {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}.",
        "",
        "| step | result | seconds | summary |",
        "| --- | --- | --- | --- |",
        *(f"| {s.name} | {'passed' if s.ok else 'FAILED'} | {s.seconds:.0f} | {s.summary} |" for s in steps),
        "",
    ]
    RESULTS.write_text("\n".join(lines))
    print("\n" + "\n".join(lines))


def main() -> int:
    """Run every step, also after one has failed; exit status 1 if any did."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not RESULTS.exists():  # README.md links to it, which `make test` checks
        RESULTS.write_text("# The last `make test-full`\n\nThe first run is under way.\n")
    targets = ("test", "test-slow", "triton-check", "cuda-model", "sanitize", "test-mutants", "test-triton-versions")
    targets += ("test-nvcc",)
    steps = [run(target, ["make", "--no-print-directory", target]) for target in targets]
    steps += wheel_steps()
    write(steps)
    return 0 if all(step.ok for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
