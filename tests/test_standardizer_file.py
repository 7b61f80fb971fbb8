"""Standardizers that travel: state dicts, pickles and files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_standardize import KINDS, rows
from torch import Tensor

from radio import RadioError
from radio.targets.standardize import (
    PhiS,
    Standardizer,
    load_standardizers,
    make_standardizer,
    read_metadata,
    save_standardizers,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fitted", [False, True])
def test_a_state_round_trip_keeps_everything(kind: str, fitted: bool) -> None:
    original = make_standardizer(kind, 6, "sam").partial_fit(rows(40, 6))
    if fitted:
        original.fit()
    copy = make_standardizer(kind, 6, "sam").load_state_dict(original.state_dict())
    again = pickle.loads(pickle.dumps(original))
    for other in (copy, again):
        assert other.is_fitted == original.is_fitted
        assert other.state_dict().keys() == original.state_dict().keys()
        for key, value in original.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
    more = rows(30, 6, seed=9)
    x = rows(3, 6)
    expected = original.partial_fit(more).fit().transform(x)
    assert torch.equal(copy.partial_fit(more).fit().transform(x), expected)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("matrix"),
        lambda state: state.pop("count"),
        lambda state: state.update(mean=torch.zeros(5)),
        lambda state: state.update(bias=torch.zeros(6)),
    ],
)
def test_a_state_that_does_not_fit_is_refused(spoil: Callable[[dict[str, Tensor]], None]) -> None:
    state = PhiS(6).partial_fit(rows(40, 6)).fit().state_dict()
    del state["scatter"], state["sample_mean"]
    spoil(state)
    with pytest.raises(RadioError, match="does not fit the standardizer of teacher 'sam'"):
        PhiS(6, "sam").load_state_dict(state)


def fitted_set() -> dict[str, Standardizer]:
    widths = {kind: 6 + number for number, kind in enumerate(KINDS)}
    return {
        f"teacher_{kind}": make_standardizer(kind, c, f"teacher_{kind}")
        .partial_fit(rows(40, c))
        .fit()
        for kind, c in widths.items()
    }


def test_a_file_brings_back_the_same_maps(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    originals = fitted_set()
    metadata = {"teacher": "abc", "kinds": "any key is free"}
    save_standardizers(path, originals, metadata)
    loaded = load_standardizers(path)
    assert list(loaded) == sorted(originals)
    assert read_metadata(path) == metadata
    for name, original in originals.items():
        found = loaded[name]
        assert (found.kind, found.name, found.count) == (original.kind, name, original.count)
        x = rows(5, original.num_channels).float()
        assert torch.equal(found.transform(x), original.transform(x))
        assert all(map(torch.equal, found.as_linear(), original.as_linear()))


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    metadata = {key: key * 3 for key in "zyxwvutabc"}
    save_standardizers(tmp_path / "one", fitted_set(), metadata)
    shuffled = dict(reversed(fitted_set().items()))
    save_standardizers(tmp_path / "two", shuffled, dict(reversed(metadata.items())))
    save_standardizers(tmp_path / "three", load_standardizers(tmp_path / "one"), metadata)
    contents = {(tmp_path / name).read_bytes() for name in ("one", "two", "three")}
    assert len(contents) == 1


def test_one_standardizer_may_serve_two_teachers(tmp_path: Path) -> None:
    shared = PhiS(4).partial_fit(rows(9, 4)).fit()
    save_standardizers(tmp_path / "s", {"a": shared, "b": shared}, {})
    assert torch.equal(
        load_standardizers(tmp_path / "s")["b"].matrix,
        load_standardizers(tmp_path / "s")["a"].matrix,
    )


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_standardizers(path, {"sam": PhiS(4).partial_fit(rows(9, 4)).fit()}, {})
    loaded = load_standardizers(path)["sam"]
    before = loaded.matrix.clone()
    with path.open("r+b") as file:
        file.seek(-8 * 36, 2)
        file.write(bytes(8 * 36))
    assert torch.equal(loaded.matrix, before)


def test_a_file_has_no_statistics_to_add_to(tmp_path: Path) -> None:
    save_standardizers(tmp_path / "s", {"sam": PhiS(4).partial_fit(rows(9, 4)).fit()}, {})
    loaded = load_standardizers(tmp_path / "s")["sam"]
    for use in (
        lambda: loaded.partial_fit(rows(9, 4)),
        lambda: loaded.fit(),
        lambda: PhiS(4).merge(loaded),
    ):
        with pytest.raises(RadioError, match="'sam' came from a file"):
            use()


@pytest.mark.parametrize("read", [load_standardizers, read_metadata])
@pytest.mark.parametrize("kept", [0, 4, 200, -8])
def test_a_cut_file_is_named_with_the_way_out(
    read: Callable[[Path], object], kept: int, tmp_path: Path
) -> None:
    path = tmp_path / "sam.safetensors"
    save_standardizers(path, {"sam": PhiS(4).partial_fit(rows(9, 4)).fit()}, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RadioError, match=r"sam\.safetensors.*run: radio fit"):
        read(path)


@pytest.mark.parametrize("read", [load_standardizers, read_metadata])
def test_missing_and_foreign_files_are_named(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(RadioError, match=r"no standardizer file .*gone.*run: radio fit"):
        read(tmp_path / "gone")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model", metadata={"format": "pt"})
    with pytest.raises(RadioError, match=r"model holds something else .*radio fit"):
        read(tmp_path / "model")
    (tmp_path / "text").write_text("hello, this is no tensor file at all")
    with pytest.raises(RadioError, match=r"text is not a whole standardizer file.*radio fit"):
        read(tmp_path / "text")
    with pytest.raises(RadioError, match="radio fit"):
        read(tmp_path)
