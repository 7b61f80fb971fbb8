"""The student: one backbone, and for each teacher a head on a CLS row and one on the patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from student.adaptors import MlpAdaptor
from student.timm_backbone import load_timm
from student.vit import SIZES, VisionTransformer, VitOutput

REGISTER_MULTIPLE = 8  # CLS rows and registers together; keeps sequences aligned, as NVIDIA does


@dataclass(frozen=True)
class TeacherDims:
    """Channels of a teacher's summary (None: it has none, and gets no CLS row) and features."""

    summary_dim: int | None
    feature_dim: int


@dataclass(frozen=True)
class StudentOutput:
    """One teacher's prediction: `summary` [B, c] or None, `features` [B, d, h/p, w/p]."""

    summary: Float[Tensor, "batch c"] | None
    features: Float[Tensor, "batch d rows columns"]


class TeacherAdaptor(nn.Module):
    """One teacher's two heads; `cls_row` is the CLS row that its summary is read from."""

    summary: MlpAdaptor | None

    def __init__(
        self, width: int, dims: TeacherDims, cls_row: int | None, hidden: int | None, depth: int
    ) -> None:
        super().__init__()
        if (cls_row is None) != (dims.summary_dim is None):
            raise ValueError(f"CLS row {cls_row} does not go with summary_dim {dims.summary_dim}.")
        self.cls_row = cls_row
        self.summary = (
            None if dims.summary_dim is None else MlpAdaptor(width, dims.summary_dim, hidden, depth)
        )
        self.features = MlpAdaptor(width, dims.feature_dim, hidden, depth)

    def forward(self, output: VitOutput) -> StudentOutput:
        """Predict the teacher's (standardized) summary and features from the backbone's tokens."""
        features = self.features(output.features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.summary is None or self.cls_row is None:
            return StudentOutput(None, features)
        return StudentOutput(self.summary(output.cls[:, self.cls_row]), features)


class Student(nn.Module):
    """A backbone and its teachers' heads; CLS row i belongs to the i-th teacher with a summary."""

    def __init__(
        self,
        backbone: VisionTransformer,
        dims: Mapping[str, TeacherDims],
        adaptor_hidden: int | None = None,
        adaptor_depth: int = 2,
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
        for name, dim in dims.items():
            row = with_summary.index(name) if name in with_summary else None
            self.adaptors[name] = TeacherAdaptor(
                backbone.width, dim, row, adaptor_hidden, adaptor_depth
            )

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"],
        merge_per_block: int = 0,
    ) -> dict[str, StudentOutput]:
        """Return every teacher's prediction for uint8 images or floats in [0, 1]."""
        output = self.backbone(images, merge_per_block)
        return {name: adaptor(output) for name, adaptor in self.adaptors.items()}


def num_registers_for(num_cls: int) -> int:
    """Return the registers that fill up to a multiple of 8; 8 when the CLS rows do already.

    That is NVIDIA's rule (`register_multiple`), which other readers of the weights count by.
    """
    return REGISTER_MULTIPLE - num_cls % REGISTER_MULTIPLE


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
) -> Student:
    """Build a student of a named size; `init` is a timm ViT's name or weight file, or None.

    ValueError for an unknown size, naming the known ones.
    """
    if size not in SIZES:
        raise ValueError(f"Student size {size!r} is unknown; known: {', '.join(SIZES)}.")
    num_cls = max(1, sum(dim.summary_dim is not None for dim in dims.values()))
    backbone = VisionTransformer(
        SIZES[size],
        patch_size=patch_size,
        image_size=image_size,
        num_cls=num_cls,
        num_registers=num_registers_for(num_cls),
        layer_scale=layer_scale,
    )
    if init is not None:
        load_timm(backbone, init)
    return Student(backbone, dims, adaptor_hidden, adaptor_depth)
