"""The model card of an encoder folder."""

from __future__ import annotations

from typing import Any

from radio.encoder.weights import TeacherHeads, TrunkWeights, Weights

CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
license: other
tags: [radio, feature-extraction, distillation]
---
# RADIO encoder

{body}. Origin: {origin}.

| teacher | kind | weights | summary | features | CLS row | licence of its weights | fingerprint |
|---|---|---|---|---|---|---|---|
{rows}
{notes}
The terms of these weights follow from those of the teachers' weights and of the pictures that
they were distilled on; state them before you publish this folder.

## Use

{pixels} are multiples of {patch}.

```python
{alone}
```
```python
import radio                                  # 2: with the teachers' heads
encoder = radio.load("this-folder")
encoder.encode(["photo.jpg"], features=({examples}))
```
```sh
radio encode photos/ -o features/ -m this-folder --features summary   # 3: folders into parquet
```
"""

VIT = {
    "body": """\
One ViT that gives the features of {names}: {width} channels, {depth} blocks, patch {patch}, a
position table for {table} x {table} px, {cls} CLS rows and {registers} registers""",
    "pixels": "Pixels are in [0, 1] (the model normalises them itself); sides",
    "alone": """\
from transformers import AutoModel            # 1: the backbone, without our package
model = AutoModel.from_pretrained("this-folder")
output = model(pixel_values)                  # [B, 3, H, W]
output.summary, output.features               # [B, {summary}], [B, T, {width}]""",
}
TRUNK = {
    "body": """\
One timm trunk, {architecture}, that gives the features of {names}: {width} channels, stride
{patch}, and {cls} CLS rows, each pooled from all tokens; side by side they are the summary""",
    "pixels": """\
Pixels are in [0, 1] for `radio.load`; for transformers its image processor normalises them, and
`last_hidden_state` is what timm's `forward_features` gives; sides""",
    "alone": """\
from transformers import AutoImageProcessor, AutoModel   # 1: the trunk, without our package
processor = AutoImageProcessor.from_pretrained("this-folder")
model = AutoModel.from_pretrained("this-folder")
output = model(processor(picture)["pixel_values"])   # PIL to {size} x {size} px
output.last_hidden_state""",
}

ALIGNED = """
The position table was trained under `align_corners=True`; `radio.load` does the same, while
transformers' RadioModel always resizes with `False`, so that its values differ a little.
"""


def model_card(weights: Weights) -> str:
    """Return the README.md of the folder."""
    teachers = weights.teachers
    parts, facts = _described(weights)
    facts |= {
        "names": ", ".join(teachers) or "its teachers (no heads are in this folder)",
        "cls": weights.num_cls,
        "summary": facts["width"] * len(weights.summary_rows),
    }
    names = [f"{name}:{kind}" for name, teacher in teachers.items() for kind in teacher.states]
    origin = ", ".join(f"{key} {value}" for key, value in weights.origin.items())
    return CARD.format(
        **{name: text.format(**facts) for name, text in parts.items()},
        patch=facts["patch"],
        origin=origin or "not stated",
        rows="\n".join(_row(name, teacher) for name, teacher in teachers.items()),
        notes=_notes(weights),
        examples=", ".join(f'"{name}"' for name in ["summary", *names[:2]]) + ",",
    )


def _described(weights: Weights) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what the card says of this kind of backbone, and the facts that go into it."""
    if isinstance(weights, TrunkWeights):
        trunk = weights.trunk
        facts = {"architecture": trunk.name, "width": trunk.width, "patch": trunk.patch_size}
        return TRUNK, {**facts, "size": weights.image_size}
    return VIT, {
        "width": weights.shape.width,
        "depth": weights.shape.depth,
        "patch": weights.patch_size,
        "table": weights.table_size,
        "registers": weights.num_registers,
    }


def _row(name: str, teacher: TeacherHeads) -> str:
    facts: dict[str, Any] = {"kind": "-", "fingerprint": "-", **teacher.facts}
    dims = {kind: str(teacher.dim(kind)) for kind in teacher.states}
    cells = (
        name,
        facts["kind"],
        _trained(facts),
        dims.get("summary", "-"),
        dims.get("features", "-"),
        "-" if teacher.cls_row is None else teacher.cls_row,
        facts.get("weights_licence", "not stated"),
        f"`{facts['fingerprint'][:12]}`",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _trained(facts: dict[str, Any]) -> str:
    """Return the upstream model, where the options name it, and its weights."""
    if "pretrained" in facts and facts["pretrained"] is None:
        return "seeded, not trained"
    named = (facts.get("options", facts).get("model"), facts.get("pretrained"))
    return ", ".join(str(part) for part in named if part) or "not stated"


def _notes(weights: Weights) -> str:
    lines = [
        f"The head {name}:{kind} is left out: {why}."
        for name, teacher in weights.teachers.items()
        for kind, why in teacher.left_out.items()
    ]
    text = "\n".join(["", *lines, ""]) if lines else ""
    return text + (ALIGNED if weights.align_corners else "")
