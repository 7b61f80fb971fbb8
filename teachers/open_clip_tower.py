"""Building an open_clip model, whole for its text tower or the visual tower alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from teachers.base import redraw_constants, seeded
from teachers.weights import load_state, load_strictly, local_file, require_hub

MODELS = Path(__file__).parent / "open_clip_models"
VISUAL = "visual."


def register_models() -> None:
    """Make the JSON models next to this module known to open_clip by their file names."""
    open_clip.add_model_config(MODELS)


def build_whole(
    name: str, model: str, image_size: int | None, pretrained: str | None, seed: int
) -> tuple[Any, Path | None]:
    """Return both towers, and the local file that is still to be loaded into them.

    Raises ValueError for an unknown model, or a tag that it does not have or that is offline.
    """
    register_models()
    if model not in open_clip.list_models():
        own = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
        raise ValueError(
            f"teacher '{name}': open_clip has no model '{model}'; "
            f"choose one of open_clip.list_models() or of this package: {own}"
        )
    path = None if pretrained is None else local_file(name, pretrained)
    tag = pretrained if path is None else None
    if tag is not None:
        if tag not in open_clip.list_pretrained_tags_by_model(model):
            known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise ValueError(
                f"teacher '{name}': '{model}' has no weights '{tag}'; tags: {known}; "
                "a local file's path may be given instead"
            )
        require_hub(name, tag, f"the open_clip weights '{tag}' of '{model}'")
    with seeded(seed), _without_warnings():
        whole = open_clip.create_model(
            model,
            pretrained=tag,
            force_image_size=image_size,
            device=torch.get_default_device(),
        )
    return whole, path


def build_visual(
    name: str, model: str, image_size: int | None, pretrained: str | None, seed: int
) -> tuple[nn.Module, int]:
    """Return the visual tower and its side in px.

    Raises ValueError for an unknown model, a checkpoint of another one, or a tag when offline.
    """
    whole, path = build_whole(name, model, image_size, pretrained, seed)
    visual = whole.visual
    assert isinstance(visual, nn.Module)
    if path is not None:
        state = load_state(path)
        towers = {k.removeprefix(VISUAL): v for k, v in state.items() if k.startswith(VISUAL)}
        load_strictly(name, visual, towers, str(path))
    elif pretrained is None:
        redraw_constants(visual, seed)
    side = visual.image_size
    assert isinstance(side, tuple)
    return visual, int(side[0])


@contextmanager
def _without_warnings() -> Iterator[None]:
    # open_clip warns on the root logger whenever it is not the one to load the weights.
    root = logging.getLogger()
    root.addFilter(_is_error)
    try:
        yield
    finally:
        root.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
