"""A seeded projection instead of a model, for tests: any dims, any stride, almost no cost."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import HALF, Teacher, TeacherOutput, seeded


class FakeTeacher(Teacher):
    """Patches through two random projections; the mean token is added so that all pixels count."""

    def __init__(
        self,
        name: str,
        summary_dim: int | None,
        feature_dim: int,
        stride: int,
        native_size: int,
        view_modes: Sequence[str],
    ) -> None:
        super().__init__(
            name,
            stride=stride,
            native_size=native_size,
            view_modes=view_modes,
            summary_dim=summary_dim,
            feature_dim=feature_dim,
            mean=HALF,
            std=HALF,
        )
        self.takes_any_size = True
        hidden = 32
        self.patch = nn.Conv2d(3, hidden, stride, stride)
        nn.init.normal_(self.patch.weight, std=(3 * stride * stride) ** -0.25)
        self.mix = nn.Conv2d(hidden, feature_dim, 1)
        self.summary = None if summary_dim is None else nn.Linear(hidden, summary_dim)

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return projections of the mean token and of every token plus the mean token."""
        tokens = self.patch(pixels).tanh()
        mean = tokens.mean((2, 3))
        summary = None if self.summary is None else self.summary(mean)
        return TeacherOutput(summary, self.mix(tokens + mean[:, :, None, None]))


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    summary_dim: int | None,
    feature_dim: int,
    stride: int,
    native_size: int,
    view_modes: Sequence[str],
) -> FakeTeacher:
    """Draw a projection teacher; ValueError when weights are asked for."""
    if pretrained is not None:
        raise ValueError(f"teacher '{name}': kind 'fake' has no weights; set pretrained to null")
    with seeded(seed):
        return FakeTeacher(name, summary_dim, feature_dim, stride, native_size, view_modes)
