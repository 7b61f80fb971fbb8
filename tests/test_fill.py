"""`radio fit cache=`: what it keeps is all that a run asks for."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from test_cache import cached_config, never
from test_distill import losses_of, rows_of
from test_stages import two_stages

from radio.config import Config
from radio.progress import ProgressDisplay
from radio.targets.cache import CachedStream
from radio.targets.stream import LocalStream
from radio.training.distill import distill
from radio.training.fill import fit_and_fill


def staged(root: Path) -> Config:
    """Return a run of two stages, the second with a refit, whose views come again."""
    config = two_stages(root)
    config.data.repeat_epochs = 1
    config.cache = str(root / "cache")
    return config


@pytest.mark.parametrize("make", [cached_config, staged])
def test_a_run_from_a_filled_cache_starts_no_teacher(make: object, tmp_path: Path) -> None:
    config: Config = make(tmp_path)  # type: ignore[operator]
    live = distill(replace(config, cache=None, out=str(tmp_path / "live"))).out
    with (
        closing(CachedStream(config, lambda: LocalStream(config))) as stream,
        ProgressDisplay() as progress,
    ):
        files = fit_and_fill(config, stream, progress)
        assert set(files) == set(config.teachers)
    with closing(CachedStream(config, never)) as stream:
        distill(config, stream)
        assert stream.misses == 0
    assert losses_of(config.out) == losses_of(live)
    assert rows_of(config.out) == rows_of(live)
