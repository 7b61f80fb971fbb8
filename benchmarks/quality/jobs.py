"""What is measured of whom, and at which sizes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from radio.config import choices, load_teacher

ADAPTORS = ("clip", "siglip", "dinov2", "sam")
TEXT = ("clip", "siglip")
PIXELS, CONSTANT, STUDENT, CONTROL = "pixels", "constant", "student", "control"
TEACHER, CURVE = "teacher", "curve"
TINY, FLICKR, COCO, PEOPLE = "tiny-imagenet-100", "flickr8k", "coco-instances", "people-masks"
PIXELS_PX = 64  # of the summaries of raw pixels


@dataclass(frozen=True)
class Row:
    """A measurement by name: a task on a set. `of` says what of a target it is about."""

    name: str
    title: str
    task: str
    data: str
    of: str  # summary, text, map, masks, or else
    options: Mapping[str, Any] = field(default_factory=dict)


ROWS = {
    row.name: row
    for row in (
        Row("knn", "kNN, 100 classes", "knn", TINY, "summary"),
        Row("linear", "linear, 100 classes", "linear", TINY, "summary"),
        Row("zero-shot-seen", "zero-shot, 80 classes", "zero-shot", TINY, "text"),
        Row("zero-shot-held-out", "zero-shot, 20 kept out", "zero-shot", TINY, "text"),
        Row("retrieval", "retrieval@5, Flickr8k", "retrieval", FLICKR, "text"),
        Row("camvid", "segmentation, CamVid", "segmentation", "camvid", "map"),
        Row("coco", "segmentation, COCO", "segmentation", COCO, "map"),
        Row("people", "segmentation, people", "segmentation", PEOPLE, "map"),
        *(
            Row(f"masks-{p}-{on}", f"masks by {p}, {on}", "masks", data, "masks", {"prompt": p})
            for on, data in (("coco", COCO), ("people", PEOPLE))
            for p in ("point", "box")
        ),
        Row("rank", "RankMe", "rank", TINY, "else"),
        Row("shift", "shift error", "equivariance", COCO, "else"),
        Row("scale", "scale error", "equivariance", COCO, "else"),
        *(
            Row(f"mode-switch-{on}", f"mode switch, {on}", "mode-switch", data, "else")
            for on, data in (("coco", COCO), ("flickr8k", FLICKR))
        ),
        Row("similarity", "CKA with the teacher", "similarity", TINY, "else"),
    )
}
SWITCHES = [name for name, row in ROWS.items() if row.task == "mode-switch"]


def rows_of(*of: str) -> list[Row]:
    """Return the rows that are about one of these."""
    return [row for row in ROWS.values() if row.of in of]


@dataclass(frozen=True)
class Subject:
    """A column of the page: its label, what `radio evaluate` calls it, and its part."""

    label: str
    target: str
    role: str  # floor, teacher, student, control, curve


def adaptor_to(teacher: str) -> str:
    """Return the adaptor of the student that stands for a teacher called <prefix>_<adaptor>."""
    return teacher.rpartition("_")[2]


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher's YAML says that decides how it can be measured; sizes in px."""

    native: int
    any_size: bool
    has_summary: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The native size; twice and four times that, too, of a teacher that takes any."""
        return tuple(self.native * times for times in ((1, 2, 4) if self.any_size else (1,)))


@dataclass(frozen=True)
class Job:
    """One run of a task at a size in px, through the adaptor `tag` of an encoder if one is given.

    `options` are what else the task is told.
    """

    row: Row
    size: int | None
    tag: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without ending."""
        size = "" if self.size is None else str(self.size)
        return "_".join(part for part in (self.row.name, self.tag, size) if part)

    @property
    def all_options(self) -> dict[str, Any]:
        """What `radio.evaluation.result.Options` is given."""
        told: dict[str, Any] = {**self.row.options, **self.options}
        if self.size is not None and "sizes" not in told:
            told["size"] = self.size
        if self.tag and self.row.of in ("text", "masks"):
            told["adaptor"] = self.tag
        if self.tag and self.row.of == "summary":
            told["features"] = f"{self.tag}:summary"
        return told

    def command(self, target: str, data: str) -> str:
        """Return the line that measures the same."""
        words = ["radio", "evaluate", target, "--task", self.row.task]
        words += ["--data", f"{data}/{self.row.data}"]
        for name, value in self.all_options.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name}", text]
        return shlex.join(words)


def teachers_called(prefix: str) -> dict[str, TeacherFacts]:
    """Return by adaptor's name what the YAML of `<prefix>_<adaptor>` says, of those there are."""
    there = [name for name in ADAPTORS if f"{prefix}_{name}" in choices("teacher")]
    cards = {name: load_teacher(f"{prefix}_{name}").card for name in there}
    return {
        name: TeacherFacts(c.native_size, "match" in c.view_modes, c.summary_dim is not None)
        for name, c in cards.items()
    }


@dataclass(frozen=True)
class Setting:
    """What all jobs are made from: the teachers, and the classes that they never saw named."""

    prefix: str
    teachers: Mapping[str, TeacherFacts]
    held_out: tuple[int, ...]
    seen: tuple[int, ...]

    def jobs(self, subject: Subject) -> list[Job]:
        """Return all that is measured of a subject, the quick first."""
        if subject.label == CONSTANT:
            return [Job(row, None) for row in rows_of("masks")]
        if subject.label == PIXELS:
            whole = [Job(ROWS[name], PIXELS_PX) for name in ("rank", "knn")]
            return [*_at(self.dense_sizes, "map"), *whole]
        if subject.role == TEACHER:
            return list(self._of_teacher(adaptor_to(subject.label)))
        return list(self._of_encoder(subject.role))

    @property
    def dense_sizes(self) -> tuple[int, ...]:
        """Every size at which a teacher gives maps."""
        return tuple(sorted({size for facts in self.teachers.values() for size in facts.sizes}))

    @property
    def summary_sizes(self) -> tuple[int, ...]:
        """Every native size of a teacher that gives summaries."""
        return tuple(sorted({f.native for f in self.teachers.values() if f.has_summary}))

    def _of_teacher(self, name: str) -> Iterator[Job]:
        facts = self.teachers[name]
        yield from self._through_decoders([name], as_adaptor=False)
        yield from _shapes(facts.sizes, facts.any_size)
        yield from _at(facts.sizes, "map")
        yield Job(ROWS["rank"], facts.native)
        if facts.has_summary:
            yield from _at([facts.native], "summary")

    def _of_encoder(self, role: str) -> Iterator[Job]:
        if role == CURVE:
            yield from self._through_decoders([name for name in self.teachers if name in TEXT])
            yield Job(ROWS["knn"], min(self.summary_sizes))
            return
        yield from self._through_decoders(self.teachers, seeded=role == CONTROL)
        yield from _at(self.dense_sizes, "map")
        yield from _at(self.summary_sizes, "summary")
        if role == STUDENT:
            yield from self._of_student_alone()

    def _of_student_alone(self) -> Iterator[Job]:
        native = [facts.native for facts in self.teachers.values()]
        ends = min(native), max(native)  # what it is trained at
        for name in SWITCHES:
            yield Job(ROWS[name], None, "", {"sizes": ends})
        yield from _shapes(self.dense_sizes, True)
        yield Job(ROWS["rank"], min(self.summary_sizes))
        for name, facts in self.teachers.items():
            output = f"{name}:{'summary' if facts.has_summary else 'features'}"
            told = {"against": f"{self.prefix}_{name}", "features": output}
            yield Job(ROWS["similarity"], facts.native, name, told)
            if facts.has_summary:
                yield Job(ROWS["knn"], facts.native, name)

    def _through_decoders(
        self, names: Iterable[str], as_adaptor: bool = True, seeded: bool = False
    ) -> Iterator[Job]:
        """Yield what text towers and mask decoders make of teachers, or of adaptors to them.

        A seeded text tower reads texts by the tokenizer of the trained one.
        """
        classes = {"zero-shot-seen": self.seen, "zero-shot-held-out": self.held_out}
        for name in names:
            of = "text" if name in TEXT else "masks" if name == "sam" else ""
            for row in rows_of(of):
                told: dict[str, Any] = {}
                if row.name in classes:
                    told["classes"] = classes[row.name]
                if seeded and of == "text":
                    told["tokenizer"] = f"teachers/{self.prefix}/{name}"
                yield Job(row, self.teachers[name].native, name if as_adaptor else "", told)


def _at(sizes: Sequence[int], of: str) -> list[Job]:
    return [Job(row, size) for size in sizes for row in rows_of(of)]


def _shapes(sizes: Sequence[int], any_size: bool) -> Iterator[Job]:
    """Yield shifts at each size, and the scale between the first and the last."""
    for size in sizes:
        yield Job(ROWS["shift"], size, "", {"sizes": (size,)})
    if any_size:
        yield Job(ROWS["scale"], None, "", {"sizes": (max(sizes), min(sizes))})


def subjects_of(
    setting: Setting, student: str, control: str | None, checkpoints: Sequence[str]
) -> list[Subject]:
    """Return every column, also those that cannot be measured yet."""
    teachers = [f"{setting.prefix}_{name}" for name in ADAPTORS]
    return [
        Subject(PIXELS, PIXELS, "floor"),
        Subject(CONSTANT, "", "floor"),
        *(Subject(teacher, teacher, TEACHER) for teacher in teachers),
        Subject(STUDENT, student, STUDENT),
        *([Subject(CONTROL, control, CONTROL)] if control is not None else []),
        *(Subject(path.rsplit("/", 1)[-1], path, CURVE) for path in checkpoints),
    ]
