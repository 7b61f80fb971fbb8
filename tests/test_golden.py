from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import GOLDEN, tiny_losses


def test_twenty_losses_are_the_golden_ones(tmp_path: Path) -> None:
    """Bit-equality is a machine's own; another CPU agrees to about 1e-3 after 20 steps."""
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 20
    for step, (now, then) in enumerate(zip(tiny_losses(tmp_path), golden, strict=True)):
        assert now == pytest.approx(then, rel=1e-3), f"step {step}"
