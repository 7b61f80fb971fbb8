"""The model card of an encoder folder."""

from __future__ import annotations

from typing import Any

from radio.training.checkpoint import Checkpoint

CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [radio, feature-extraction, distillation]
---
# RADIO encoder

One ViT distilled from {names} by radio-distill: {width} channels, {depth} blocks, patch
{patch}, {step} steps{views}.

| teacher | kind | weights | summary | features | fingerprint |
|---|---|---|---|---|---|
{rows}

The licence of these weights follows from the teachers' weights and the pictures, whose terms the
person who trained it must state.

## Use

```python
from transformers import AutoModel            # the backbone, no remote code
model = AutoModel.from_pretrained("this-folder")
output = model(pixel_values)                  # [B, 3, H, W] in [0, 1]; sides multiples of {patch}
output.summary, output.features               # [B, {summary}], [B, T, {width}]

import radio                                  # with the teachers' heads
encoder = radio.load("this-folder")
encoder.encode(["photo.jpg"], features=("summary", {examples}))
```

    radio encode photos/ -o features/ -m this-folder --features summary
"""


def model_card(source: Checkpoint, config: dict[str, Any]) -> str:
    """Return the README.md of the folder."""
    teachers = source.config.teachers
    rows = "\n".join(
        f"| {name} | {block['kind']} | {teachers[name].pretrained or 'seeded, not trained'} "
        f"| {block['summary_dim'] or '-'} | {block['feature_dim']} "
        f"| `{block['fingerprint'][:12]}` |"
        for name, block in config["adaptors"].items()
    )
    with_summary = [name for name, block in config["adaptors"].items() if block["summary_dim"]]
    names = list(config["adaptors"])
    examples = [f'"{with_summary[0]}:summary"'] if with_summary else []
    examples.append(f'"{names[-1]}:features"')
    per_step = sum(part.batch for part in source.config.stages[-1].partitions.values())
    return CARD.format(
        names=", ".join(names),
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        patch=config["patch_size"],
        step=source.step,
        views=f" of {per_step} views" if len(source.config.stages) == 1 else "",
        rows=rows,
        summary=config["hidden_size"] * len(config["summary_idxs"]),
        examples=", ".join(examples),
    )
