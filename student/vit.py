"""The backbone: a pre-norm ViT whose state dict has NVIDIA's RADIO key names.

Upstream: NVlabs/RADIO `vit_patch_generator.py`, `cls_token.py`; timm's ViT blocks. No final norm.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from timm.layers import DropPath
from torch import Tensor, nn

from student.depth import checkpointed, drop_path_rates
from student.positions import eval_positions, train_positions
from student.token_merging import BlockMerging, unmerge
from student.windows import NUM_GLOBAL, check_window, through_windows, windowed_blocks

EPS = 1e-6
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The fused attention's backward is slow in bfloat16 on a CPU. Training a ViT-Ti on two cores, plain
# products against fused: 81 and 60 images/s at 72 tokens, 9.6 and 6.9 at 492; in float32 the two
# are about equal. Attention alone at 1032 tokens (float32): 256 ms plain, 160 ms fused.
PLAIN_ATTENTION_MAX_TOKENS = 512

RANGE_TOLERANCE = 1e-3  # resizing in low precision may leave [0, 1] by this much


@dataclass(frozen=True)
class VitShape:
    """Channels, blocks, attention heads and the MLP's hidden channels."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int


SIZES = {
    "tiny": VitShape(192, 12, 3, 768),
    "small": VitShape(384, 12, 6, 1536),
    "base": VitShape(768, 12, 12, 3072),
    "large": VitShape(1024, 24, 16, 4096),
    "so400m": VitShape(1152, 27, 16, 4304),
    "huge": VitShape(1280, 32, 16, 5120),
}


@dataclass(frozen=True)
class VitOutput:
    """`cls` [B, num_cls, C], `registers` [B, num_registers, C], `features` [B, C, h/p, w/p]."""

    cls: Float[Tensor, "batch cls width"]
    registers: Float[Tensor, "batch registers width"]
    features: Float[Tensor, "batch width rows columns"]


def attention(
    query: Float[Tensor, "batch heads tokens head"],
    key: Float[Tensor, "batch heads keys head"],
    value: Float[Tensor, "batch heads keys head"],
    key_bias: Tensor | None = None,
) -> Float[Tensor, "batch heads tokens head"]:
    """Return softmax(q k^T / sqrt(head) + key_bias) v, by whichever way is faster here."""
    is_short_on_cpu = query.device.type == "cpu" and key.shape[2] <= PLAIN_ATTENTION_MAX_TOKENS
    if not (torch.is_grad_enabled() and is_short_on_cpu):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=key_bias)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if key_bias is not None:
        logits = logits + key_bias
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


class InputConditioner(nn.Module):
    """Pixels in [0, 1] (or uint8) to normalised pixels, in float32."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> None:
        super().__init__()
        self.register_buffer("norm_mean", torch.tensor(list(mean)).view(3, 1, 1))
        self.register_buffer("norm_std", torch.tensor(list(std)).view(3, 1, 1))

    def forward(
        self, images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 h w"]:
        """Normalise; ValueError for floats outside [0, 1].

        The range is looked at on the CPU only: elsewhere it would stop the queue at every batch.
        """
        if images.dtype == torch.uint8:
            pixels = images.float() / 255
        else:
            pixels = images.float()
            if images.device.type == "cpu" and not torch.compiler.is_compiling():
                _check_range(pixels)
        return (pixels - self.norm_mean.float()) / self.norm_std.float()


def _check_range(pixels: Tensor) -> None:
    if pixels.numel() == 0:
        return
    low, high = (float(bound) for bound in pixels.detach().aminmax())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"The pixels lie in [{low:.3g}, {high:.3g}], expected uint8 or floats in [0, 1]; "
            "the student normalises them itself, so pass them as they were decoded."
        )


class PrefixTokens(nn.Module):
    """The learned CLS rows, then the registers; `token` [num_cls + num_registers, C]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(count, width) * width**-0.5)


class PatchGenerator(nn.Module):
    """Images to tokens: linear patches, cropped positions, then the prefix in front."""

    def __init__(self, width: int, patch_size: int, side: int, num_prefix: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embedder = nn.Linear(3 * patch_size**2, width, bias=False)
        self.pos_embed = nn.Parameter(torch.randn(1, side * side, width) * width**-0.5)
        self.cls_token = PrefixTokens(num_prefix, width)

    def patchify(
        self, images: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch patches pixels"]:
        """Cut into patches, row by row; a patch's pixels are ordered (channel, y, x)."""
        batch, channels, height, width = images.shape
        p = self.patch_size
        cut = images.reshape(batch, channels, height // p, p, width // p, p)
        cut = cut.permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(batch, (height // p) * (width // p), channels * p * p)

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch tokens width"]:
        """Return prefix and patches; a random viewport per sample when training."""
        batch, _, height, width = images.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        patches = self.embedder(self.patchify(images).to(self.embedder.weight.dtype))
        if self.training:
            positions = train_positions(self.pos_embed, rows, columns, batch)
        else:
            positions = eval_positions(self.pos_embed, rows, columns)
        patches = patches + positions
        prefix = self.cls_token.token.to(patches.dtype).expand(batch, -1, -1)
        return torch.cat([prefix, patches], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with one Linear for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        merging: BlockMerging | None = None,
        num_windows: int = 1,
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "parts heads each head"]]:
        """Return the attended tokens and the keys (token merging's metric).

        Each of `num_windows` equal parts of the sequence attends to itself alone.
        """
        batch, count, width = tokens.shape
        parts, each = batch * num_windows, count // num_windows
        qkv = self.qkv(tokens).reshape(parts, each, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if merging is None else merging.key_bias(query.dtype)
        mixed = attention(query, key, value, bias)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width)), key


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply to each token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class LayerScale(nn.Module):
    """A learned factor per channel, `gamma` [C].

    Recipe: LayerScale; CaiT (2103.17239); student.layer_scale;
    tests/test_student.py::test_a_timm_vit_goes_in_exactly.
    """

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Scale each channel."""
        return tokens * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), merge when asked, x + mlp(norm(x)).

    `drop_path` is the chance that a sample skips a branch in training (timm's DropPath).
    """

    def __init__(self, shape: VitShape, layer_scale: float | None, drop_path: float = 0.0) -> None:
        super().__init__()
        width = shape.width
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, shape.heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, shape.mlp_hidden)
        self.ls1: nn.Module = nn.Identity()
        self.ls2: nn.Module = nn.Identity()
        if layer_scale is not None:
            self.ls1 = LayerScale(width, layer_scale)
            self.ls2 = LayerScale(width, layer_scale)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        merging: BlockMerging | None = None,
        num_windows: int = 1,
    ) -> Float[Tensor, "batch after width"]:
        """Return the tokens after the block, fewer when merging."""
        attended, keys = self.attn(self.norm1(tokens), merging, num_windows)
        tokens = tokens + self.drop_path1(self.ls1(attended))
        if merging is not None:
            tokens = merging.step(tokens, keys)
        out: Tensor = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        return out


class VisionTransformer(nn.Module):
    """A ViT for images of any size that is a multiple of the patch; no final norm.

    `image_size` is the side in px of the square that the position table covers. `drop_path` is the
    last block's rate of stochastic depth; `checkpointing` computes the blocks again in the backward
    instead of keeping their activations; `num_windowed` and `num_global` say which blocks attend
    within windows when the forward is given a window (student/windows.py).
    """

    def __init__(
        self,
        shape: VitShape,
        *,
        patch_size: int = 16,
        image_size: int = 512,
        num_cls: int = 3,
        num_registers: int = 5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        num_windowed: int | None = None,
        num_global: int = NUM_GLOBAL,
    ) -> None:
        super().__init__()
        if shape.width % shape.heads:
            raise ValueError(f"Width {shape.width} cannot be split among {shape.heads} heads.")
        check_side(image_size, patch_size)
        self.shape = shape
        self.width = shape.width
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_cls = num_cls
        self.num_registers = num_registers
        self.checkpointing = checkpointing
        self.is_windowed = windowed_blocks(shape.depth, num_windowed, num_global)
        self.input_conditioner = InputConditioner()
        self.patch_generator = PatchGenerator(
            shape.width, patch_size, image_size // patch_size, num_cls + num_registers
        )
        self.blocks = nn.ModuleList(
            Block(shape, layer_scale, rate) for rate in drop_path_rates(drop_path, shape.depth)
        )
        self.apply(init_linear)

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"],
        merge_per_block: int = 0,
        window: int | None = None,
    ) -> VitOutput:
        """Encode uint8 images, or floats in [0, 1].

        `merge_per_block` patch tokens merge in every block; the features come back on the full
        grid. With `window` (patches a side) most blocks attend within windows. ValueError for
        sizes that are no multiple of the patch or the window, and for both options at once.
        """
        for side in images.shape[-2:]:
            check_side(side, self.patch_size)
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        if window is not None:
            check_window(window, (rows, columns), self.patch_size, merge_per_block)
        tokens = self.patch_generator(self.input_conditioner(images))
        if window is not None:
            blocks = [functools.partial(self._run_window, block) for block in self.blocks]
            tokens = through_windows(blocks, self.is_windowed, tokens, (rows, columns), window)
        else:
            tokens = self._through_blocks(tokens, merge_per_block)
        num_prefix = self.num_cls + self.num_registers
        return VitOutput(
            tokens[:, : self.num_cls],
            tokens[:, self.num_cls : num_prefix],
            tokens[:, num_prefix:].transpose(1, 2).unflatten(2, (rows, columns)),
        )

    def _through_blocks(
        self, tokens: Float[Tensor, "batch tokens width"], merge_per_block: int
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after all blocks; patches that merged on the way are copied back."""
        batch, count, _ = tokens.shape
        num_prefix = self.num_cls + self.num_registers
        merging = None
        if merge_per_block:
            merging = BlockMerging(
                batch, count - num_prefix, num_prefix, merge_per_block, tokens.device
            )
        for block in self.blocks:
            tokens, merging = self._run(block, tokens, merging)
        if merging is None:
            return tokens
        patches = unmerge(tokens[:, num_prefix:], merging.assignment)
        return torch.cat([tokens[:, :num_prefix], patches], dim=1)

    def _run(
        self,
        block: nn.Module,
        tokens: Float[Tensor, "batch tokens width"],
        merging: BlockMerging | None,
        num_windows: int = 1,
    ) -> tuple[Float[Tensor, "batch after width"], BlockMerging | None]:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpointed(block, tokens, merging, num_windows)
        return block(tokens, merging, num_windows), merging

    def _run_window(self, block: nn.Module, tokens: Tensor, num_windows: int) -> Tensor:
        return self._run(block, tokens, None, num_windows)[0]


def check_side(side: int, patch_size: int) -> None:
    """Refuse (ValueError) a side in px that is no multiple of the patch, naming the nearest."""
    if side >= patch_size and side % patch_size == 0:
        return
    below = side // patch_size * patch_size
    nearest = f"{below} and {below + patch_size}" if below else str(patch_size)
    raise ValueError(
        f"A side of {side} px is no multiple of the patch of {patch_size} px; "
        f"the nearest that fit: {nearest}."
    )


def init_linear(module: nn.Module) -> None:
    """Initialise a Linear as ViT does: weights from a truncated normal of 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
