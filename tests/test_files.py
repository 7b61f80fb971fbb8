from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from radio.files import save_tensors, sha256_of, whole, write_whole


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "old")
    with whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_tensors_are_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
        with whole(tmp_path / "b.safetensors") as temporary:
            save_tensors({"a": torch.ones(2)}, temporary, {"format": "pt"})
    finally:
        os.umask(before)
    for name in ("a", "b"):
        assert (tmp_path / f"{name}.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert sha256_of(tmp_path / "a.safetensors") == sha256_of(tmp_path / "b.safetensors")
