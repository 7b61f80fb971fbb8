"""Frozen vision models that a student learns from, one module per kind."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from teachers.base import Teacher, TeacherOutput, count_running

__all__ = ["Teacher", "TeacherOutput", "build_teacher", "count_running", "kinds"]

_NOT_KINDS = {
    "base",
    "open_clip_tower",
    "open_clip_trunk",
    "pocket",
    "text",
    "transformers_trunk",
    "weights",
}


def kinds() -> list[str]:
    """Return the teacher kinds that this package holds, sorted."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(found - _NOT_KINDS)


def build_teacher(
    kind: str, name: str, options: dict[str, Any], pretrained: str | None, seed: int
) -> Teacher:
    """Build the teacher `name` of a kind: frozen, in eval mode, float32.

    `pretrained` is a local checkpoint in the upstream layout or a tag to download; None draws
    the weights from `seed`. Raises ValueError for an unknown kind, option or checkpoint.
    """
    if kind not in kinds():
        raise ValueError(
            f"teacher '{name}': unknown kind '{kind}'; known kinds: {', '.join(kinds())}"
        )
    module = importlib.import_module(f"teachers.{kind}")
    try:
        inspect.signature(module.build).bind(name, pretrained, seed, **options)
    except TypeError as error:
        raise ValueError(
            f"teacher '{name}' of kind '{kind}': options {sorted(options)} do not fit "
            f"({error}); see teachers/{kind}.py for the options of its build()"
        ) from error
    teacher = module.build(name, pretrained, seed, **options)
    assert isinstance(teacher, Teacher)
    return teacher.prepared(kind, options)
