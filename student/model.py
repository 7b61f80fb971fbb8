"""The student: one backbone, and for each teacher a head on a CLS row and one on the patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from student.adaptors import MlpAdaptor, feature_adaptor, upsampled
from student.spectral import spectral_reparametrise
from student.timm_trunk import TimmTrunk, build_trunk
from student.vit import SIZES, VisionTransformer, VitOutput
from student.warm_start import warm_start
from student.windows import NUM_GLOBAL

Value = TypeVar("Value", int, str)

REGISTER_MULTIPLE = 8  # CLS rows and registers together; keeps sequences aligned, as NVIDIA does


@dataclass(frozen=True)
class TeacherDims:
    """Channels of a teacher's summary (None: it has none, and gets no CLS row) and features."""

    summary_dim: int | None
    feature_dim: int


@dataclass(frozen=True)
class StudentOutput:
    """One teacher's prediction: `summary` [B, c] or None, `features` [B, d, u h/p, u w/p].

    u is the upsampling of the teacher's adaptor, 1 unless asked for.
    """

    summary: Float[Tensor, "batch c"] | None
    features: Float[Tensor, "batch d rows columns"]


class TeacherAdaptor(nn.Module):
    """One teacher's two heads; `cls_row` is the CLS row that its summary is read from."""

    summary: MlpAdaptor | None

    def __init__(
        self,
        width: int,
        dims: TeacherDims,
        cls_row: int | None,
        hidden: int | None,
        depth: int,
        kind: str = "mlp",
        upsample: int = 1,
    ) -> None:
        super().__init__()
        if upsample < 1:
            raise ValueError(f"upsample is {upsample}, expected 1 (off) or more.")
        if (cls_row is None) != (dims.summary_dim is None):
            raise ValueError(f"CLS row {cls_row} does not go with summary_dim {dims.summary_dim}.")
        self.cls_row = cls_row
        self.upsample = upsample
        self.summary = (
            None if dims.summary_dim is None else MlpAdaptor(width, dims.summary_dim, hidden, depth)
        )
        self.features = feature_adaptor(kind, width, dims.feature_dim * upsample**2, hidden, depth)

    def forward(self, output: VitOutput) -> StudentOutput:
        """Predict the teacher's (standardized) summary and features from the backbone's tokens."""
        features = self.features(output.features.permute(0, 2, 3, 1))
        features = upsampled(features, self.upsample).permute(0, 3, 1, 2)
        if self.summary is None or self.cls_row is None:
            return StudentOutput(None, features)
        return StudentOutput(self.summary(output.cls[:, self.cls_row]), features)


class Student(nn.Module):
    """A backbone and its teachers' heads; CLS row i belongs to the i-th teacher with a summary.

    `adaptor_kind` (mlp or attention) and `upsample` of the feature adaptors are one value for all
    teachers, or values by name (mlp and 1 for a teacher that is not named).

    Recipe: a CLS row for each teacher with a summary; AM-RADIO (2312.06709);
    teachers.*.summary_weight;
    tests/test_student.py::test_every_teacher_gets_its_shapes_and_its_own_cls_row.
    """

    def __init__(
        self,
        backbone: VisionTransformer | TimmTrunk,
        dims: Mapping[str, TeacherDims],
        adaptor_hidden: int | None = None,
        adaptor_depth: int = 2,
        adaptor_kind: str | Mapping[str, str] = "mlp",
        upsample: int | Mapping[str, int] = 1,
    ) -> None:
        super().__init__()
        with_summary = [name for name, dim in dims.items() if dim.summary_dim is not None]
        if len(with_summary) > backbone.num_cls:
            raise ValueError(
                f"{len(with_summary)} teachers have a summary ({', '.join(with_summary)}) but the "
                f"backbone has {backbone.num_cls} CLS rows; build it with one for each."
            )
        self.backbone = backbone
        self.adaptors = nn.ModuleDict()
        kinds = by_teacher("adaptor_kind", adaptor_kind, dims, "mlp")
        factors = by_teacher("upsample", upsample, dims, 1)
        for name, dim in dims.items():
            row = with_summary.index(name) if name in with_summary else None
            self.adaptors[name] = TeacherAdaptor(
                backbone.width,
                dim,
                row,
                adaptor_hidden,
                adaptor_depth,
                kinds[name],
                factors[name],
            )

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"],
        merge_per_block: int = 0,
        window: int | None = None,
    ) -> dict[str, StudentOutput]:
        """Return every teacher's prediction for uint8 images or floats in [0, 1]."""
        return self.predict(self.backbone(images, merge_per_block, window))

    def predict(self, output: VitOutput) -> dict[str, StudentOutput]:
        """Return every teacher's prediction from the backbone's tokens.

        Recipe: projection before any resize or shift; NVIDIA-TAO/tao-pytorch; always;
        tests/test_recipe.py::test_the_student_projects_before_anything_is_resized.
        """
        return {name: adaptor(output) for name, adaptor in self.adaptors.items()}


def by_teacher(
    option: str, value: Value | Mapping[str, Value], teachers: Iterable[str], default: Value
) -> dict[str, Value]:
    """Return each teacher's value of an option; ValueError for a name that is no teacher's."""
    names = list(teachers)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ValueError(
            f"{option} names {', '.join(unknown)}, which is no teacher; known: {', '.join(names)}."
        )
    return {name: value.get(name, default) for name in names}


def num_registers_for(num_cls: int) -> int:
    """Return the registers that fill up to a multiple of 8; 8 when the CLS rows do already.

    That is NVIDIA's rule (`register_multiple`), which other readers of the weights count by.

    Recipe: registers up to a multiple; NVlabs/RADIO radio/cls_token.py; always;
    tests/test_student.py::test_registers_fill_up_to_eight.
    """
    return REGISTER_MULTIPLE - num_cls % REGISTER_MULTIPLE


def refuse_for_timm(backbone: str, layer_scale: float | None, num_windowed: int | None) -> None:
    """Refuse (ValueError) what a timm backbone would not follow, rather than leave it out."""
    options = {"layer_scale": layer_scale, "num_windowed": num_windowed}
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"student.{option} is {value} and student.backbone {backbone!r}; it is our own "
                f"ViT's: set student.{option} or student.backbone to null."
            )


def build_student(
    *,
    size: str,
    patch_size: int,
    image_size: int,
    dims: Mapping[str, TeacherDims],
    adaptor_hidden: int | None = None,
    adaptor_depth: int = 2,
    layer_scale: float | None = None,
    init: str | None = None,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    spectral: bool = False,
    num_windowed: int | None = None,
    num_global: int = NUM_GLOBAL,
    adaptor_kind: str | Mapping[str, str] = "mlp",
    upsample: int | Mapping[str, int] = 1,
    backbone: str | None = None,
) -> Student:
    """Build a student of a named size, or on any timm model where `backbone` names one.

    `init` is what the backbone starts from (the adaptors are always new): an encoder folder,
    NVIDIA's `.pth.tar`, a timm ViT's name or weight file (see warm_start); of a timm `backbone`
    its weight file, or "pretrained" (see build_trunk). A timm `backbone` has no use for `size`,
    `image_size` and `num_global`.
    ValueError for an unknown size, naming the known ones, and for an option that the backbone
    cannot follow.
    """
    num_cls = max(1, sum(dim.summary_dim is not None for dim in dims.values()))
    shared: dict[str, Any] = {
        "patch_size": patch_size,
        "num_cls": num_cls,
        "drop_path": drop_path,
        "checkpointing": checkpointing,
    }
    body: VisionTransformer | TimmTrunk
    if backbone is not None:
        refuse_for_timm(backbone, layer_scale, num_windowed)
        body = build_trunk(backbone, init, **shared)
    elif size not in SIZES:
        raise ValueError(f"Student size {size!r} is unknown; known: {', '.join(SIZES)}.")
    else:
        body = VisionTransformer(
            SIZES[size],
            image_size=image_size,
            num_registers=num_registers_for(num_cls),
            layer_scale=layer_scale,
            num_windowed=num_windowed,
            num_global=num_global,
            **shared,
        )
        if init is not None:
            warm_start(body, init)
    student = Student(body, dims, adaptor_hidden, adaptor_depth, adaptor_kind, upsample)
    if spectral:
        spectral_reparametrise(student)  # last: it starts from the weights that are there
    return student
