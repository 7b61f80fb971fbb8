"""The recipe's page refuses what is not there; and ingredients that no other file tests."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from radio.config import Config, OptimizerConfig
from radio.data.plan import PartitionSpec
from radio.errors import RadioError
from radio.targets.grid import to_grid
from radio.targets.stream import Target
from radio.targets.view_modes import VIEW_MODES, Shown
from radio.training.optim import build_optimizer
from radio.training.step import feature_losses
from student.model import Student, TeacherDims
from student.vit import VisionTransformer, VitOutput, VitShape
from teachers import build_teacher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
recipe = importlib.import_module("recipe")

TEST = "tests/test_codec.py::test_bf16_rounds_ties_to_even"
GOOD = f"drop path; Stochastic depth (1603.09382); student.drop_path; {TEST}."
BROKEN = [  # instead of a part of GOOD, and what is said of it
    (" student.drop_path;", "", "has not the four parts of a recipe's line"),
    ("Stochastic depth (1603.09382);", "a blog;", "'a blog' is no source"),
    ("(1603.09382);", "(1603.09382) p. 3;", "'Stochastic depth (1603.09382) p. 3' is no source"),
    ("(1603.09382);", "(1603.09381);", "'1603.09381' is not among PAPERS"),
    ("Stochastic depth", "Dropout", "1603.09382 is 'Stochastic depth', not 'Dropout'"),
    (" student.drop_path;", " student.drop;", "radio.config has no key student.drop"),
    (" student.drop_path;", " losses[].feature;", "radio.config has no key losses[].feature"),
    (" student.drop_path;", " stages.refit;", "radio.config has no key stages.refit"),
    (" student.drop_path;", " seed.more;", "radio.config has no key seed.more"),
    (" student.drop_path;", " student.drop_path=0.1;", "student.drop_path has no registry"),
    (
        " student.drop_path;",
        " losses.feature=l2;",
        "losses.feature has no row l2; huber, smooth_l1",
    ),
    (" student.drop_path;", " always, a.b;", "radio.config has no key a.b"),
    (" student.drop_path;", " encode(merge);", "no function encode takes an argument merge"),
    ("::test_bf16", "::test_fp16", "tests/test_codec.py has no test_fp16_rounds"),
    ("test_codec.py", "test_morse.py", "there is no tests/test_morse.py"),
    ("::test_bf16", ":test_bf16", "'tests/test_codec.py:test_bf16_rounds_ties_to_even' is no"),
]
CHANGES = {  # of other files
    "radio/training/losses.py": ('"mse": mse_loss', '"huber": mse_loss'),
    "student/adaptors.py": ('KINDS = ("mlp",', 'KINDS = ("conv", "mlp",'),
    "student/windows.py": ("Recipe: windowed attention;", "The Recipe: windowed attention;"),
    "configs/experiment/phi_s_b.yaml": ("name: lamb", "name: lion"),
}
UNSAID = [
    "losses.feature=huber has no 'Recipe:' line in any docstring",
    "losses.feature has no row mse; huber, smooth_l1",
    "student.adaptor_kind=conv has no 'Recipe:' line in any docstring",
    "student/windows.py: a 'Recipe:' does not begin a line of a docstring",
    "optimizer.name=lion has no 'Recipe:' line in any docstring",
]


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of all that the page is made of, with every mistake at once."""
    root = tmp_path_factory.mktemp("recipe")
    for folder in (*recipe.PACKAGES, "tests", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    entries = [GOOD, *(GOOD.replace(old, new) for old, new, _ in BROKEN)]
    lines = "\n".join(f"Recipe: {entry}" for entry in entries)
    changed(root / "student/depth.py", '"""Depth in training:', f'"""{lines}\n\nDepth in training:')
    for file, (old, new) in CHANGES.items():
        changed(root / file, old, new)
    return root


@pytest.fixture(scope="module")
def refusal(copy: Path) -> str:
    with pytest.raises(RadioError) as refused:
        recipe.table(copy)
    return str(refused.value)


@pytest.mark.parametrize("says", [*(says for _, _, says in BROKEN), *UNSAID])
def test_a_line_that_says_what_is_not_so_is_refused(refusal: str, says: str) -> None:
    assert says in refusal


def test_each_mistake_is_said_once_and_nothing_else(refusal: str) -> None:
    assert sum(line.startswith("student/depth.py: ") for line in refusal.splitlines()) == len(
        BROKEN
    )


def test_a_registry_that_moved_is_named(copy: Path) -> None:
    changed(copy / "radio/targets/grid.py", "GRIDS = ", "OTHER = ")
    with pytest.raises(RadioError, match=r"grid\.py has no registry GRIDS"):
        recipe.registries(copy)


def test_a_line_may_be_wrapped_anywhere_and_lie_beside_others(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    line = "Recipe: two words; ours; always,\n student.damp; tests/a.py::test_b."
    text = f'"""A module.\n\n{line}\n"""\n\n\nclass A:\n    def b(self) -> None:\n        """C.\n\n'
    text += "        Recipe: one; ours; always; tests/a.py::test_b\n        Recipe: other; ours;\n"
    text += '        always; tests/a.py::test_c\n        """\n'
    (folder / "a.py").write_text(text)
    rows, wrong = recipe.read(tmp_path)
    assert not wrong
    assert [(row.ingredient, row.where) for row in rows] == [
        ("two words", "student/a.py"),
        ("one", "student/a.py: A.b"),
        ("other", "student/a.py: A.b"),
    ]
    assert rows[0].keys == ("always", "student.damp")
    assert [row.test for row in rows] == [f"tests/a.py::test_{name}" for name in "bbc"]


def test_papers_come_in_their_order_and_our_own_last() -> None:
    rows = sorted(recipe.read(ROOT)[0], key=recipe._order)
    sources = list(dict.fromkeys(row.source.split(" (")[0].split(" ")[0] for row in rows))
    assert sources[:4] == ["AM-RADIO", "PHI-S", "RADIOv2.5", "FeatSharp"]
    assert sources[-1] == "ours"
    assert {recipe._line(row).count(" | ") for row in rows} == {5}


# --- optimizers ---------------------------------------------------------------------------------

LR, DECAY, BETAS = 0.1, 0.5, (0.9, 0.999)
Arrays = dict[str, np.ndarray]


class Weights(nn.Module):
    """A matrix that decays, and a vector and a table that do not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(6, 5)
        self.pos_embed = nn.Parameter(torch.empty(1, 5, 4))
        for weight in self.parameters():
            nn.init.normal_(weight, generator=generator)


def moments(
    gradients: list[np.ndarray], eps: float, betas: tuple[float, float] = BETAS
) -> np.ndarray:
    """Return Adam's direction after these gradients."""
    first = second = np.zeros_like(gradients[0])
    for gradient in gradients:
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
    count = len(gradients)
    return first / (1 - betas[0] ** count) / (np.sqrt(second / (1 - betas[1] ** count)) + eps)


def adamw(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Decoupled decay (1711.05101)."""
    return weight - LR * decay * weight - LR * moments(gradients, 1e-8)


def lamb(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """The step is as long as the weight times the rate (1904.00962); timm's, only with a decay."""
    direction = moments(gradients, 1e-6) + decay * weight
    ratio = np.linalg.norm(weight) / np.linalg.norm(direction) if decay else 1.0
    return weight - LR * ratio * direction


# leloykun.github.io/ponder/muon-opt-coeffs, rounded as in KellerJordan/modded-nanogpt.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def muon(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Orthogonalised momentum at AdamW's length for matrices (2502.16982, 4), else AdamW.

    timm's momentum is an average.
    """
    if not decay:
        return weight - LR * moments(gradients, 1e-8, (0.9, 0.95))
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient
    update = momentum / np.linalg.norm(momentum)
    update = update.T if update.shape[0] > update.shape[1] else update
    for a, b, c in QUINTIC:
        gram = update @ update.T
        update = a * update + (b * gram + c * gram @ gram) @ update
    update = update if update.shape == weight.shape else update.T
    return weight * (1 - LR * decay) - LR * 0.2 * max(weight.shape) ** 0.5 * update


OPTIMIZERS: dict[str, Callable[[np.ndarray, list[np.ndarray], float], np.ndarray]] = {
    "adamw": adamw,
    "lamb": lamb,
    "muon": muon,
}


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS, *recipe.registries(ROOT)["optimizer.name"]}))
def test_the_recipes_optimizers_take_their_oracles_step(name: str) -> None:
    weights = Weights()
    optimizer = build_optimizer(weights, OptimizerConfig(name, lr=LR, weight_decay=DECAY))
    expected = {key: value.detach().double().numpy() for key, value in weights.named_parameters()}
    seen: dict[str, list[np.ndarray]] = {key: [] for key in expected}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for key, weight in weights.named_parameters():
            # Small, since timm's LAMB clips gradients whose norm is above 1.
            weight.grad = 0.05 * torch.randn(weight.shape, generator=generator)
            seen[key].append(weight.grad.double().numpy())
        optimizer.step()
        for key, weight in weights.named_parameters():
            decay = DECAY if key == "linear.weight" else 0.0
            expected[key] = OPTIMIZERS[name](expected[key], seen[key], decay)
            np.testing.assert_allclose(weight.detach().numpy(), expected[key], rtol=2e-5, atol=1e-6)


# --- native and match ---------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "stride"), [(1, 1, 7), (4, 4, 14), (3, 5, 32)])
def test_native_and_match_read_views_at_the_promised_size(
    rows: int, columns: int, stride: int
) -> None:
    options = {"summary_dim": None, "feature_dim": 2, "stride": stride, "native_size": 2 * stride}
    teacher = build_teacher("fake", "a", {**options, "view_modes": ["native", "match"]}, None, 0)
    shape = 16 * rows, 16 * columns
    partition = PartitionSpec("p", max(shape), (), {}, (), shape=shape)
    shown = Shown(teacher, partition, (rows, columns), teacher)
    for mode, grid in (("native", (2, 2)), ("match", (rows, columns))):
        size = VIEW_MODES[mode].size(shown)
        features = VIEW_MODES[mode].run(shown, torch.zeros(1, 3, *size)).features
        assert tuple(features.shape[-2:]) == grid


# --- project, then resize -----------------------------------------------------------------------


def gradient(loss: Tensor, tokens: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, tokens)
    return found.flatten()


def test_the_student_projects_before_anything_is_resized() -> None:
    """The step's gradient is that of resized projections, not of projected resized tokens."""
    torch.manual_seed(0)
    backbone = VisionTransformer(VitShape(16, 1, 2, 32), image_size=64)
    student = Student(backbone, {"a": TeacherDims(None, 6)})
    tokens = torch.randn(2, 16, 4, 4, requires_grad=True)
    output = VitOutput(torch.zeros(2, 3, 16), torch.zeros(2, 5, 16), tokens)
    target = Target(None, torch.randn(2, 6, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool))
    said = student.predict(output)["a"]
    assert said.features.shape == (2, 6, 4, 4), "projected on the student's own grid"
    loss, _ = feature_losses(said, target, (4, 4), Config(out="-"))
    head = student.adaptors["a"].features

    def project(maps: Tensor) -> Tensor:
        return head(maps.movedim(1, -1)).movedim(-1, 1)

    first = (to_grid(project(tokens), (2, 2)) - target.features).square().mean((1, 2, 3))
    last = (project(to_grid(tokens, (2, 2))) - target.features).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, first)
    found = gradient(loss.sum(), tokens)
    torch.testing.assert_close(found, gradient(first.sum(), tokens))
    other = gradient(last.sum(), tokens)
    assert torch.nn.functional.cosine_similarity(found, other, dim=0) < 0.95
