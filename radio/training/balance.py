"""How the losses of several teachers are weighed against each other.

A loss is named `<teacher>/<what>`, and multiplied beforehand by whatever weight the user set. The
weights from here carry no gradient and have mean 1, so that a learning rate means the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from radio.targets.angles import wide

# No running mean counts as less, so that a loss that has reached 0 has a finite weight.
SMALLEST_MEAN = 1e-6


@runtime_checkable
class Balance(Protocol):
    """Weights for losses by name; all that it remembers is in `state_dict`.

    `per_view` says what it looks at: the losses [b] of the views of one partition, or those of the
    whole step, one number each.
    """

    per_view: ClassVar[bool]

    def weights(
        self, losses: Mapping[str, Float[Tensor, "*views"]], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "*views"]]:
        """Return for every loss what to multiply it by, of the loss's shape.

        Args:
            losses: [b] by name, the same views in each, or [] by name (see `per_view`).
            generator: what the step's random choices are drawn from; seed it by the step.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved state back; what follows is then equal bit for bit."""
        ...


class _Stateless:
    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but was given {sorted(state)}.")


class Fixed(_Stateless):
    """1 for every loss: the user's own weights (AM-RADIO 2312.06709, section 3).

    Recipe: weights set by hand; AM-RADIO (2312.06709) section 3; losses.balance=fixed,
    teachers.*.summary_weight, teachers.*.feature_weight;
    tests/test_balance.py::test_fixed_weighs_nothing.
    """

    per_view: ClassVar[bool] = False

    def weights(
        self, losses: Mapping[str, Float[Tensor, "*views"]], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "*views"]]:
        """Return ones."""
        return {name: torch.ones_like(wide(loss.detach())) for name, loss in losses.items()}


class AdaLoss:
    """w_n = (1 / m_n) / mean(1 / m), m_n the running mean of loss n (AdaLoss 1708.06832).

    AM-RADIO (2312.06709) tried it. Every weighted loss then has the same mean. m is bias-corrected
    and takes the current loss in before it is used: at the first step there is nothing else to
    divide by, and an outlier weighs itself down. A loss that joins later starts its own mean. No
    gradient passes through m.

    Recipe: AdaLoss; AdaLoss (1708.06832); losses.balance=ada_loss, losses.balance_options;
    tests/test_balance.py::test_ada_loss_follows_its_oracle.
    """

    per_view: ClassVar[bool] = False

    def __init__(self, momentum: float = 0.99) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and less than 1.")
        self.momentum = momentum
        self._means: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def weights(
        self, losses: Mapping[str, Float[Tensor, "*views"]], generator: torch.Generator
    ) -> dict[str, Float[Tensor, "*views"]]:
        """Take the losses into their means and return the weights."""
        for name, loss in losses.items():
            self._take_in(name, wide(loss.detach()).mean())
        inverse = {name: 1 / self._means[name].clamp_min(SMALLEST_MEAN) for name in losses}
        centre = torch.stack(list(inverse.values())).mean()
        return {name: (inverse[name] / centre).expand(loss.shape) for name, loss in losses.items()}

    def _take_in(self, name: str, loss: Float[Tensor, ""]) -> None:
        """m <- m + (1 - beta) / (1 - beta^t) (loss - m): the bias-corrected mean itself."""
        count = self._counts.get(name, 0) + 1
        share = (1 - self.momentum) / (1 - self.momentum**count)
        mean = self._means.get(name, loss).to(loss)
        self._means[name], self._counts[name] = torch.lerp(mean, loss, share), count

    def state_dict(self) -> dict[str, Tensor]:
        """Return `<loss>|mean` and `<loss>|count`."""
        means = {f"{name}|mean": mean for name, mean in self._means.items()}
        return means | {f"{name}|count": torch.tensor(n) for name, n in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved state back; what follows is then equal bit for bit."""
        slots = {tuple(key.rsplit("|", 1)): value for key, value in state.items()}
        self._means = {name: value for (name, slot), value in slots.items() if slot == "mean"}
        self._counts = {
            name: int(value) for (name, slot), value in slots.items() if slot == "count"
        }


class TeacherDropping(_Stateless):
    """Of each view drop each teacher with probability p, but never that with the largest loss.

    UNIC (2408.05088), `keep_teachers`. A teacher's losses are summed, and kept or dropped together.

    Recipe: teacher dropping; UNIC (2408.05088); losses.balance=teacher_dropping,
    losses.balance_options; tests/test_balance.py::test_kept_teachers_follow_their_oracle.
    """

    per_view: ClassVar[bool] = True

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}; it must be between 0 and 1.")
        self.probability = probability

    def weights(
        self, losses: Mapping[str, Float[Tensor, " b"]], generator: torch.Generator
    ) -> dict[str, Float[Tensor, " b"]]:
        """Return each view's coefficients, the same for all losses of a teacher."""
        totals: dict[str, Tensor] = {}
        for name, loss in losses.items():
            teacher, value = _teacher_of(name), wide(loss.detach())
            totals[teacher] = totals[teacher] + value if teacher in totals else value
        kept = keep_teachers(torch.stack(list(totals.values())), self.probability, generator)
        rows = dict(zip(totals, kept, strict=True))
        return {name: rows[_teacher_of(name)] for name in losses}


def keep_teachers(
    losses: Float[Tensor, "teachers b"], probability: float, generator: torch.Generator
) -> Float[Tensor, "teachers b"]:
    """Return c / mean(c), c = 1 for a view's largest loss, else 1 - Bernoulli(p) (UNIC 2408.05088).

    The mean is over all teachers and views, as in naver/unic `aggregate_losses`: the sum over
    teachers of mean-over-views losses is then their number times UNIC's loss.
    """
    draws = torch.rand(losses.shape, generator=generator, device=generator.device)
    kept = (draws >= probability).to(losses.device)
    largest = torch.zeros_like(kept).scatter(0, losses.argmax(0, keepdim=True), True)
    coefficients = (kept | largest).to(losses.dtype)
    return coefficients / coefficients.mean()


def _teacher_of(name: str) -> str:
    return name.split("/", 1)[0]


BALANCES: dict[str, Callable[..., Balance]] = {
    "fixed": Fixed,
    "ada_loss": AdaLoss,
    "teacher_dropping": TeacherDropping,
}
