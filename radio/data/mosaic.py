"""Several low-resolution views on one canvas of a fixed-size teacher (RADIOv2.5, 2412.07679).

k x k views share one pass of a SAM-like teacher, whose features are then cut into the views' own
windows; nothing is interpolated. Since a window's place decides what the teacher saw around it,
positions are fixed: view i lies on canvas i // k^2, in raster order.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


class Mosaic:
    """Place square views on square canvases and split the canvases' features again.

    k = canvas_px // view_px tiles lie along a side, as far apart as whole strides allow, each
    view in its tile's top left corner and zero around it.

    Args:
        canvas_px: side of the canvas in pixels, a multiple of `stride`.
        view_px: side of a view in pixels, a multiple of `stride`, at most the canvas.
        stride: pixels per feature of the teacher.
        per_side: tiles along a side; as many as fit if not given.

    Raises:
        ValueError: a size that does not fit, with the nearest that do.

    Recipe: tiles a whole number of strides apart; NVIDIA-TAO/tao-pytorch
    nvidia_tao_pytorch/multimodal/radio/distillation/loss.py; stages[].partitions.*.views.*=mosaic;
    tests/test_mosaic.py::test_each_view_gets_the_features_of_its_own_pixels.
    """

    def __init__(
        self, canvas_px: int, view_px: int, stride: int, per_side: int | None = None
    ) -> None:
        if stride < 1:
            raise ValueError(f"the stride is {stride} px; expected 1 or more")
        if canvas_px < stride or canvas_px % stride:
            raise ValueError(
                f"a canvas of {canvas_px} px is no multiple of the stride {stride}; the nearest "
                f"that are: {_multiples_around(canvas_px, stride, None)}"
            )
        if not 0 < view_px <= canvas_px or view_px % stride:
            raise ValueError(
                f"views of {view_px} px do not fit a canvas of {canvas_px} px in steps of "
                f"{stride}; the nearest that do: {_multiples_around(view_px, stride, canvas_px)}"
            )
        self.canvas_px = canvas_px
        self.view_px = view_px
        self.stride = stride
        most = canvas_px // view_px
        self.per_side = most if per_side is None else per_side
        if not 1 <= self.per_side <= most:
            raise ValueError(
                f"{self.per_side} views of {view_px} px do not lie along {canvas_px} px; "
                f"1 to {most} do"
            )
        # A tile's corner must lie on the feature grid, so the pitch is whole strides.
        self.pitch = canvas_px // stride // self.per_side * stride

    @property
    def views_per_canvas(self) -> int:
        """Views on a full canvas, k * k."""
        return self.per_side**2

    def num_canvases(self, num_views: int) -> int:
        """Return how many canvases hold `num_views`; the last may be partial."""
        return -(-num_views // self.views_per_canvas)

    def corner(self, index: int) -> tuple[int, int, int]:
        """Return (canvas, top, left) in pixels of the view number `index`, in raster order."""
        canvas, tile = divmod(index, self.views_per_canvas)
        row, column = divmod(tile, self.per_side)
        return canvas, row * self.pitch, column * self.pitch

    def place(
        self, views: Float[Tensor, "b c view view"]
    ) -> Float[Tensor, "canvases c canvas canvas"]:
        """Return canvases with each (already normalised) view in its tile's top left, else zero.

        Raises:
            ValueError: views of another size.
        """
        if views.shape[-1] != self.view_px:
            raise ValueError(f"views are {views.shape[-1]} px, this mosaic takes {self.view_px} px")
        shape = (self.num_canvases(len(views)), views.shape[1], self.canvas_px, self.canvas_px)
        canvases = views.new_zeros(shape)
        for index, view in enumerate(views):
            canvas, top, left = self.corner(index)
            canvases[canvas, :, top : top + self.view_px, left : left + self.view_px] = view
        return canvases

    def split(
        self, features: Float[Tensor, "canvases d rows columns"], num_views: int
    ) -> Float[Tensor, "b d window window"]:
        """Return each view's own window of its canvas's features.

        Raises:
            ValueError: a grid that is not the canvas's, or canvases for another number of views.
        """
        side = self.canvas_px // self.stride
        found = tuple(features.shape[-2:])
        if found != (side, side):
            raise ValueError(
                f"features have the grid {found}, a canvas of {self.canvas_px} px has "
                f"{(side, side)}"
            )
        if self.num_canvases(num_views) != len(features):
            raise ValueError(
                f"{num_views} views lie on {self.num_canvases(num_views)} canvases, not "
                f"{len(features)}"
            )
        size = self.view_px // self.stride
        windows = features.new_empty((num_views, features.shape[1], size, size))
        for index in range(num_views):
            canvas, top, left = self.corner(index)
            row, column = top // self.stride, left // self.stride
            windows[index] = features[canvas, :, row : row + size, column : column + size]
        return windows


def _multiples_around(size: int, stride: int, most: int | None) -> str:
    """Name the multiples of the stride just below and above a size, from one stride to `most`."""
    below = max(size // stride, 1) * stride
    nearest = {below, below + stride if size > below else below}
    if most is not None:
        nearest = {min(candidate, most) for candidate in nearest}
    return ", ".join(map(str, sorted(nearest)))
