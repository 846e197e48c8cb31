"""The README is true today: its example runs, and it names what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import inti_kernels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def run(example: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_examples_run() -> None:
    of_module, of_tower = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    first, second = run(of_module)
    assert first == "['1']"
    assert second.startswith("torch.Size([2, 4, 17, 2])")
    assert float(re.search(r"tensor\(([\d.]+)", second).group(1)) > 0
    assert run(of_tower) == ["torch.Size([1, 400])"]


def test_every_exported_name_is_documented() -> None:
    public = [getattr(inti_kernels, name) for name in inti_kernels.__all__ if not name.startswith("__")]
    for module in (inti_kernels.ops, inti_kernels.reference):
        public += [getattr(module, name) for name in module.__all__ if name != "OPS"]
    for thing in public:
        assert thing.__doc__, thing
        assert len(thing.__doc__) > 60, thing


def test_the_commands_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    usage = subprocess.run([sys.executable, "-m", "inti_kernels", "--help"], capture_output=True, text=True, cwd=ROOT)
    for command in re.findall(r"`python -m inti_kernels ([a-z]+)`", README):
        assert command in usage.stdout
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", re.sub(r"```.*?```", "", README, flags=re.DOTALL)):
        assert (ROOT / path).exists(), path
