"""Cropped position embeddings (CPE): one square table serves every resolution and shape.

Upstream: NVlabs/RADIO `vit_patch_generator.py`. The table [1, N*N, C] covers the largest square.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MIN_SCALE = math.sqrt(0.1)  # a viewport covers 10 % to 100 % of the table's area
LOG_ASPECT = math.log(4 / 3)  # and is stretched by 3/4 to 4/3


def as_image(table: Float[Tensor, "1 cells width"]) -> Float[Tensor, "1 width side side"]:
    """Return the flat table as a square image; ValueError when its cells form no square."""
    cells = table.shape[1]
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(
            f"The position table has {cells} cells, expected a square number; "
            f"{side * side} and {(side + 1) ** 2} are the nearest."
        )
    return table.reshape(1, side, side, -1).permute(0, 3, 1, 2)


def eval_positions(
    table: Float[Tensor, "1 cells width"], height: int, width: int, *, align_corners: bool = False
) -> Float[Tensor, "1 patches width"]:
    """Return the positions of a `height` x `width` grid of patches, the same for every image.

    The table is resized bilinearly to a square of the longer side, in float32, then its top left
    is cut out. NVIDIA's checkpoints before v3's fix of June 2025 want `align_corners=True`.

    Recipe: CPE in use, the resized table's top left; NVlabs/RADIO radio/vit_patch_generator.py;
    student.image_size;
    tests/test_positions.py::test_eval_is_bilinear_to_the_longer_side_then_the_top_left.
    """
    image = as_image(table)
    if (height, width) == tuple(image.shape[-2:]):
        return table
    side = max(height, width)
    resized = F.interpolate(
        image.float(), size=(side, side), mode="bilinear", align_corners=align_corners
    )
    return resized[..., :height, :width].flatten(2).transpose(1, 2).to(table.dtype)


def random_viewports(
    batch: int, device: torch.device | None = None
) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch 2"]]:
    """Draw (extent, offset) as (x, y) fractions of the table from torch's global generator.

    Drawn on the CPU, so that a seed gives the same viewports on every device.
    """
    scale = torch.empty(batch).uniform_(MIN_SCALE, 1.0)
    aspect = torch.empty(batch).uniform_(-LOG_ASPECT, LOG_ASPECT).exp()
    extent = torch.stack([scale * aspect, scale / aspect], dim=1).clamp(0.0, 1.0)
    offset = torch.rand(batch, 2) * (1.0 - extent)
    return extent.to(device), offset.to(device)


def sample_positions(
    table: Float[Tensor, "1 cells width"],
    height: int,
    width: int,
    extent: Float[Tensor, "batch 2"],
    offset: Float[Tensor, "batch 2"],
) -> Float[Tensor, "batch patches width"]:
    """Return the table seen through one viewport per sample, corners aligned, in float32."""
    image = as_image(table).float()
    batch = extent.shape[0]
    x = torch.linspace(0, 1, width, device=table.device)[None] * extent[:, :1] + offset[:, :1]
    y = torch.linspace(0, 1, height, device=table.device)[None] * extent[:, 1:] + offset[:, 1:]
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
    )
    sampled = F.grid_sample(
        image.expand(batch, -1, -1, -1),
        grid * 2 - 1,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    return sampled.flatten(2).transpose(1, 2).to(table.dtype)


def train_positions(
    table: Float[Tensor, "1 cells width"], height: int, width: int, batch: int
) -> Float[Tensor, "rows patches width"]:
    """Return every sample's positions through a random viewport of its own.

    A grid as large as the table takes it as it is (one row, for all samples), as upstream does.

    Recipe: CPE in training, a random viewport of the table; NVlabs/RADIO
    radio/vit_patch_generator.py; student.image_size;
    tests/test_positions.py::test_a_viewport_of_a_ramp_shows_its_own_coordinates.
    """
    if height == width and height * width == table.shape[1]:
        return table
    extent, offset = random_viewports(batch, table.device)
    return sample_positions(table, height, width, extent, offset)
