"""What is measured of whom, and at which sizes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from radio.config import choices, load_teacher

ADAPTORS = ("clip", "siglip", "dinov2", "sam")
TEXT = ("clip", "siglip")
PIXELS, CONSTANT, STUDENT, CONTROL = "pixels", "constant", "student", "control"
TINY, FLICKR, COCO, PEOPLE = "tiny-imagenet-100", "flickr8k", "coco-instances", "people-masks"
PIXELS_PX = 64  # of the summaries of raw pixels
FLAGS = {"features": "--features", "adaptor": "--adaptor", "against": "--against"}


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
            Row(
                f"masks-{prompt}-{short}",
                f"masks by {prompt}, {short}",
                "masks",
                data,
                "masks",
                {"prompt": prompt},
            )
            for short, data in (("coco", COCO), ("people", PEOPLE))
            for prompt in ("point", "box")
        ),
        Row("rank", "RankMe", "rank", TINY, "else"),
        Row("shift", "shift error", "equivariance", COCO, "else"),
        Row("scale", "scale error", "equivariance", COCO, "else"),
        Row("mode-switch", "mode switch, min e / max e", "mode-switch", COCO, "else"),
        Row("similarity", "CKA with the teacher", "similarity", TINY, "else"),
    )
}


@dataclass(frozen=True)
class Subject:
    """A column of the page: its label, what `radio evaluate` calls it, and its part."""

    label: str
    target: str
    role: str  # floor, teacher, student, control, curve
    adaptor: str = ""  # of the student that stands for this teacher


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher's YAML says that decides how it can be measured; sizes in px."""

    native: int
    any_size: bool
    has_summary: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The native size, and twice that of a teacher that takes any."""
        return (self.native, 2 * self.native) if self.any_size else (self.native,)


@dataclass(frozen=True)
class Job:
    """One run of a task. `tag` tells jobs of the same row and size apart: the adaptor."""

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
        return {**self.row.options, **self.options}

    def command(self, target: str, data: str) -> str:
        """Return the line that measures the same."""
        words = ["radio", "evaluate", target, "--task", self.row.task]
        words += ["--data", f"{data}/{self.row.data}"]
        for name, value in self.all_options.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [FLAGS.get(name, f"--{name}"), text]
        return shlex.join(words)


def teachers_called(prefix: str) -> dict[str, TeacherFacts]:
    """Return by adaptor's name what the YAML of `<prefix>_<adaptor>` says, of those there are."""
    found = {}
    for adaptor in ADAPTORS:
        if f"{prefix}_{adaptor}" in choices("teacher"):
            card = load_teacher(f"{prefix}_{adaptor}").card
            found[adaptor] = TeacherFacts(
                card.native_size, "match" in card.view_modes, card.summary_dim is not None
            )
    return found


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
            return [Job(row, None) for row in ROWS.values() if row.of == "masks"]
        if subject.label == PIXELS:
            return [*self._maps(self.dense_sizes), Job(ROWS["rank"], PIXELS_PX), *_knn(PIXELS_PX)]
        if subject.role == "teacher":
            return list(self._of_teacher(subject))
        return list(self._of_encoder(subject.role))

    @property
    def dense_sizes(self) -> tuple[int, ...]:
        """Every size at which a teacher gives maps."""
        return tuple(sorted({size for facts in self.teachers.values() for size in facts.sizes}))

    @property
    def summary_sizes(self) -> tuple[int, ...]:
        """Every native size of a teacher that gives summaries."""
        return tuple(sorted({f.native for f in self.teachers.values() if f.has_summary}))

    def _of_teacher(self, subject: Subject) -> Iterator[Job]:
        facts = self.teachers[subject.adaptor]
        if subject.adaptor in TEXT:
            yield from self._text(facts.native)
        if subject.adaptor == "sam":
            yield from _masks(facts.native)
        yield from _shapes(facts.sizes, facts.any_size)
        yield from self._maps(facts.sizes)
        yield Job(ROWS["rank"], facts.native, "", {"size": facts.native})
        if facts.has_summary:
            yield from _classified(facts.native)

    def _of_encoder(self, role: str) -> Iterator[Job]:
        for adaptor in TEXT:
            if adaptor in self.teachers:
                yield from self._text(self.teachers[adaptor].native, adaptor)
        if role == "curve":
            yield from _knn(min(self.summary_sizes))
            return
        if "sam" in self.teachers:
            yield from _masks(self.teachers["sam"].native, "sam")
        yield from self._maps(self.dense_sizes)
        if role == STUDENT:
            yield from self._of_student_alone()
        for size in self.summary_sizes:
            yield from _classified(size)
        if role == STUDENT:
            for adaptor, facts in self.teachers.items():
                if facts.has_summary:
                    yield from _knn(facts.native, adaptor)

    def _of_student_alone(self) -> Iterator[Job]:
        ends = (min(self.dense_sizes), max(self.dense_sizes))
        yield Job(ROWS["mode-switch"], None, "", {"sizes": ends})
        yield from _shapes(self.dense_sizes, True)
        yield Job(ROWS["rank"], min(self.summary_sizes), "", {"size": min(self.summary_sizes)})
        for adaptor, facts in self.teachers.items():
            output = f"{adaptor}:{'summary' if facts.has_summary else 'features'}"
            shared = {"against": f"{self.prefix}_{adaptor}", "size": facts.native}
            yield Job(ROWS["similarity"], facts.native, adaptor, {**shared, "features": output})

    def _text(self, size: int, adaptor: str = "") -> Iterator[Job]:
        options: dict[str, Any] = {"size": size, **({"adaptor": adaptor} if adaptor else {})}
        for name, classes in (("seen", self.seen), ("held-out", self.held_out)):
            yield Job(ROWS[f"zero-shot-{name}"], size, adaptor, {**options, "classes": classes})
        yield Job(ROWS["retrieval"], size, adaptor, options)

    def _maps(self, sizes: Sequence[int]) -> Iterator[Job]:
        for size in sizes:
            for row in ROWS.values():
                if row.of == "map":
                    yield Job(row, size, "", {"size": size})


def _knn(size: int, adaptor: str = "") -> Iterator[Job]:
    features = {"features": f"{adaptor}:summary"} if adaptor else {}
    yield Job(ROWS["knn"], size, adaptor, {"size": size, **features})


def _classified(size: int) -> Iterator[Job]:
    yield from _knn(size)
    yield Job(ROWS["linear"], size, "", {"size": size})


def _masks(size: int, adaptor: str = "") -> Iterator[Job]:
    options: dict[str, Any] = {"size": size, **({"adaptor": adaptor} if adaptor else {})}
    for row in ROWS.values():
        if row.of == "masks":
            yield Job(row, size, adaptor, options)


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
    return [
        Subject(PIXELS, PIXELS, "floor"),
        Subject(CONSTANT, "", "floor"),
        *(
            Subject(f"{setting.prefix}_{name}", f"{setting.prefix}_{name}", "teacher", name)
            for name in ADAPTORS
        ),
        Subject(STUDENT, student, STUDENT),
        *([Subject(CONTROL, control, CONTROL)] if control is not None else []),
        *(Subject(path.rsplit("/", 1)[-1], path, "curve") for path in checkpoints),
    ]
