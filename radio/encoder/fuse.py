"""Fuse a checkpoint into the product: one encoder folder that transformers loads natively.

The adaptors were trained to predict standardized features y'; the inverse y = phi U H^T y' + mu is
folded into the last Linear of each, so that the encoder gives the teacher's own space.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from radio.encoder.card import model_card
from radio.encoder.layout import radio_config, to_disk
from radio.errors import RadioError
from radio.targets.standardize import Standardizer
from radio.targets.target_maker import TeacherFacts
from radio.training.checkpoint import Checkpoint, find_checkpoint, write_sums
from radio.training.distill import student_for
from student.adaptors import MlpAdaptor
from student.model import Student, TeacherAdaptor

FILES = ("config.json", "model.safetensors", "adaptors.safetensors", "preprocessor_config.json")


def fuse(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the encoder folder of a checkpoint (or of a run's newest) and return its path.

    Raises:
        RadioError: no checkpoint there, or `out` holds something that is no encoder.
    """
    source = find_checkpoint(Path(checkpoint))
    target = Path(out)
    _refuse_foreign(target)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_encoder(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target


def write_encoder(source: Checkpoint, folder: Path) -> None:
    """Write every file of the encoder folder."""
    student = _student(source)
    backbone = student.backbone
    save_file(
        to_disk(backbone.state_dict(), summary_rows(student)),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = radio_config(backbone, len(summary_rows(student)))
    config["adaptors"] = adaptor_config(source, student)
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor(source))
    fold_standardizers(student, source.standardizers)
    save_file(adaptor_tensors(student), folder / "adaptors.safetensors")
    facts = {key: source.state[key] for key in ("step", "teachers", "data")}
    (folder / "origin.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))
    (folder / "README.md").write_text(model_card(source, config))
    write_sums(folder)


@torch.no_grad()
def fold_standardizers(student: Student, standardizers: dict[str, Standardizer]) -> None:
    """Fold y = A y' + mu into each feature adaptor's last Linear: W <- A W, b <- A b + mu."""
    for name, adaptor in student.adaptors.items():
        assert isinstance(adaptor, TeacherAdaptor)
        weight, bias = standardizers[name].as_linear()
        fold_into(adaptor.features, weight, bias)


def fold_into(adaptor: MlpAdaptor, weight: Tensor, bias: Tensor) -> None:
    """Compose an affine map (float64) after an adaptor's last Linear, in place."""
    last = adaptor.last
    folded = weight @ last.weight.detach().double().cpu()
    shift = weight @ last.bias.detach().double().cpu() + bias
    with torch.no_grad():
        last.weight.copy_(folded.to(last.weight.dtype))
        last.bias.copy_(shift.to(last.bias.dtype))


def summary_rows(student: Student) -> list[int]:
    """Return every CLS row, one per teacher whose summary is matched; they are the summary."""
    return list(range(student.backbone.num_cls))


def adaptor_config(source: Checkpoint, student: Student) -> dict[str, Any]:
    """Return config.json's `adaptors` block: how to rebuild each teacher's heads."""
    block = {}
    for name, adaptor in student.adaptors.items():
        facts = source.state["teachers"][name]
        block[name] = {
            "kind": facts["kind"],
            "cls_row": adaptor.cls_row,
            "summary_dim": facts["summary_dim"] if adaptor.summary is not None else None,
            "feature_dim": facts["feature_dim"],
            "hidden": source.config.student.adaptor_hidden,
            "depth": source.config.student.adaptor_depth,
            "fingerprint": facts["fingerprint"],
        }
    return block


def adaptor_tensors(student: Student) -> dict[str, Tensor]:
    """Return the adaptors' weights as `<teacher>.<summary|features>.<key>`."""
    state = student.adaptors.state_dict()
    return {key: value.detach().contiguous().clone() for key, value in state.items()}


def preprocessor(source: Checkpoint) -> dict[str, Any]:
    """Return an image processor's settings: pixels in [0, 1], the model normalises by itself."""
    last = list(source.config.stages[-1].partitions.values())[-1].image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": last, "width": last},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def _student(source: Checkpoint) -> Student:
    teachers = {name: TeacherFacts(**facts) for name, facts in source.state["teachers"].items()}
    student = student_for(source.config, teachers, init=False)
    student.load_state_dict(source.model)
    return student.eval()


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / FILES[0]).exists()):
        raise RadioError(f"{target} exists and is no encoder folder; choose another output folder")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
