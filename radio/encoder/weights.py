"""An encoder's weights in our names, and the modules that they fill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio.encoder.layout import last_linear
from radio.errors import RadioError
from student.adaptors import AttentionAdaptor, MlpAdaptor
from student.positions import eval_positions
from student.radio_layout import State
from student.timm_trunk import TimmTrunk
from student.vit import SIZES, PatchGenerator, VisionTransformer, VitShape
from student.windows import NUM_GLOBAL

HEADS = ("summary", "features")
# NVIDIA's files do not say the number of attention heads; timm's ViTs of these widths have these.
HEADS_OF_WIDTH = {**{shape.width: shape.heads for shape in SIZES.values()}, 1408: 16, 1536: 24}


@dataclass(frozen=True)
class TeacherHeads:
    """One teacher's heads: MlpAdaptor (or AttentionAdaptor) states by "summary" and "features".

    `cls_row` is the CLS row that the summary head reads; `left_out` says of each head that the
    file has but no adaptor can hold why; `facts` go into config.json as they are. The features'
    head makes `upsample` x `upsample` positions of each patch.
    """

    cls_row: int | None
    states: dict[str, State]
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    upsample: int = 1

    def dim(self, kind: str) -> int:
        """Return the channels that the head "summary" or "features" gives."""
        state = self.states[kind]
        outputs = len(state[f"{last_linear(state)}.weight"])
        return outputs // self.upsample**2 if kind == "features" else outputs


@dataclass(frozen=True)
class EncoderWeights:
    """All that an encoder on our ViT is: backbone state (LayerScale folded), heads, how to read it.

    `align_corners` is that of the position table's resize in eval: True for NVIDIA's old files.
    `num_windowed` and `num_global` say which blocks attend within windows, when windows are asked
    for (student/windows.py).
    """

    backbone: State
    num_heads: int
    num_cls: int
    summary_rows: tuple[int, ...]
    teachers: dict[str, TeacherHeads] = field(default_factory=dict)
    align_corners: bool = False
    image_size: int = 512  # px, what the preprocessor resizes to
    origin: dict[str, Any] = field(default_factory=dict)
    num_windowed: int | None = None
    num_global: int = NUM_GLOBAL

    @property
    def shape(self) -> VitShape:
        """The ViT's shape, read off the tensors."""
        hidden, width = self._tensor("blocks.0.mlp.fc1.weight").shape
        depth = 1 + max(int(k.split(".")[1]) for k in self.backbone if k.startswith("blocks."))
        return VitShape(width, depth, self.num_heads, hidden)

    @property
    def patch_size(self) -> int:
        """Pixels per token and side."""
        return math.isqrt(self._tensor("patch_generator.embedder.weight").shape[1] // 3)

    @property
    def table_size(self) -> int:
        """Side in px of the square that the position table covers."""
        return math.isqrt(self._tensor("patch_generator.pos_embed").shape[1]) * self.patch_size

    @property
    def num_registers(self) -> int:
        """Prefix tokens that are no CLS rows."""
        return len(self._tensor("patch_generator.cls_token.token")) - self.num_cls

    def _tensor(self, key: str) -> Tensor:
        if key not in self.backbone:
            raise RadioError(f"these are no RADIO weights: '{key}' is missing")
        return self.backbone[key]


@dataclass(frozen=True)
class TrunkWeights:
    """The same of an encoder on a timm trunk, which knows its own stride, width and CLS rows.

    Its rows are the summary, in order; it has neither registers nor a position table of ours.
    """

    trunk: TimmTrunk
    teachers: dict[str, TeacherHeads]
    image_size: int  # px
    origin: dict[str, Any]
    align_corners: ClassVar[bool] = False

    @property
    def num_cls(self) -> int:
        """Rows that the trunk's pooling gives."""
        return self.trunk.num_cls

    @property
    def num_registers(self) -> int:
        """None: 0."""
        return self.trunk.num_registers

    @property
    def summary_rows(self) -> tuple[int, ...]:
        """All rows."""
        return tuple(range(self.trunk.num_cls))


Weights = EncoderWeights | TrunkWeights


def heads_of_width(width: int) -> int:
    """Return the attention heads of the usual ViT of a width."""
    if width not in HEADS_OF_WIDTH:
        known = ", ".join(map(str, sorted(HEADS_OF_WIDTH)))
        raise RadioError(f"no usual ViT is {width} wide, so its heads are unknown; known: {known}")
    return HEADS_OF_WIDTH[width]


class AlignedPatchGenerator(PatchGenerator):
    """The patch generator of NVIDIA's old files, which resized the table with aligned corners."""

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch tokens width"]:
        """Return prefix and patches, as in eval."""
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        patches = self.embedder(self.patchify(images).to(self.embedder.weight.dtype))
        patches = patches + eval_positions(self.pos_embed, rows, columns, align_corners=True)
        prefix = self.cls_token.token.to(patches.dtype).expand(len(images), -1, -1)
        return torch.cat([prefix, patches], dim=1)


def build_backbone(weights: Weights) -> VisionTransformer | TimmTrunk:
    """Build the backbone and load it strictly; its tensors are those of `weights`.

    Raises:
        RadioError: keys are missing, too many, or of other shapes; a summary reads a row that is
            no CLS row.
    """
    _check_rows(weights)
    return weights.trunk if isinstance(weights, TrunkWeights) else _build_vit(weights)


def _build_vit(weights: EncoderWeights) -> VisionTransformer:
    with torch.device("meta"):  # nothing is initialised only to be thrown away
        backbone = VisionTransformer(
            weights.shape,
            patch_size=weights.patch_size,
            image_size=weights.table_size,
            num_cls=weights.num_cls,
            num_registers=weights.num_registers,
            num_windowed=weights.num_windowed,
            num_global=weights.num_global,
        )
        if weights.align_corners:
            backbone.patch_generator = AlignedPatchGenerator(
                backbone.width,
                backbone.patch_size,
                backbone.image_size // backbone.patch_size,
                backbone.num_cls + backbone.num_registers,
            )
    _fill(backbone, weights.backbone, "the backbone")
    return backbone


def filled_trunk(name: str, patch_size: int, num_cls: int, state: State) -> TimmTrunk:
    """Return a timm trunk, frozen, with a TimmTrunk's state dict copied into it, strictly.

    Raises:
        RadioError: no such timm model, or the weights of another.
    """
    try:
        # On the CPU: buffers that are in no file are computed as it is built.
        with torch.random.fork_rng(devices=[]):
            trunk = TimmTrunk(name, patch_size=patch_size, num_cls=num_cls)
    except ValueError as error:
        raise RadioError(f"the trunk cannot be built: {error}") from error
    _fill(trunk, state, f"the trunk, timm's {name}", assign=False)
    return trunk


def _check_rows(weights: Weights) -> None:
    """Refuse rows beyond the CLS rows: they would be read off registers or patches."""
    rows = {"summary": weights.summary_rows}
    for name, teacher in weights.teachers.items():
        if "summary" in teacher.states:
            rows[f"{name}:summary"] = (-1 if teacher.cls_row is None else teacher.cls_row,)
    for name, found in rows.items():
        if weights.num_registers < 0 or not all(0 <= row < weights.num_cls for row in found):
            raise RadioError(
                f"'{name}' reads the CLS rows {list(found)}, but the weights have "
                f"{weights.num_cls + weights.num_registers} prefix tokens, of which "
                f"{weights.num_cls} are said to be CLS rows"
            )


def build_heads(teachers: Mapping[str, TeacherHeads]) -> nn.ModuleDict:
    """Build every teacher's heads: ModuleDict teacher -> ModuleDict "summary" | "features"."""
    heads = nn.ModuleDict()
    for name, teacher in teachers.items():
        heads[name] = nn.ModuleDict(
            {kind: _build_head(f"{name}:{kind}", s) for kind, s in teacher.states.items()}
        )
    return heads


def _build_head(name: str, state: State) -> MlpAdaptor | AttentionAdaptor:
    last = last_linear(state)
    start = last.removesuffix("final.2")
    for key in (f"{start}fc1.weight", f"{last}.weight"):
        if key not in state:
            raise RadioError(f"the head {name} is not whole: '{key}' is missing")
    hidden, width = state[f"{start}fc1.weight"].shape
    out = len(state[f"{last}.weight"])
    depth = 2 + len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    head: MlpAdaptor | AttentionAdaptor
    with torch.device("meta"):
        if start:
            head = AttentionAdaptor(width, out, hidden)
        else:
            head = MlpAdaptor(width, out, hidden, depth)
    _fill(head, state, f"the head {name}")
    return head


def _fill(module: nn.Module, state: State, what: str, assign: bool = True) -> None:
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch's is a page
        raise RadioError(f"the weights do not fit {what}: {reason}") from error
    module.requires_grad_(False)
    module.eval()
