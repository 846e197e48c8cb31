"""The list of planted faults goes with the sources: `make test-mutants` is too slow to find out."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest


@pytest.mark.parametrize("suite", mutants.MUTANTS)
def test_every_fault_has_its_place(suite: str) -> None:
    for mutant in mutants.MUTANTS[suite]:
        text = Path(mutants.ROOT, mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.why}: {mutant.old!r}"
        assert mutant.old != mutant.new
