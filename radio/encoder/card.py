"""The model card of an encoder folder."""

from __future__ import annotations

from typing import Any

from radio.encoder.weights import EncoderWeights, TeacherHeads

CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
license: other
tags: [radio, feature-extraction, distillation]
---
# RADIO encoder

One ViT that gives the features of {names}: {width} channels, {depth} blocks, patch {patch}, a
position table for {table} x {table} px, {cls} CLS rows and {registers} registers. Origin: {origin}.

| teacher | kind | weights | summary | features | CLS row | licence of its weights | fingerprint |
|---|---|---|---|---|---|---|---|
{rows}
{notes}
The terms of these weights follow from those of the teachers' weights and of the pictures that
they were distilled on; state them before you publish this folder.

## Use

Pixels are in [0, 1] (the model normalises them itself); sides are multiples of {patch}.

```python
from transformers import AutoModel            # 1: the backbone, without our package
model = AutoModel.from_pretrained("this-folder")
output = model(pixel_values)                  # [B, 3, H, W]
output.summary, output.features               # [B, {summary}], [B, T, {width}]
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

ALIGNED = """
The position table was trained under `align_corners=True`; `radio.load` does the same, while
transformers' RadioModel always resizes with `False`, so that its values differ a little.
"""


def model_card(weights: EncoderWeights) -> str:
    """Return the README.md of the folder."""
    shape, teachers = weights.shape, weights.teachers
    names = [f"{name}:{kind}" for name, teacher in teachers.items() for kind in teacher.states]
    origin = ", ".join(f"{key} {value}" for key, value in weights.origin.items())
    return CARD.format(
        names=", ".join(teachers) or "its teachers (no heads are in this folder)",
        width=shape.width,
        depth=shape.depth,
        patch=weights.patch_size,
        table=weights.table_size,
        cls=weights.num_cls,
        registers=weights.num_registers,
        origin=origin or "not stated",
        rows="\n".join(_row(name, teacher) for name, teacher in teachers.items()),
        notes=_notes(weights),
        summary=shape.width * len(weights.summary_rows),
        examples=", ".join(f'"{name}"' for name in ["summary", *names[:2]]) + ",",
    )


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


def _notes(weights: EncoderWeights) -> str:
    lines = [
        f"The head {name}:{kind} is left out: {why}."
        for name, teacher in weights.teachers.items()
        for kind, why in teacher.left_out.items()
    ]
    text = "\n".join(["", *lines, ""]) if lines else ""
    return text + (ALIGNED if weights.align_corners else "")
