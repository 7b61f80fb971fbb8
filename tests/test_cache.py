from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distill import losses_of, rows_of
from tiny import tiny_config

from radio.checks import check
from radio.config import Config
from radio.data.configured import training_plan
from radio.data.plan import PartitionSpec, StepSpec, ViewSpec
from radio.data.ranks import Ranks
from radio.data.shards import open_images
from radio.errors import RadioError
from radio.targets import codec
from radio.targets.cache import CachedStream, open_stream
from radio.targets.cache_key import STUDENT_ONLY, identity, target_key
from radio.targets.entries import Entry, EntryFolder, key_of
from radio.targets.stream import Coded, LocalStream, Stream
from radio.targets.target_maker import CodedTarget, Request, StandardizerFile
from radio.training.checkpoint import load_checkpoint
from radio.training.distill import distill

pytestmark = pytest.mark.usefixtures("no_report")
BF16 = Request("train", "bf16", {})


class Asked(LocalStream):
    """A LocalStream that remembers the (step, partition, teacher) it was asked for."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.asked: list[tuple[int, str, str]] = []

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        for spec, coded in super().encode(specs, request, incarnation):
            for partition in spec.partitions:
                self.asked += [(spec.step, partition.name, name) for name in partition.modes]
            yield spec, coded


def never() -> Stream:
    raise AssertionError("a teacher was started")


def cached_config(root: Path, steps: int = 4) -> Config:
    """Three steps an epoch; what an epoch shows comes again."""
    config = tiny_config(root, steps)
    config.data.repeat_epochs = 1
    config.cache = str(root / "cache")
    config.fit.steps = 1
    config.evaluation.views = 2
    config.checkpoint.every_steps = 4
    return config


def specs_of(config: Config, steps: Iterable[int]) -> list[StepSpec]:
    plan = training_plan(config, 24)
    return [plan(step) for step in steps]


def same_bits(ours: Coded, theirs: Coded) -> bool:
    assert [list(partition) for partition in ours] == [list(partition) for partition in theirs]
    return all(
        _same(a, b)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine.values(), other.values(), strict=True)
    )


def _same(a: CodedTarget, b: CodedTarget) -> bool:
    for field in dataclasses.fields(CodedTarget):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(y, np.ndarray):
            if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                return False
        elif field.name != "seconds" and (type(x) is not type(y) or x != y):
            return False
    return True


@pytest.fixture(scope="module")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = cached_config(tmp_path_factory.mktemp("live"))
    return distill(replace(config, cache=None)).out


@pytest.fixture(scope="module")
def filled(live_run: Path) -> Config:
    """The same run in another folder, through a cache that was empty."""
    config = replace(cached_config(live_run.parent), out=str(live_run.parent / "filling"))
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        distill(config, stream)
        # Of 3 teachers and 2 partitions: a fit, an epoch of 3 steps, the held-out views, and those
        # of the report at one resolution. Step 3 is step 0 again, the held-out views come twice.
        assert (stream.misses, stream.hits) == (6 + 3 * 6 + 6 + 3, 6 + 6)
    return config


def test_filling_the_cache_changes_no_bit(filled: Config, live_run: Path) -> None:
    assert losses_of(filled.out) == losses_of(live_run)
    assert rows_of(filled.out) == rows_of(live_run)


def test_training_from_the_cache_is_training_live_without_a_teacher(
    filled: Config, live_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(filled, out=f"{filled.out}-again")
    with caplog.at_level("INFO"), closing(CachedStream(config, never)) as stream:
        distill(config, stream)
    assert losses_of(config.out) == losses_of(live_run)
    assert rows_of(config.out) == rows_of(live_run)
    ours = load_checkpoint(Path(config.out) / "checkpoints" / "step-000004").model
    theirs = load_checkpoint(live_run / "checkpoints" / "step-000004").model
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in config.teachers:
        fitted = Path("standardizers") / f"{name}.safetensors"
        assert (Path(config.out) / fitted).read_bytes() == (live_run / fitted).read_bytes()
    assert "0 made" in caplog.text and "no teacher was started" in caplog.text


def test_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    specs = specs_of(config, range(3))
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        live = [coded for _, coded in stream.encode(specs, BF16)]
        for step, number, name in ((1, 0, "edges"), (2, 1, "words")):
            partition = specs[step].partitions[number]
            stream.entries.path(stream._key(partition, name, BF16)).unlink()
    asked: list[Asked] = []

    def start() -> Stream:
        asked.append(Asked(config))
        return asked[0]

    with closing(CachedStream(config, start)) as stream:
        for step, (spec, coded) in enumerate(stream.encode(specs, BF16)):
            assert bool(asked) == (step >= 1)  # the first step was whole
            assert spec == specs[step]
            assert same_bits(coded, live[step])
    assert asked[0].asked == [(1, "low", "edges"), (2, "high", "words")]


def test_an_epoch_that_comes_again_is_found(tmp_path: Path) -> None:
    config = cached_config(tmp_path, steps=9)
    live = Asked(config)
    with closing(CachedStream(config, lambda: live)) as stream:
        steps = [coded for _, coded in stream.encode(specs_of(config, range(9)), BF16)]
    assert {step for step, *_ in live.asked} == {0, 1, 2}
    assert all(same_bits(steps[at], steps[at % 3]) for at in range(9))


def test_what_one_process_keeps_two_find(tmp_path: Path) -> None:
    """Micro-shards are kept, whoever takes them; joined they are the whole, bit for bit."""
    config = cached_config(tmp_path)
    config.parallel.micro_shard = 1
    config.stages[0].partitions["low"].batch = 4
    (Path(config.data.train) / "p003.png").write_bytes(b"no picture")
    specs, stage = specs_of(config, range(4)), training_plan(config, 24).stages[0]
    with closing(LocalStream(config)) as local:
        live = [coded for _, coded in local.encode(specs, BF16)]
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        made = [coded for _, coded in stream.encode(specs, BF16)]
    assert all(same_bits(a, b) for a, b in zip(made, live, strict=True))
    for rank in range(2):
        shares = [Ranks(rank, 2).share(spec, stage) for spec in specs]
        with closing(LocalStream(config)) as local:
            live = [coded for _, coded in local.encode(shares, BF16)]
        with closing(CachedStream(config, never)) as stream:
            found = [coded for _, coded in stream.encode(shares, BF16)]
        assert all(same_bits(a, b) for a, b in zip(found, live, strict=True))


@pytest.mark.parametrize("name", codec.CODECS)
def test_every_codec_comes_back_with_its_bits(name: str, tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    [spec], request = specs_of(config, [0]), Request("val", name, {})
    held_out = tuple(training_plan(config, 24).held_out(4, 4, ["words"]))
    specs = [replace(spec, partitions=held_out)]
    with closing(LocalStream(config)) as local:
        [(_, live)] = local.encode(specs, request)
        with closing(CachedStream(config, lambda: local)) as stream:
            [(_, made)] = stream.encode(specs, request)
    with closing(CachedStream(config, never)) as stream:
        [(_, found)] = stream.encode(specs, request)
        [batch] = stream.read(specs, request)
    assert same_bits(made, live) and same_bits(found, live)
    assert batch.busy_seconds == {"words": 0.0}


def test_damaged_pictures_are_kept_too(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    (Path(config.data.train) / "p003.png").write_bytes(b"no picture")
    specs = specs_of(config, range(3))
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        live = list(stream.read(specs, BF16))
    with closing(CachedStream(config, never)) as stream:
        again = list(stream.read(specs, BF16))
        kept = [target for _, step in stream.encode(specs, BF16) for part in step
                for target in part.values() if target.damaged]  # fmt: skip
    assert [batch.damaged for batch in again] == [batch.damaged for batch in live]
    assert {key for target in kept for key in target.damaged} == {"p003"}
    assert all("p003" not in target.keys for target in kept)


def changed(value: Any) -> Any:
    """Return another value of about the same type."""
    match value:
        case dict():
            return {name: f"{mode}-" for name, mode in value.items()}
        case tuple():
            return value[::-1]
        case _:
            return value + type(value)(1)


PARTITION = PartitionSpec(
    "low",
    32,
    (ViewSpec(3, 0, 7), ViewSpec(5, 0, 8)),
    {"words": "native"},
    (1, 0),
    window=2,
    shape=(32, 48),
    shards=(0, 1),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return cached_config(tmp_path_factory.mktemp("plain"))


def key_in(
    config: Config, partition: PartitionSpec = PARTITION, request: Request = BF16, print_: str = ""
) -> str:
    source = open_images(config.data.train)
    teacher = identity(config, "words"), print_
    return target_key(config, "words", teacher, source, partition, request)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PartitionSpec)])
def test_the_key_covers_every_field_of_a_partition(field: str, plain: Config) -> None:
    other = replace(PARTITION, **{field: changed(getattr(PARTITION, field))})
    assert (key_in(plain, other) == key_in(plain)) == (field in STUDENT_ONLY)


@pytest.mark.parametrize("field", ["sample", "epoch", "position"])
def test_the_key_covers_every_field_of_a_view(field: str, plain: Config) -> None:
    first, second = PARTITION.views
    other = replace(PARTITION, views=(replace(first, **{field: 11}), second))
    assert key_in(plain, other) != key_in(plain)


def test_another_teacher_in_the_partition_does_not_count(plain: Config) -> None:
    other = replace(PARTITION, modes={"edges": "mosaic", "words": "native"})
    assert key_in(plain, other) == key_in(plain)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("data.crop_scale", [0.5, 1.0]),
        ("data.micro_batch", 4),
        ("data.shift_margin", 1),
        ("student.patch_size", 8),
        ("losses.grid", "larger"),
        ("teachers.words.options", {"feature_dim": 9}),
        ("teachers.words.pretrained", "tag"),
        ("teachers.words.upsample", 2),
    ],
)
def test_the_key_covers_the_recipe(path: str, value: object, plain: Config) -> None:
    assert key_in(with_value(plain, path, value)) != key_in(plain)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.lr", 0.5),
        ("student.size", "small"),
        ("teachers.words.summary_weight", 0.5),
        ("teachers.edges.options", {}),
        ("data.max_damaged", 0.5),
    ],
)
def test_what_only_the_student_feels_does_not_count(
    path: str, value: object, plain: Config
) -> None:
    assert key_in(with_value(plain, path, value)) == key_in(plain)


def with_value(config: Config, path: str, value: object) -> Config:
    head, _, rest = path.partition(".")
    if isinstance(owner := config, dict):
        return owner | {head: with_value(owner[head], rest, value)}
    found = getattr(config, head)
    return replace(config, **{head: with_value(found, rest, value) if rest else value})


def test_the_key_covers_request_fingerprint_and_pictures(plain: Config, tmp_path: Path) -> None:
    fitted = Request("train", "bf16", {"words": StandardizerFile("a", "1" * 64)})
    moved = Request("train", "bf16", {"words": StandardizerFile("b", "1" * 64)})
    refitted = Request("train", "bf16", {"words": StandardizerFile("a", "2" * 64)})
    others = Request("train", "bf16", {"edges": StandardizerFile("a", "1" * 64)})
    keys = {
        key_in(plain),
        key_in(plain, request=replace(BF16, codec="int8")),
        key_in(plain, request=fitted),
        key_in(plain, request=refitted),
        key_in(plain, print_="another"),
        key_in(tiny_config(tmp_path, pictures=23)),
    }
    assert len(keys) == 6
    assert key_in(plain, request=moved) == key_in(plain, request=fitted)
    assert key_in(plain, request=others) == key_in(plain)


def test_weights_count_by_their_bytes_not_by_their_path(plain: Config, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return identity(with_value(plain, "teachers.words.pretrained", str(path)), "words")

    for name, content in (("a", b"1234"), ("b", b"1234"), ("c", b"1235")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}-folder").mkdir()
        (tmp_path / f"{name}-folder" / "model.safetensors").write_bytes(content)
    a, b, c = (said(tmp_path / name) for name in "abc")
    assert a == b != c
    a, b, c = (said(tmp_path / f"{name}-folder") for name in "abc")
    assert a == b != c
    os.utime(tmp_path / "c", (0, 0))
    (tmp_path / "c").write_bytes(b"1236")  # of the same size
    assert said(tmp_path / "c") not in (a, c)


def test_another_teacher_behind_the_same_tag_is_refused_by_name(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        assert stream.teachers["words"].feature_dim == 8
    changed_weights = replace(config, seed=1)
    stream = CachedStream(config, lambda: LocalStream(changed_weights))
    with closing(stream), pytest.raises(RadioError, match=r"teacher 'words' is another .*cache="):
        next(stream.encode(specs_of(config, [0]), BF16))


def test_views_that_never_repeat_are_refused_by_both_keys(plain: Config) -> None:
    config = with_value(plain, "data.repeat_epochs", 0)
    with pytest.raises(RadioError, match=r"cache=.*data\.repeat_epochs=0"):
        check(config)


def test_without_a_cache_the_stream_is_the_live_one(plain: Config) -> None:
    live = LocalStream(plain)
    assert open_stream(replace(plain, cache=None), lambda: live) is live
    assert isinstance(open_stream(plain, lambda: live), CachedStream)


ENTRY = Entry(
    {
        "codes": np.arange(12, dtype=np.uint16).reshape(3, 4).T,
        "valid": np.broadcast_to(np.array([True, False]), (3, 2)),
        "none": np.zeros((0, 2), np.float32),
    },
    {"keys": ["a", "\udcff"], "damaged": {"b": "cut"}},
)
KEY = key_of({"an": "entry"})


def assert_is_the_entry(found: Entry | None) -> None:
    assert found is not None and found.said == ENTRY.said
    assert found.arrays.keys() == ENTRY.arrays.keys()
    for name, array in ENTRY.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


def test_arrays_come_back_whatever_their_strides(tmp_path: Path) -> None:
    entries = EntryFolder(tmp_path / "cache")
    assert entries.get(KEY, "it") is None
    entries.put(KEY, ENTRY, "it")
    assert_is_the_entry(entries.get(KEY, "it"))
    assert entries.bytes_read == entries.bytes_written == entries.path(KEY).stat().st_size


def test_a_damaged_entry_is_never_taken_for_a_whole_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = EntryFolder(tmp_path)
    entries.put(KEY, ENTRY, "it")
    whole = entries.path(KEY).read_bytes()
    cut = [whole[:length] for length in (*range(0, 64, 7), len(whole) - 1)]
    flipped = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))
    ]
    for bad in (*cut, *flipped, whole + b"\0"):
        entries.path(KEY).write_bytes(bad)
        assert entries.get(KEY, "the target of 'words'") is None
    assert "the target of 'words'" in caplog.text and str(entries.path(KEY)) in caplog.text


def test_an_entry_under_anothers_name_is_damaged(tmp_path: Path) -> None:
    entries, other = EntryFolder(tmp_path), key_of({"another": "entry"})
    entries.put(KEY, ENTRY, "it")
    entries.path(other).parent.mkdir(exist_ok=True)
    entries.path(KEY).rename(entries.path(other))
    assert entries.get(other, "it") is None


def test_a_damaged_target_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = cached_config(tmp_path)
    specs = specs_of(config, [0])
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        [(_, live)] = stream.encode(specs, BF16)
        path = stream.entries.path(stream._key(specs[0].partitions[0], "parts", BF16))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    asked = Asked(config)
    with closing(CachedStream(config, lambda: asked)) as stream:
        [(_, again)] = stream.encode(specs, BF16)
    assert asked.asked == [(0, "low", "parts")]
    assert "a target of teacher 'parts'" in caplog.text and str(path) in caplog.text
    assert same_bits(again, live) and path.read_bytes() == whole


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the system refuse to write on in the middle of a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_said_and_nothing_half_stays(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    specs = specs_of(config, [0])
    with closing(CachedStream(config, lambda: LocalStream(config))) as stream:
        assert stream.teachers
        before = {path for path in Path(config.cache or "").rglob("*") if path.is_file()}
        message = r"cache=.* a target of teacher 'words' .*File too large.*cache=null"
        with files_of_at_most(600), pytest.raises(RadioError, match=message):
            list(stream.encode(specs, BF16))
        assert {path for path in Path(config.cache or "").rglob("*") if path.is_file()} == before
        [(_, coded)] = stream.encode(specs, BF16)
    assert len(coded) == 2


def test_what_a_killed_process_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    entries = EntryFolder(tmp_path)
    entries.put(KEY, ENTRY, "it")
    old, new = tmp_path / "unfinished" / "old", tmp_path / "unfinished" / "new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    EntryFolder(tmp_path)
    assert not old.exists() and new.exists()


def test_many_writers_and_readers_of_one_entry(tmp_path: Path) -> None:
    def work() -> None:
        entries = EntryFolder(tmp_path)
        for _ in range(30):
            entries.put(KEY, ENTRY, "it")
            assert_is_the_entry(entries.get(KEY, "it"))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert list((tmp_path / "unfinished").iterdir()) == []


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    program = (
        "import sys; from pathlib import Path\n"
        "from test_cache import *\n"
        "config = cached_config(Path(sys.argv[1]))\n"
        "stream = CachedStream(config, lambda: LocalStream(config))\n"
        "list(stream.encode(specs_of(config, range(3)), BF16)); stream.close()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parent) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    specs = specs_of(config, range(3))
    with closing(LocalStream(config)) as local:
        live = [coded for _, coded in local.encode(specs, BF16)]
    with closing(CachedStream(config, never)) as stream:
        found = [coded for _, coded in stream.encode(specs, BF16)]
    assert all(same_bits(a, b) for a, b in zip(found, live, strict=True))


@pytest.mark.slow
def test_teachers_in_actors_fill_it_with_the_same_bits(filled: Config, live_run: Path) -> None:
    from radio.config import ClusterConfig
    from ray_jobs.cluster import cluster
    from ray_jobs.feature_stream import RayStream

    config = replace(filled, cache=f"{filled.cache}-ray", out=f"{filled.out}-ray")
    with (
        cluster(ClusterConfig(object_store_mb=256)),
        closing(open_stream(config, lambda: RayStream(config))) as stream,
    ):
        distill(config, stream)
    assert losses_of(config.out) == losses_of(live_run)
    ours, theirs = (sorted(Path(str(c.cache)).glob("??/*")) for c in (config, filled))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))
