"""Folders and shards: what is found, read by offset, refused by name."""

from __future__ import annotations

import gzip
import http.server
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import webdataset
from picture_zoo import jpeg, png, write_tar

from radio.data import tar_index
from radio.data.shards import ImageSource, ShardSource, expand, open_images, place_of, write_shards
from radio.errors import RadioError


def contents(source: ImageSource) -> dict[str, bytes]:
    return {source.key(i): source.read(i) for i in range(len(source))}


def shards(folder: Path, count: int = 3, each: int = 4) -> list[Path]:
    paths = []
    for shard in range(count):
        members = []
        for number in range(shard * each, (shard + 1) * each):
            members += [(f"{number:06d}.cls", b"7"), (f"{number:06d}.jpg", jpeg(number))]
        paths.append(write_tar(folder / f"train-{shard:06d}.tar", members))
    return paths


# folders


def test_a_folder_is_read_below_itself_in_order_whatever_the_case(tmp_path: Path) -> None:
    files = {"b.PNG": png(1), "a/z.jpg": jpeg(2), "a/deep/er.JPEG": jpeg(3), "c.d.webp": b"x"}
    for name, data in {**files, "notes.txt": b"no", ".hidden.jpg": b"no", "._b.png": b"no"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "t.jpg").write_bytes(b"no")
    source = open_images(str(tmp_path))
    assert isinstance(source, ImageSource)
    assert contents(source) == {
        "a/deep/er": files["a/deep/er.JPEG"],
        "a/z": files["a/z.jpg"],
        "b": files["b.PNG"],
        "c.d": b"x",
    }
    assert [source.key(i) for i in range(4)] == ["a/deep/er", "a/z", "b", "c.d"]
    assert place_of(source, 2) == str(tmp_path / "b.PNG")


def test_a_label_map_beside_a_photograph_is_no_picture_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0.png").write_bytes(b"labels")
    (tmp_path / "0.jpg").write_bytes(b"photograph")
    (tmp_path / "1.png").write_bytes(b"photograph too")
    with caplog.at_level(logging.WARNING, "radio.data"):
        assert contents(open_images(tmp_path)) == {"0": b"photograph", "1": b"photograph too"}
    assert "1 pictures were left out" in caplog.text


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"a")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "real")
    (folder / "circle").symlink_to(folder)
    assert contents(open_images(folder)) == {"link/a": b"a"}


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RadioError, match=r"nowhere.*does not exist; expected a folder"):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(RadioError, match=r"holds no picture and no tar shard but nothing"):
        open_images(tmp_path)
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(RadioError, match=r"1 other files, first a\.heic; expected jpg, jpeg"):
        open_images(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "a.JPG").write_bytes(b"")
    with pytest.raises(RadioError, match=r"a\.JPG and a\.jpg have the same key 'a'"):
        open_images(tmp_path)
    (tmp_path / "a.JPG").unlink()
    shards(tmp_path, 1)
    with pytest.raises(RadioError, match=r"tars \(train-000000.tar\) as well as pictures \(a.jpg"):
        open_images(tmp_path)


# shards


def test_keys_and_bytes_are_those_of_webdatasets_own_reader(tmp_path: Path) -> None:
    members = [
        ("a/0.sem.png", png(9)),
        ("a/0.JPG", jpeg(0)),
        ("a/0.png", png(8)),
        ("a/0.json", b"{}"),
        ("./b.jpeg", jpeg(1)),
        ("._b.jpeg", b"resource fork"),
        ("dots.in.name.jpg", jpeg(7)),
        ("text.txt", b"no picture"),
        ("c.png", png(2)),
        ("a/deep/" + "long" * 40 + ".jpg", jpeg(3)),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    source = open_images(str(path))
    judge = {
        sample["__key__"]: next(sample[e] for e in tar_index.EXTENSIONS if e in sample)
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if any(extension in sample for extension in tar_index.EXTENSIONS)
    }
    assert contents(source) == judge
    assert len(judge) == 4
    assert isinstance(source, ShardSource)
    assert source.num_skipped == 2  # dots.in.name.jpg has the field in.name.jpg


def test_an_index_points_into_the_file(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1)
    source = open_images(str(path))
    assert isinstance(source, ShardSource)
    raw = path.read_bytes()
    for i in range(len(source)):
        start, length = int(source.index.offset[i]), int(source.index.length[i])
        assert raw[start : start + length] == source.read(i) == jpeg(i)
    assert place_of(source, 0) == f"{path} at byte {int(source.index.offset[0])}"
    with pytest.raises(IndexError, match="sample 4 of 4"):
        source.key(4)


def test_braces_globs_lists_and_folders_of_tars_name_the_same(tmp_path: Path) -> None:
    paths = [str(path) for path in shards(tmp_path)]
    locations = (
        f"{tmp_path}/train-{{000000..000002}}.tar",
        f"{tmp_path}/train-00000?.tar",
        f"{tmp_path}/*.tar",
        paths,
        [f"{tmp_path}/train-{{000000,000001}}.tar", paths[2]],
    )
    for location in locations:
        assert expand(location) == paths
        assert len(open_images(location)) == 12
    assert contents(open_images(tmp_path)) == contents(open_images(paths))
    odd = write_tar(tmp_path / "odd" / "a[1]{x,y}.tar", {"k.jpg": jpeg()})
    assert expand(str(odd)) == [str(odd)]  # a file's own name goes before patterns


def test_wrong_locations_are_refused(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    (tmp_path / "folder").mkdir()
    text = tmp_path / "list.txt"
    text.write_text("train-000000.tar\n" * 100)
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(paths[0].read_bytes()))
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    other = write_tar(tmp_path / "other.tar", {"0.txt": b"a", "IMG.1.jpg": jpeg()})
    cases: list[tuple[Any, str]] = [
        ("", "a path of the pictures is empty"),
        ([], "no pictures are given"),
        (f"{tmp_path}/train-{{000000..000009}}.tar", r"7 of 10 shards are missing: .*-000003\.tar"),
        (f"{tmp_path}/val-{{0..3}}.tar", r"4 of 4 shards are missing: .*val-0\.tar"),
        (f"{tmp_path}/no-*.tar", r"no-\*\.tar does not exist"),
        (f"{tmp_path}/train-{{000000..000002.tar", "braces of .* do not close"),
        ([str(tmp_path / "folder")], r"is a folder; name the tars in it"),
        (str(text), r"list\.txt is no tar shard"),
        (str(packed), r"packed\.tar\.gz is compressed.*unpack"),
        (str(empty), r"empty\.tar is no tar shard \(empty file\)"),
        (str(other), r"no picture in .*other\.tar; 2 samples have other fields only, first '0'"),
        ("nosuch://bucket/a.tar", "cannot open nosuch"),
        ("memory://nothing/a.tar", "cannot read memory://nothing/a.tar"),
        ("memory://nothing/*.tar", "matches nothing"),
    ]
    for location, message in cases:
        with pytest.raises(RadioError, match=message):
            open_images(location)


def test_a_key_that_occurs_twice_is_refused_by_name(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one.tar", {"a.jpg": jpeg(), "b.jpg": jpeg()})
    two = write_tar(tmp_path / "two.tar", {"c.jpg": jpeg(), "b.png": png()})
    with pytest.raises(RadioError, match=r"key 'b' occurs in .*one\.tar and in .*two\.tar"):
        open_images([str(one), str(two)])
    twice = write_tar(tmp_path / "twice.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")])
    with pytest.raises(RadioError, match=r"key 'a' occurs twice in .*twice\.tar"):
        open_images(str(twice))


def test_sets_that_number_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("cats", "dogs/small"):
        for split in ("train", "val"):
            (tmp_path / "here" / name).mkdir(parents=True, exist_ok=True)
            write_tar(tmp_path / "here" / name / f"{split}-0.tar", {"000000.jpg": name.encode()})
    pattern = str(tmp_path / "{place}" / "{{cats,dogs/small}}" / "train-*.tar")
    source = open_images(pattern.format(place="here"))
    assert contents(source) == {"cats/000000": b"cats", "dogs/small/000000": b"dogs/small"}
    alone = open_images(str(tmp_path / "here" / "cats" / "train-*.tar"))
    assert contents(alone) == {"000000": b"cats"}
    (tmp_path / "here").rename(tmp_path / "there")
    assert open_images(pattern.format(place="there")).fingerprint == source.fingerprint


def test_a_shard_cut_anywhere_is_refused_and_never_shortened(tmp_path: Path) -> None:
    whole = shards(tmp_path, 1, 3)[0].read_bytes()
    expected = contents(open_images(str(tmp_path / "train-000000.tar")))
    cut = tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        members = tar.getmembers()
    boundaries = [m.offset for m in members] + [m.offset_data for m in members]
    end = members[-1].offset_data + members[-1].size
    refused = 0
    for size in sorted({*range(0, len(whole), 509), *boundaries, end, len(whole)}):
        cut.write_bytes(whole[:size])
        try:
            found = contents(open_images(str(cut)))
        except RadioError as error:
            assert "cut.tar" in str(error)
            refused += 1
        else:
            assert found == expected, f"cut at {size} of {len(whole)} bytes"
    assert refused > 10
    cut.write_bytes(whole[: members[-1].offset_data + 5])
    with pytest.raises(RadioError, match=rf"'000002.jpg' starts at byte {members[-1].offset_data}"):
        open_images(str(cut))
    cut.write_bytes(whole[: members[4].offset])
    with pytest.raises(RadioError, match=rf"cut at byte {members[4].offset}: .*write or copy it"):
        open_images(str(cut))


def test_a_broken_header_and_joined_tars_are_refused(tmp_path: Path) -> None:
    path = shards(tmp_path, 1, 3)[0]
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512 :])
    with pytest.raises(RadioError, match=rf"no header at byte {third}"):
        open_images(str(path))
    trimmed = whole.rstrip(b"\0") + b"\0" * (1024 + (-len(whole.rstrip(b"\0"))) % 512)
    path.write_bytes(trimmed + whole)
    with pytest.raises(RadioError, match=r"after its end marker.*joined by `cat`"):
        open_images(str(path))


def test_the_index_is_kept_until_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = shards(tmp_path / "data")
    kept = tmp_path / "index"
    pattern = str(tmp_path / "data" / "*.tar")
    first = open_images(pattern, kept)
    (file,) = kept.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_samples_of", lambda path: pytest.fail("headers were read"))
        second = open_images(pattern, kept)
    assert contents(first) == contents(second)
    assert first.fingerprint == second.fingerprint
    file.write_bytes(b"broken")
    with caplog.at_level(logging.WARNING, "radio.data"):
        assert contents(open_images(pattern, kept)) == contents(first)
    assert "made again" in caplog.text
    write_tar(paths[1], {"new.jpg": jpeg(99)})
    changed = open_images(pattern, kept)
    assert len(changed) == 9
    assert "new" in contents(changed)
    assert len(list(kept.iterdir())) == 2


def test_the_fingerprint_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    def of(folder: str, members: dict[str, bytes], name: str = "a.tar") -> str:
        return open_images(str(write_tar(tmp_path / folder / name, members))).fingerprint

    base = of("one", {"a.jpg": b"123", "b.jpg": b"45"})
    assert len(base) == 64
    assert base == of("two", {"a.jpg": b"123", "b.jpg": b"45", "c.txt": b""})
    others = {
        of("three", {"a.jpg": b"12", "b.jpg": b"345"}),
        of("four", {"a.jpg": b"123", "c.jpg": b"45"}),
        of("five", {"b.jpg": b"45", "a.jpg": b"123"}),
        of("six", {"a.jpg": b"123", "b.jpg": b"45"}, "b.tar"),
    }
    assert len(others) == 4
    assert base not in others


def test_a_source_pickles_and_reads_in_threads_and_other_processes(tmp_path: Path) -> None:
    shards(tmp_path)
    for location in (tmp_path, f"{tmp_path}/train-*.tar"):
        source = open_images(location)
        expected = contents(source)
        blob = pickle.dumps(source)
        assert contents(pickle.loads(blob)) == expected
        with ThreadPoolExecutor(4) as pool:
            order = [i % len(source) for i in range(200)]
            for i, data in zip(order, pool.map(source.read, order), strict=True):
                assert data == expected[source.key(i)]
    code = "import pickle,sys; s=pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(s.read(5))"
    child = subprocess.run([sys.executable, "-c", code], input=blob, stdout=subprocess.PIPE)
    assert child.stdout == jpeg(5)


def test_a_shard_that_shrinks_later_is_an_io_error(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, 1)
    source = open_images(str(path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match=r"train-000000.tar gave .* it has changed since"):
        source.read(3)


def test_keys_take_little_memory_and_odd_names_survive(tmp_path: Path) -> None:
    names = ["", "a", "ü" * 40, os.fsdecode(b"\xff\xfe"), "b/c"]
    packed = pickle.loads(pickle.dumps(tar_index.PackedStrings.pack(names)))
    assert [packed[i] for i in range(len(packed))] == names
    many = tar_index.PackedStrings.pack(f"{i:09d}" for i in range(1000))
    assert len(many.data) + many.ends.nbytes < 20_000


# remote


def test_any_fsspec_storage_is_read_by_range(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        local = contents(open_images(str(tmp_path)))
        for url in (
            "memory://bucket/train-{000000..000002}.tar",
            "memory://bucket/*.tar",
            [f"memory://bucket/{path.name}" for path in paths],
        ):
            source = open_images(url, tmp_path / "index")
            assert contents(source) == local
            assert source.fingerprint == open_images(str(tmp_path)).fingerprint
        memory.pipe("/bucket/cut.tar", paths[0].read_bytes()[:900])
        with pytest.raises(RadioError, match=r"memory://bucket/cut\.tar is cut or damaged after"):
            open_images("memory://bucket/cut.tar")
        memory.rm("/bucket/train-000001.tar")
        with pytest.raises(OSError, match="000001"):
            source.read(5)
    finally:
        memory.rm("/bucket", recursive=True)


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, which Python's own handler does not."""

    requests: ClassVar[list[str]] = []
    fail = 0

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).requests.append(wanted or "all")
        if type(self).fail:
            type(self).fail -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        if wanted:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        self.send_response(200 if path.exists() else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size if path.exists() else 0))
        self.end_headers()


class PlainHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_http_is_read_by_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    paths = shards(tmp_path)
    with served(tmp_path, RangeHandler) as address:
        source = open_images(f"{address}/train-{{000000..000002}}.tar")
        RangeHandler.requests.clear()
        assert source.read(6) == jpeg(6)
        start = int(source.index.offset[6]) if isinstance(source, ShardSource) else -1
        assert RangeHandler.requests == [f"bytes={start}-{start + len(jpeg(6)) - 1}"]
        assert contents(source) == contents(open_images([str(path) for path in paths]))
        RangeHandler.fail = 1
        with pytest.raises(OSError, match="503"):  # the client's own error class is none
            source.read(6)
        with pytest.raises(RadioError, match=r"cannot read .*/none\.tar"):
            open_images(f"{address}/none.tar")
    write_tar(tmp_path / "large.tar", {"a.jpg": bytes(12 << 20), "b.jpg": jpeg()})
    with served(tmp_path, PlainHandler) as address:
        for name in ("train-000000", "large"):
            with pytest.raises(RadioError, match=rf"{name}\.tar cannot be read from the middle"):
                open_images(f"{address}/{name}.tar")


# writing


def samples(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"s{i:03d}", "jpg": jpeg(i), "json": {"number": i}} for i in range(count)]


def test_shards_are_written_split_and_read_back_the_same_every_time(tmp_path: Path) -> None:
    size = len(jpeg(0))
    first = write_shards(samples(10), tmp_path / "a" / "x-%06d.tar", max_bytes=3 * size)
    again = write_shards(iter(samples(10)), str(tmp_path / "b%%" / "x-%06d.tar"), 3 * size)
    assert [path.name for path in first] == [f"x-{n:06d}.tar" for n in range(len(first))]
    assert len(first) > 2
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [p.name for p in first]
    assert contents(open_images(tmp_path / "a")) == {f"s{i:03d}": jpeg(i) for i in range(10)}
    judge = webdataset.WebDataset([str(p) for p in first], shardshuffle=False)
    assert [sample["json"] for sample in judge] == [b'{"number": %d}' % i for i in range(10)]


def test_bad_samples_leave_no_file_and_do_not_touch_an_old_one(tmp_path: Path) -> None:
    (old,) = write_shards(samples(1), tmp_path / "x-%d.tar")
    before = old.read_bytes()
    for bad, message in (
        ({"__key__": "a.b", "jpg": b""}, "'a.b' will not come back"),
        ({"__key__": "", "jpg": b""}, "'' will not come back"),
        ({"__key__": "s001", "jpg": b""}, "'s001' occurs twice"),
    ):
        with pytest.raises(RadioError, match=message):
            write_shards([*samples(3), bad], tmp_path / "x-%d.tar")
        assert list(tmp_path.iterdir()) == [old]
        assert old.read_bytes() == before
    for pattern in ("x.tar", "x-%s-%d.tar", "x-%d.tar.gz", "x%"):
        with pytest.raises(RadioError, match=r"not of the form 'train-%06d\.tar'"):
            write_shards(samples(1), tmp_path / pattern)


# real sets, where they are


@pytest.mark.skipif("RADIO_TEST_DATA" not in os.environ, reason="RADIO_TEST_DATA is not set")
def test_real_sets_are_read_as_webdataset_reads_them() -> None:
    root = Path(os.environ["RADIO_TEST_DATA"])
    for name, train in (("camvid", 367), ("coco-instances", 70), ("people-masks", 249)):
        source = open_images(f"{root}/{name}/train-*.tar")
        assert len(source) == train
        paths = expand(f"{root}/{name}/train-*.tar")
        judge = webdataset.WebDataset(paths, shardshuffle=False)
        assert contents(source) == {sample["__key__"]: sample["jpg"] for sample in judge}
