"""Pictures to parquet: one row each, in order, and nothing of the user's destroyed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_zoo import (
    animation,
    colours,
    cut_in_half,
    huge_png,
    jpeg,
    png,
    saved,
    sixteen_bit,
    with_orientation,
    write_tar,
)
from PIL import Image
from safetensors.numpy import load_file
from small_encoder import small_weights

from radio.encoder.encoder import Encoder
from radio.errors import RadioError
from radio.extraction.encode import EncodeResult, encode
from radio.extraction.plan import plan_rows

ZOO: dict[str, bytes] = {
    "a-jpeg.jpg": jpeg(1, 48, 64),
    "b-cut.jpg": cut_in_half(jpeg(2, 300, 200)),
    "c-small.png": saved(Image.new("RGB", (1, 1), "blue")),
    "d-empty.png": b"",
    "e-wide.png": png(3, 90, 40),
    "f-deep.png": sixteen_bit(np.arange(64 * 48).reshape(64, 48) * 20),
    "g-text.jpg": b"this is no picture",
    "h-turned.png": with_orientation(colours(64, 48, 4), 6),
    "i-cmyk.jpg": saved(colours(48, 64, 5).convert("CMYK"), "JPEG"),
    "j-huge.png": huge_png(),
    "k-again.jpg": jpeg(1, 48, 64),
    "l-moving.gif": animation(),
    "m-wide.png": png(6, 90, 40),
}
FAILED = {"b-cut", "d-empty", "g-text", "j-huge"}
FEATURES = ("summary", "words:summary", "features", "edges:features")
OK = sorted(set(name.rsplit(".", 1)[0] for name in ZOO) - FAILED)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(small_weights())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "zoo"
    write_files(folder, ZOO)
    return folder


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class Extraction:
    """An output folder, read back by pyarrow and safetensors alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.plan = pq.read_table(folder / "plan.parquet")
        self.shards = sorted((folder / "data").glob("*.parquet"))
        self.table = pa.concat_tables([pq.read_table(path) for path in self.shards])

    def column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()

    def patches(self, feature: str) -> list[np.ndarray]:
        """Return every row's tokens, failed rows' as an empty array."""
        found = []
        for path in self.shards:
            tensors = load_file(path.with_suffix("").with_suffix(".patches.safetensors"))
            ends = tensors["offsets"]
            assert ends[0] == 0 and ends[-1] == len(tensors[feature])
            assert len(ends) == pq.read_metadata(path).num_rows + 1
            found += [tensors[feature][a:b] for a, b in pairwise(ends)]
        return found

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.folder / "data").iterdir())}


def extract(sources: Any, out: Path, encoder: Encoder, **options: Any) -> Extraction:
    result = encode(sources, out, encoder, **options)
    found = Extraction(out)
    assert result.rows == found.table.num_rows == found.plan.num_rows == found.manifest["rows"]
    assert result.ok == found.column("status").count("ok")
    assert result.failed == found.column("status").count("failed") == result.rows - result.ok
    assert result.shards == len(found.shards)
    return found


@pytest.fixture(scope="module")
def whole(zoo: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    out = tmp_path_factory.mktemp("out") / "whole"
    return extract(str(zoo), out, encoder, features=FEATURES, batch=3)


# rows


def test_every_planned_picture_has_its_row_in_order(whole: Extraction, zoo: Path) -> None:
    keys = [name.rsplit(".", 1)[0] for name in sorted(ZOO)]
    assert whole.column("row") == list(range(13)) and whole.column("key") == keys
    assert whole.table.select(["row", "key", "uri"]).equals(whole.plan)
    assert whole.column("uri") == [str(zoo / name) for name in sorted(ZOO)]
    for uri, digest in zip(whole.column("uri"), whole.column("sha256"), strict=True):
        assert hashlib.sha256(Path(uri).read_bytes()).hexdigest() == digest


def test_failed_rows_say_why_and_hold_nothing(whole: Extraction) -> None:
    rows = {row["key"]: row for row in whole.table.to_pylist()}
    assert {key for key, row in rows.items() if row["status"] == "failed"} == FAILED
    reasons = {
        "b-cut": "cannot decode",
        "d-empty": "the file is empty",
        "g-text": "18 bytes are no picture",
        "j-huge": "decompression bomb",
    }
    for key, row in rows.items():
        failed = key in FAILED
        assert (row["error"] is not None) is failed
        assert (row["summary"] is None) is failed and (row["words:summary"] is None) is failed
        assert not failed or reasons[key] in row["error"]
        size = (row["H"], row["W"], row["grid_h"], row["grid_w"])
        assert (size == (0, 0, 0, 0)) is failed
    tokens = dict(zip(whole.column("key"), whole.patches("features"), strict=True))
    assert {key for key, value in tokens.items() if len(value) == 0} == FAILED


def test_sizes_are_upright_pixels_and_grids_the_nearest(whole: Extraction) -> None:
    rows = {row["key"]: row for row in whole.table.to_pylist()}
    sizes = {key: tuple(rows[key][n] for n in ("H", "W", "grid_h", "grid_w")) for key in OK}
    assert sizes == {
        "a-jpeg": (64, 48, 4, 3),
        "c-small": (1, 1, 1, 1),
        "e-wide": (40, 90, 2, 6),
        "f-deep": (64, 48, 4, 3),
        "h-turned": (64, 48, 4, 3),
        "i-cmyk": (64, 48, 4, 3),
        "k-again": (64, 48, 4, 3),
        "l-moving": (5, 6, 1, 1),
        "m-wide": (40, 90, 2, 6),
    }


def test_columns_are_half_precision_of_a_fixed_width(whole: Extraction) -> None:
    schema = whole.table.schema
    assert schema.field("summary").type == pa.list_(pa.float16(), 192)
    assert schema.field("words:summary").type == pa.list_(pa.float16(), 12)
    assert schema.names == [
        "row", "key", "uri", "sha256", "H", "W", "grid_h", "grid_w", "status", "error",
        "summary", "words:summary",
    ]  # fmt: skip


def test_every_row_is_that_picture_alone(whole: Extraction, zoo: Path, encoder: Encoder) -> None:
    """Neither neighbours, nor batches, nor failures move a value between rows."""
    dense = {name: whole.patches(name) for name in ("features", "edges:features")}
    for row in whole.table.to_pylist():
        if row["status"] == "failed":
            continue
        expected = encoder.encode(row["uri"], FEATURES)
        for name in ("summary", "words:summary"):
            close(np.array(row[name], np.float32), expected[name][0])
        for name, rows in dense.items():
            assert rows[row["row"]].dtype == np.float16
            assert len(rows[row["row"]]) == row["grid_h"] * row["grid_w"]
            close(rows[row["row"]].astype(np.float32), expected[name][0])
    first, again = (whole.column("key").index(key) for key in ("a-jpeg", "k-again"))
    assert np.array_equal(dense["features"][first], dense["features"][again])


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_failures_leave_their_neighbours_as_they_are(
    whole: Extraction, encoder: Encoder, tmp_path: Path
) -> None:
    good = {name: data for name, data in ZOO.items() if name.rsplit(".", 1)[0] in OK}
    alone = extract(
        str(write_files(tmp_path / "good", good)),
        tmp_path / "out",
        encoder,
        features=FEATURES,
        batch=1,
    )
    assert alone.column("key") == OK and set(alone.column("status")) == {"ok"}
    among = [row for row in whole.table.to_pylist() if row["status"] == "ok"]
    for found, expected in zip(alone.table.to_pylist(), among, strict=True):
        close(np.array(found["summary"], np.float32), torch.tensor(expected["summary"]))


def test_a_shard_where_every_row_failed(encoder: Encoder, tmp_path: Path) -> None:
    bad = {f"{n}.png": ZOO["b-cut.jpg"][: 60 + n] for n in range(5)} | {"9.jpg": jpeg(0, 32, 32)}
    source = str(write_files(tmp_path / "bad", bad))
    for merge_to in (None, 2):
        found = extract(
            source, tmp_path / f"{merge_to}", encoder, features=FEATURES, shard_rows=2,
            batch=2, merge_to=merge_to,
        )  # fmt: skip
        assert found.column("status") == ["failed"] * 5 + ["ok"]
        assert [len(rows) for rows in found.patches("edges:features")][:5] == [0] * 5
        shapes = [
            {k: (v.dtype, v.shape[1:]) for k, v in load_file(path).items()}
            for path in sorted((found.folder / "data").glob("*.safetensors"))
        ]
        assert shapes[0] == shapes[1] == shapes[2]
        assert ("assignment" in shapes[0]) is (merge_to is not None)
        assert found.table.schema == pq.read_schema(found.shards[0])


def test_features_beyond_half_precision_fail_their_row(tmp_path: Path) -> None:
    encoder = Encoder(small_weights())
    with torch.no_grad():
        encoder.heads["words"]["summary"].final[2].weight.mul_(1e6)
    source = str(write_files(tmp_path / "in", {"a.png": png(0), "b.png": png(1)}))
    names = ("summary", "words:summary", "features")
    found = extract(source, tmp_path / "out", encoder, features=names)
    assert found.column("status") == ["failed"] * 2 and found.column("summary") == [None] * 2
    assert "'words:summary' is NaN, or beyond the 65504" in found.column("error")[0]
    assert found.column("grid_h") == [0, 0]
    fine = extract(source, tmp_path / "fine", encoder, features="summary")
    assert fine.column("status") == ["ok"] * 2


# merging


def test_merged_rows_keep_their_sizes_and_assignment(
    zoo: Path, encoder: Encoder, tmp_path: Path
) -> None:
    names = ("features", "edges:features")
    found = extract(str(zoo), tmp_path / "out", encoder, features=names, merge_to=5, batch=2)
    assert found.manifest["merge_to"] == 5
    tensors = load_file(found.folder / "data" / "00000.patches.safetensors")
    assert tensors["sizes"].dtype == np.float32 and tensors["assignment"].dtype == np.int64
    tokens, sizes = found.patches("features"), found.patches("sizes")
    grids = zip(found.column("grid_h"), found.column("grid_w"), strict=True)
    ends = np.cumsum([0, *(rows * columns for rows, columns in grids)])
    assert ends[-1] == len(tensors["assignment"])
    for row, uri in enumerate(found.column("uri")):
        patches = int(ends[row + 1] - ends[row])
        assert len(tokens[row]) == len(sizes[row]) == min(5, patches)
        assert sizes[row].sum() == patches
        if not patches:
            continue
        expected = encoder.encode(uri, names, merge_to=5)
        part = tensors["assignment"][ends[row] : ends[row + 1]]
        assert np.array_equal(part, expected["assignment"][0].numpy())
        assert np.array_equal(sizes[row], expected["sizes"][0].numpy())
        close(tokens[row].astype(np.float32), expected["features"][0])


# shards and files


def test_shards_are_cut_by_rows(zoo: Path, encoder: Encoder, tmp_path: Path) -> None:
    for rows, counts in ((5, [5, 5, 3]), (13, [13]), (1, [1] * 13), (12, [12, 1])):
        found = extract(str(zoo), tmp_path / str(rows), encoder, shard_rows=rows, batch=2)
        assert [pq.read_metadata(path).num_rows for path in found.shards] == counts
        assert [path.stem for path in found.shards] == [f"{n:05d}" for n in range(len(counts))]
        assert found.column("row") == list(range(13))


def test_shards_are_cut_by_bytes(encoder: Encoder, tmp_path: Path) -> None:
    source = str(write_files(tmp_path / "in", {f"{n}.png": png(n, 64, 64) for n in range(7)}))
    each = 192 * 2 + 16 * 96 * 2
    for most, counts in ((each, [1] * 7), (each + 1, [2, 2, 2, 1]), (3 * each, [3, 3, 1])):
        found = extract(
            source,
            tmp_path / str(most),
            encoder,
            features=("summary", "features"),
            shard_bytes=most,
            batch=4,
        )
        assert [pq.read_metadata(path).num_rows for path in found.shards] == counts


def test_the_sums_in_the_done_files_verify(zoo: Path, encoder: Encoder, tmp_path: Path) -> None:
    found = extract(
        str(zoo), tmp_path / "out", encoder, features=("summary", "features"), shard_rows=4
    )
    files = found.files()
    assert len(files) == 3 * 4 and not any("tmp" in name for name in files)
    for number in range(4):
        facts = json.loads(files[f"{number:05d}.done.json"])
        assert set(facts["sha256"]) == {
            f"{number:05d}.parquet",
            f"{number:05d}.patches.safetensors",
        }
        for name, digest in facts["sha256"].items():
            assert hashlib.sha256(files[name]).hexdigest() == digest
        table = pq.read_table(found.shards[number])
        assert facts["rows"] == table.num_rows == facts["ok"] + facts["failed"]
        assert facts["failed"] == table["status"].to_pylist().count("failed")
        assert facts["fingerprint"] == found.manifest["fingerprint"]
    assert sum(json.loads(v)["rows"] for k, v in files.items() if "done" in k) == 13


def test_two_runs_give_the_same_bytes(
    whole: Extraction, zoo: Path, encoder: Encoder, tmp_path: Path
) -> None:
    again = extract(str(zoo), tmp_path / "out", encoder, features=FEATURES, batch=3)
    ours, theirs = again.files(), whole.files()
    assert set(ours) == set(theirs)
    for name in ours:
        assert "done" in name or ours[name] == theirs[name], name
    for name in ("manifest.json", "plan.parquet"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_the_fingerprint_changes_with_what_decides_the_numbers(
    zoo: Path, encoder: Encoder, tmp_path: Path
) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"size": 32},
        {"size": (32, 48)},
        {"features": ("features",)},
        {"features": ("features",), "merge_to": 4},
    ]
    source, seen = str(zoo / "a-jpeg.jpg"), []
    for number, option in enumerate(options):
        found = extract(source, tmp_path / f"{number}", encoder, **option)
        seen.append(found.manifest["fingerprint"])
    assert len(set(seen)) == len(options)
    same = extract(source, tmp_path / "same", encoder, batch=1, shard_rows=1)
    assert same.manifest["fingerprint"] == seen[0]


def test_a_size_makes_every_grid_the_same(zoo: Path, encoder: Encoder, tmp_path: Path) -> None:
    found = extract(str(zoo), tmp_path / "out", encoder, size=(32, 48), features="features")
    rows = [row for row in found.table.to_pylist() if row["status"] == "ok"]
    assert {(row["grid_h"], row["grid_w"]) for row in rows} == {(2, 3)}
    expected = encoder.encode(zoo / "e-wide.png", "features", size=(32, 48))["features"]
    close(found.patches("features")[4].astype(np.float32), expected[0])


# existing output


def test_an_existing_output_is_kept_unless_it_is_ours(encoder: Encoder, tmp_path: Path) -> None:
    source = str(write_files(tmp_path / "in", {"a.png": png(0), "b.png": png(1)}))
    out = tmp_path / "out"
    out.mkdir()  # empty: fine
    before = extract(source, out, encoder).files()
    with pytest.raises(RadioError, match=r"already holds an extraction.*overwrite"):
        encode(source, out, encoder)
    assert Extraction(out).files() == before
    (out / "data" / "00007.parquet").write_bytes(b"left by a longer run")
    (out / "data" / ".tmp-123-00008.parquet").write_bytes(b"left by a killed run")
    after = extract(source, out, encoder, overwrite=True, features="words:summary")
    assert sorted(after.files()) == ["00000.done.json", "00000.parquet"]
    with pytest.raises(RadioError, match="nowhere does not exist"):
        encode(str(tmp_path / "nowhere"), out, encoder, overwrite=True)
    assert Extraction(out).files() == after.files()


@pytest.mark.parametrize("spoil", ["file", "beside", "inside", "manifest", "text", "outsider"])
def test_overwriting_never_destroys_anything_else(
    spoil: str, encoder: Encoder, tmp_path: Path
) -> None:
    source = str(write_files(tmp_path / "in", {"a.png": png(0)}))
    out = tmp_path / "out"
    if spoil in ("beside", "inside"):
        encode(source, out, encoder)
        thesis = out / "thesis.tex" if spoil == "beside" else out / "data" / "thesis.tex"
    elif spoil == "file":
        thesis = out
    else:
        out.mkdir()
        manifest = {"manifest": '{"name": "my web app"}', "text": "{", "outsider": None}[spoil]
        if manifest is not None:
            (out / "manifest.json").write_text(manifest)
        thesis = out / "thesis.tex"
    thesis.write_text("years")
    for overwrite in (False, True):
        with pytest.raises(RadioError, match="already holds something else"):
            encode(source, out, encoder, overwrite=overwrite)
    assert thesis.read_text() == "years"


def test_mistakes_are_found_before_anything_is_written(
    zoo: Path, encoder: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"features": ("sumary",)}, r"unknown feature 'sumary'.*words:summary"),
        ({"features": "sumary"}, "unknown feature 'sumary'"),
        ({"features": ()}, "no feature is asked for"),
        ({"size": 50}, r"50 x 50.*48 x 48 and 64 x 64"),
        ({"merge_to": 4}, "ask for one of"),
        ({"merge_to": 0, "features": "features"}, "merge_to is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"shard_bytes": -1}, "shard_bytes is -1"),
    ]
    for options, words in mistakes:
        with pytest.raises(RadioError, match=words):
            encode(str(zoo), out, encoder, **options)
        assert not out.exists(), options


# sources


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("places")
    write_files(root / "one", {"a.png": png(0), "b.jpg": jpeg(1), "deep/c.PNG": png(2)})
    write_files(root / "two", {"a.png": png(3), "notes.txt": b"no", "odd[1].png": png(4)})
    for number in range(3):
        members = {f"{number}-{i}.jpg": jpeg(10 * number + i) for i in range(2)}
        write_tar(root / "tars" / f"t-{number:03d}.tar", {**members, f"{number}-0.cls": b"7"})
    (root / "empty").mkdir()
    return root


def names_of(sources: list[str]) -> Iterator[str]:
    for row in plan_rows(sources):
        name, _, place = row.uri.rpartition("/")[2].partition(" at byte ")
        yield f"{name}:{row.key.rpartition('/')[2]}" if place else name


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["one"], ["a.png", "b.jpg", "c.PNG"]),
        (["one/*"], ["c.PNG", "a.png", "b.jpg"]),
        (["one/*.png"], ["a.png"]),
        (["**/a.png"], ["a.png", "a.png"]),
        (["one/**"], ["a.png", "b.jpg", "c.PNG"]),
        (["*/[ab].*"], ["a.png", "b.jpg", "a.png"]),
        (["two/*"], ["a.png", "odd[1].png"]),
        (["two/odd[1].png"], ["odd[1].png"]),
        (["two/a.png"], ["a.png"]),
        (["{one,two}/a.png"], ["a.png", "a.png"]),
        (["{two,one}/*.png"], ["a.png", "odd[1].png", "a.png"]),
        (["{one,two}"], ["a.png", "b.jpg", "c.PNG", "a.png", "odd[1].png"]),
        (["tars/t-001.tar"], ["t-001.tar:1-0", "t-001.tar:1-1"]),
        (["tars/t-{000..001}.tar"], [f"t-00{n}.tar:{n}-{i}" for n in (0, 1) for i in (0, 1)]),
        (["tars/*.tar"], [f"t-00{n}.tar:{n}-{i}" for n in (0, 1, 2) for i in (0, 1)]),
        (["tars"], [f"t-00{n}.tar:{n}-{i}" for n in (0, 1, 2) for i in (0, 1)]),
        (["two/a.png", "tars/t-000.tar", "one/b.jpg"],
         ["a.png", "t-000.tar:0-0", "t-000.tar:0-1", "b.jpg"]),
    ],
)  # fmt: skip
def test_sources_of_every_kind(
    sources: list[str], expected: list[str], places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    assert list(names_of(sources)) == expected
    absolute = [str(places / source) for source in sources]
    assert list(names_of(absolute)) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "nowhere does not exist"),
        ("nowhere.png", r"nowhere\.png does not exist"),
        ("one/{a,z}.png", r"1 of 2 are missing: one/z\.png does not exist"),
        ("one/*.webp", r"one/\*\.webp matches no picture"),
        ("two/*.txt", r"two/\*\.txt matches no picture"),
        ("empty", "empty holds no picture"),
        ("empty/*", "matches no picture"),
        ("tars/t-{000..004}.tar", r"2 of 5 are missing.*t-003\.tar"),
        ("tars/{t-000.tar", "braces of .* do not close"),
        ("two/notes.txt", r"notes\.txt"),
        ("", "empty"),
    ],
)
def test_sources_without_pictures_are_named(
    source: str, words: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    with pytest.raises(RadioError, match=words):
        plan_rows([source])
    with pytest.raises(RadioError, match=words):
        plan_rows(["one", source])
    with pytest.raises(RadioError, match="an empty list of sources"):
        plan_rows([])


def test_each_uri_tells_where_its_picture_lies(
    places: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """Two pictures of one key are told apart, and a shard's by the byte."""
    sources = [places / "one" / "a.png", places / "two", places / "tars" / "t-002.tar"]
    found = extract(sources, tmp_path / "out", encoder)
    uris = found.column("uri")
    assert uris[:3] == [str(places / p) for p in ("one/a.png", "two/a.png", "two/odd[1].png")]
    assert len(set(uris)) == 5
    for uri, digest in zip(uris, found.column("sha256"), strict=True):
        path, _, at = uri.partition(" at byte ")
        data = Path(path).read_bytes()
        if at:
            key = found.column("key")[uris.index(uri)]
            data = data[int(at) :][: len(jpeg(int(key[-1]) + 20))]
        assert hashlib.sha256(data).hexdigest() == digest


def test_one_path_is_a_source_too(places: Path, encoder: Encoder, tmp_path: Path) -> None:
    found = encode(places / "one", tmp_path / "out", encoder)
    assert isinstance(found, EncodeResult) and (found.rows, found.ok) == (3, 3)
    assert found.out == str(tmp_path / "out") and found.seconds > 0


def test_a_picture_that_vanishes_is_a_failed_row(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "in", {"a.png": png(0), "b.png": png(1), "c.png": png(2)})
    plan = plan_rows([str(folder)])
    (folder / "b.png").unlink()
    monkeypatch.setattr("radio.extraction.encode.plan_rows", lambda _: plan)
    found = extract(str(folder), tmp_path / "out", encoder)
    assert found.column("status") == ["ok", "failed", "ok"]
    assert "b.png" in found.column("error")[1] and found.column("sha256")[1] is None


def test_names_that_are_no_text_are_escaped(encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in ((b"\xff.png", png(0)), (b"\xfe.png", b"damaged"), (b"ok.png", png(1))):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(data)
    found = extract(str(folder), tmp_path / "out", encoder)
    assert sorted(found.column("key")) == ["\\xfe", "\\xff", "ok"]
    assert sorted(found.column("status")) == ["failed", "ok", "ok"]
    assert found.plan["uri"].to_pylist() == found.column("uri")


def test_a_window_of_failures_does_not_stop_the_rest(encoder: Encoder, tmp_path: Path) -> None:
    """More failures, and more sizes, than the reader looks ahead."""
    files = {f"{n:03d}.png": b"bad" if n % 7 else png(n, 16 + 16 * (n % 5), 32) for n in range(60)}
    found = extract(str(write_files(tmp_path / "in", files)), tmp_path / "out", encoder, batch=2)
    assert found.column("row") == list(range(60))
    assert [n for n, status in enumerate(found.column("status")) if status == "ok"] == list(
        range(0, 60, 7)
    )
    for row in range(0, 60, 7):
        assert found.column("grid_w")[row] == 1 + row % 5
