"""Compiled students and teachers compute what plain ones do, and compile no more than they may."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_distill import losses_of
from tiny import tiny_config

from radio.errors import RadioError
from radio.training.compile import MOST_SHAPES, shapes_of
from radio.training.distill import distill


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path: Path) -> None:
    """Low bits differ, since kernels are fused; the run is the same."""
    config = tiny_config(tmp_path, steps=3)
    config.stages[0].partitions["high"].merge_per_block = 0
    config.stages[0].partitions["low"].image_sizes = [32, 48]
    config.stages[0].partitions["low"].views = {"words": "native", "parts": "match"}
    plain = losses_of(distill(config).out)
    config.out = str(tmp_path / "compiled")
    config.student.compile = config.teachers["words"].compile = True
    for here, there in zip(plain, losses_of(distill(config).out), strict=True):
        assert there == pytest.approx(here, rel=1e-3)


def test_shapes_are_counted_and_bounded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert shapes_of(config) == {(5, 32, 32), (2, 64, 64)}
    config.stages[0].partitions["high"].aspects = [0.5, 1.0, 2.0]
    assert len(shapes_of(config)) == 4
    config.stages[0].partitions["high"].aspects = []
    config.stages[0].partitions["low"].image_size = 64
    config.stages[0].partitions["low"].views = {"words": "native", "parts": "match"}
    config.stages[0].partitions["low"].image_sizes = [16 * n for n in range(1, MOST_SHAPES + 2)]
    config.student.compile = True
    with pytest.raises(RadioError, match=r"student\.compile=true with 18 shapes.*image_sizes"):
        distill(config)
