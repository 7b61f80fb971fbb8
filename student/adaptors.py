"""The heads between the student's tokens and a teacher's; NVIDIA's MLP version 2."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from student.vit import init_linear


class MlpAdaptor(nn.Module):
    """fc1, `depth - 2` residual blocks of (LayerNorm, GELU, Linear), then the same as `final`.

    Depth counts the Linears. Upstream: NVlabs/RADIO `adaptor_mlp.py`, MLP2, with its key names.
    ValueError for a depth under 2. `hidden_dim` None means `in_dim`.
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
