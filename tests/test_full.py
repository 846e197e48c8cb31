"""The table of `make test-full`, of which a run may do only some steps."""

from __future__ import annotations

from pathlib import Path

import full
import pytest


def test_a_step_takes_the_place_of_its_last_result_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "RESULTS", tmp_path / "RESULTS.md")
    full.write(
        [full.Step("wheel beside torch 1", True, 1.0, "all"), full.Step("wheel without torch", True, 2.0, "")], "a"
    )
    full.write([full.Step("sanitize", False, 3.4, "1 failed"), full.Step("gone", True, 1.0, "")], "b")
    full.write([full.Step("sanitize", True, 5.0, "2 passed")], "c")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in full.RESULTS.read_text().splitlines()
        if "|" in line
    ]
    assert [row[:3] for row in rows[2:]] == [
        ["sanitize", "passed", "c"],
        ["wheel beside torch 1", "passed", "a"],
        ["wheel without torch", "passed", "a"],
    ]
    assert {len(row) for row in rows} == {7}
    assert rows[2][5:] == ["5", "2 passed"]
