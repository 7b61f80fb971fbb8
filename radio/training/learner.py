"""All that a training step changes, and that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from radio.config import Config
from radio.data.plan import seed_for
from radio.data.ranks import Ranks
from radio.errors import RadioError
from radio.targets.standardize import Standardizer
from radio.targets.target_maker import TeacherFacts
from radio.training.balance import BALANCES, Balance
from radio.training.compile import compile_student
from radio.training.optim import build_optimizer, load_optimizer, optimizer_tensors
from radio.training.parallel import like, spread, whole
from radio.training.predictor import Predictor
from radio.training.refit import refit_adaptor
from radio.training.regularise import Ema
from student.model import Student, TeacherAdaptor, TeacherDims, build_student

ALONE = Ranks()
Tensors = dict[str, dict[str, Tensor]]  # by the name of the checkpoint's file


class Learner:
    """The student, its optimizer, the balance of its losses and, where asked for, its average."""

    def __init__(
        self,
        config: Config,
        teachers: Mapping[str, TeacherFacts],
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.manual_seed(seed_for(config.seed, "student"))
        self.student = student_for(config, teachers).to(device)
        self.config, self.teachers, self.device, self.ranks = config, teachers, device, ranks
        if config.student.compile:
            compile_student(self.student, config)
        self.predict = spread(Predictor(self.student, config.seed), config.parallel.kind)
        self.optimizer = build_optimizer(self.student, config.optimizer)
        self.balance = build_balance(config)
        decay = config.optimizer.ema_decay
        self.ema = None if decay is None else Ema(self.student, decay)
        self.dispersions: dict[str, float] = {}  # by teacher, of the stage's fit; not learnt

    @property
    def result(self) -> Student:
        """What is evaluated and fused: the average where there is one, else the student."""
        return self.student if self.ema is None else cast(Student, self.ema.module)

    def whole_result(self) -> Student:
        """Return `result` in one piece; where processes hold parts of it, all must call this."""
        if self.config.parallel.kind != "fsdp":
            return self.result
        student = student_for(self.config, self.teachers, init=False)
        student.load_state_dict(self._weights())
        return student.to(self.device)

    def tensors(self) -> Tensors:
        """Return the state, one entry per file; those without a state are left out."""
        optimizer = optimizer_tensors(self.student, self.optimizer)
        tensors = {"model": self._weights(), "optimizer": optimizer}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if balance := self.balance.state_dict():
            tensors["balance"] = balance
        return tensors

    def _weights(self) -> dict[str, Tensor]:
        return {name: whole(tensor.detach()) for name, tensor in self.student.state_dict().items()}

    def load(self, tensors: Tensors) -> None:
        """Put a state back, strictly; what follows is then equal bit for bit."""
        parts = self.student.state_dict()
        model = {name: like(value, parts[name]) for name, value in tensors["model"].items()}
        self.student.load_state_dict(model)
        load_optimizer(self.student, self.optimizer, tensors["optimizer"])
        self.balance.load_state_dict(tensors.get("balance", {}))
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])

    def refit(self, name: str, before: Standardizer, after: Standardizer) -> None:
        """Follow a teacher's new standardizer: what is said in the teacher's space stays."""
        for student in (self.student,) if self.ema is None else (self.student, self.result):
            last = cast(TeacherAdaptor, student.adaptors[name]).features.last
            refit_adaptor(last, before, after, self.optimizer)


def build_balance(config: Config) -> Balance:
    """Return the balance that `losses.balance` names, with its options.

    Raises:
        RadioError: an unknown name or option.
    """
    wanted = config.losses.balance
    if wanted not in BALANCES:
        raise RadioError(f"losses.balance is '{wanted}'; known: {', '.join(BALANCES)}")
    try:
        return BALANCES[wanted](**config.losses.balance_options)
    except (TypeError, ValueError) as error:
        raise RadioError(f"losses.balance_options do not fit '{wanted}': {error}") from error


def student_for(config: Config, teachers: Mapping[str, TeacherFacts], init: bool = True) -> Student:
    """Build the student of a run: a CLS token per teacher whose summary is matched.

    Without `init` a warm start is not read, since the weights are about to be replaced.

    Raises:
        RadioError: options that contradict each other, or a start that does not fit.
    """
    dims = {
        name: TeacherDims(
            facts.summary_dim if config.teachers[name].summary_weight else None, facts.feature_dim
        )
        for name, facts in teachers.items()
    }
    try:
        return _built(config, dims, init)
    except (ValueError, FileNotFoundError) as error:
        raise RadioError(f"student: {error}") from error


def _built(config: Config, dims: Mapping[str, TeacherDims], init: bool) -> Student:
    return build_student(
        size=config.student.size,
        patch_size=config.student.patch_size,
        image_size=config.student.image_size,
        dims=dims,
        adaptor_hidden=config.student.adaptor_hidden,
        adaptor_depth=config.student.adaptor_depth,
        layer_scale=config.student.layer_scale,
        init=config.student.init if init else None,
        backbone=config.student.backbone,
        adaptor_kind=config.student.adaptor_kind,
        spectral=config.student.spectral,
        drop_path=config.student.drop_path,
        checkpointing=config.student.checkpointing,
        num_windowed=config.student.num_windowed,
        num_global=config.student.num_global,
        upsample={name: config.teachers[name].upsample for name in dims},
    )
