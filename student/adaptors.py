"""The heads between the student's tokens and a teacher's: NVIDIA's MLP version 2 and attention."""

from __future__ import annotations

import functools
from typing import cast

from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from student.vit import EPS, init_linear

KINDS = ("mlp", "attention")  # of a feature adaptor; a summary's is always an MLP
ATTENTION_HEADS = 16  # whatever the width, as upstream: a file does not say it
ATTENTION_BLOCKS = 2
ATTENTION_LAYER_SCALE = 1e-5


class MlpAdaptor(nn.Module):
    """fc1, `depth - 2` residual blocks of (LayerNorm, GELU, Linear), then the same as `final`.

    Depth counts the Linears. Upstream: NVlabs/RADIO `adaptor_mlp.py`, MLP2, with its key names.
    ValueError for a depth under 2. `hidden_dim` None means `in_dim`.

    Recipe: MLP adaptors; AM-RADIO (2312.06709) section 3.2; student.adaptor_kind=mlp,
    student.adaptor_depth, student.adaptor_hidden;
    tests/test_student.py::test_adaptors_keys_depth_and_arithmetic.
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int | None = None, depth: int = 2
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"An adaptor of depth {depth} does not exist; the least is 2.")
        hidden = in_dim if hidden_dim is None else hidden_dim
        self.fc1 = nn.Linear(in_dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(depth - 2)
        )
        last = nn.Linear(hidden, out_dim)
        self.final = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), last)
        self.apply(init_linear)

    @property
    def last(self) -> nn.Linear:
        """The last Linear, into which the inverse of a standardization can be folded."""
        layer = self.final[2]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, tokens: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch out"]:
        """Map each token to the teacher's channels."""
        hidden = self.fc1(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        out: Tensor = self.final(hidden)
        return out


class AttentionAdaptor(nn.Module):
    """Two pre-norm blocks of 16 heads, LayerScale from 1e-5, then an MLP of depth 2 as `mlp`.

    Upstream: NVlabs/RADIO `adaptor_attn.py`, AttnFDHead, with its key names (timm's block, no bias
    in qkv). ValueError for a width that 16 heads cannot share.

    Recipe: attention adaptors; NVlabs/RADIO radio/adaptor_attn.py; student.adaptor_kind=attention;
    tests/test_adaptors.py::test_an_attention_adaptor_is_upstreams.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        if in_dim % ATTENTION_HEADS:
            below = in_dim // ATTENTION_HEADS * ATTENTION_HEADS
            raise ValueError(
                f"An attention adaptor's {ATTENTION_HEADS} heads cannot share a width of {in_dim}; "
                f"the nearest that fit: {below} and {below + ATTENTION_HEADS}."
            )
        # timm's default was another once.
        norm = cast(type[nn.Module], functools.partial(nn.LayerNorm, eps=EPS))
        self.blocks = nn.Sequential(
            *(
                Block(in_dim, ATTENTION_HEADS, init_values=ATTENTION_LAYER_SCALE, norm_layer=norm)
                for _ in range(ATTENTION_BLOCKS)
            )
        )
        self.mlp = MlpAdaptor(in_dim, out_dim, hidden_dim)
        self.blocks.apply(init_linear)

    @property
    def last(self) -> nn.Linear:
        """The last Linear, into which the inverse of a standardization can be folded."""
        return self.mlp.last

    def forward(
        self, tokens: Float[Tensor, "batch *grid channels"]
    ) -> Float[Tensor, "batch *grid out"]:
        """Map the tokens of each picture, which see one another, to the teacher's channels."""
        out: Tensor = self.mlp(self.blocks(tokens.flatten(1, -2)))
        mapped: Tensor = out.unflatten(1, tokens.shape[1:-1])
        return mapped


def feature_adaptor(
    kind: str, in_dim: int, out_dim: int, hidden_dim: int | None, depth: int
) -> MlpAdaptor | AttentionAdaptor:
    """Build a feature adaptor of a kind; ValueError for an unknown one, naming the known.

    An attention adaptor's MLP has depth 2, whatever `depth` is.
    """
    if kind not in KINDS:
        raise ValueError(f"Adaptor kind {kind!r} is unknown; known: {', '.join(KINDS)}.")
    if kind == "attention":
        return AttentionAdaptor(in_dim, out_dim, hidden_dim)
    return MlpAdaptor(in_dim, out_dim, hidden_dim, depth)


def upsampled(
    tokens: Float[Tensor, "batch rows columns out"], factor: int
) -> Float[Tensor, "batch fine_rows fine_columns c"]:
    """Spread each token's (u1 u2 c) outputs over u x u positions: [B, h, w, uuc] to [B, hu, wu, c].

    Upstream: NVlabs/RADIO `adaptor_mlp.py`, MLP2's `upsample_factor`.

    Recipe: adaptors finer than the patches; NVlabs/RADIO radio/adaptor_mlp.py; teachers.*.upsample;
    tests/test_adaptors.py::test_upsampling_is_upstreams.
    """
    if factor == 1:
        return tokens
    cut = tokens.unflatten(3, (factor, factor, -1)).transpose(2, 3)
    fine: Tensor = cut.flatten(3, 4).flatten(1, 2)
    return fine
