"""Several low-resolution views on one canvas of a fixed-size teacher (RADIOv2.5, 2412.07679).

k x k views share one pass of a SAM-like teacher, whose features are then cut into the views' own
windows; nothing is interpolated.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Mosaic:
    """Place square views on square canvases and split the canvases' features again.

    Args:
        canvas_px: side of the canvas in pixels, a multiple of `stride`.
        view_px: side of a view in pixels, a multiple of `stride`, at most the canvas.
        stride: pixels per feature of the teacher.

    Raises:
        ValueError: a size that does not fit, with the nearest that do.
    """

    def __init__(self, canvas_px: int, view_px: int, stride: int) -> None:
        if canvas_px < stride or canvas_px % stride:
            raise ValueError(f"canvas {canvas_px} px is no multiple of the stride {stride}")
        if not 0 < view_px <= canvas_px or view_px % stride:
            low = min(max(view_px // stride, 1) * stride, canvas_px)
            nearest = sorted({low, min(low + stride, canvas_px)})
            raise ValueError(
                f"views of {view_px} px do not fit a canvas of {canvas_px} px in steps of "
                f"{stride}; the nearest that do: {', '.join(map(str, nearest))}"
            )
        self.canvas_px = canvas_px
        self.view_px = view_px
        self.stride = stride
        self.per_side = canvas_px // view_px
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

    def place(self, views: Float[Tensor, "b c v v"]) -> Float[Tensor, "m c s s"]:
        """Return canvases with each (already normalised) view in its tile's top left, else zero."""
        if views.shape[-1] != self.view_px:
            raise ValueError(f"views are {views.shape[-1]} px, this mosaic takes {self.view_px} px")
        shape = (self.num_canvases(len(views)), views.shape[1], self.canvas_px, self.canvas_px)
        canvases = views.new_zeros(shape)
        for index, view in enumerate(views):
            canvas, top, left = self.corner(index)
            canvases[canvas, :, top : top + self.view_px, left : left + self.view_px] = view
        return canvases

    def split(self, features: Float[Tensor, "m d s s"], num_views: int) -> Float[Tensor, "b d v v"]:
        """Return each view's own window of its canvas's features."""
        side = self.canvas_px // self.stride
        if tuple(features.shape[-2:]) != (side, side):
            found = tuple(features.shape[-2:])
            raise ValueError(f"features have the grid {found}, this canvas has {(side, side)}")
        if self.num_canvases(num_views) != len(features):
            raise ValueError(f"{len(features)} canvases cannot hold exactly {num_views} views")
        size = self.view_px // self.stride
        windows = []
        for index in range(num_views):
            canvas, top, left = self.corner(index)
            row, column = top // self.stride, left // self.stride
            windows.append(features[canvas, :, row : row + size, column : column + size])
        return torch.stack(windows)
