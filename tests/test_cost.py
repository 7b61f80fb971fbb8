from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from radio.config import StudentConfig, choices, load
from radio.training.cost import GPU_TFLOPS, stage_cost, trunk_gflop, vit_gflop
from student.vit import SIZES, VisionTransformer


@pytest.mark.parametrize(("size", "pixels"), [("tiny", 128), ("base", 256), ("huge", 432)])
def test_the_students_cost_is_what_torch_counts(size: str, pixels: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(SIZES[size], image_size=512, num_cls=3, num_registers=5).eval()
        images = torch.zeros(1, 3, pixels, pixels, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images)
    assert vit_gflop(SIZES[size], pixels, 16) == pytest.approx(
        counter.get_total_flops() / 1e9, rel=0.01
    )


def test_a_mosaic_shares_a_pass_and_tiles_multiply_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    stage = config.stages[0]
    config.teachers["edges"].card.gflops = 8.0
    low = stage.partitions["low"]
    del stage.partitions["high"]
    cost = {}
    for mode in ("native", "mosaic", "padded"):
        low.views["edges"] = mode
        cost[mode] = stage_cost(config, stage).teachers["edges"]
    assert cost["native"] == cost["padded"] == pytest.approx(5 * 8 / 1000)
    assert cost["mosaic"] == pytest.approx(5 * 2 / 1000)
    low.image_size, low.views = 96, {"edges": "tiled"}  # 2 x 2 tiles of 64 px
    assert stage_cost(config, stage).teachers["edges"] == pytest.approx(5 * 32 / 1000)


def test_hours_are_steps_times_tflop(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=6)
    cost = stage_cost(config, config.stages[0])
    assert cost.gpu_hours == pytest.approx(6 * cost.tflop / GPU_TFLOPS / 3600)
    assert cost.tflop == pytest.approx(cost.student + sum(cost.teachers.values()))


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_has_a_cost(name: str) -> None:
    config = load([f"experiment={name}", "data.train=photos"])
    assert all(stage_cost(config, stage).gpu_hours > 0 for stage in config.stages)


def test_students_add_up_and_mesa_takes_a_forward_more(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    alone = stage_cost(config, config.stages[0])
    config.students = {"small": StudentConfig(size="small", image_size=64)}
    both = stage_cost(config, config.stages[0])
    assert both.teachers == alone.teachers and both.student > 3 * alone.student
    config.students, config.losses.mesa_weight = {}, 1.0
    assert stage_cost(config, config.stages[0]).student == pytest.approx(alone.student * 4 / 3)


def test_a_trunks_cost_is_counted() -> None:
    """4.09 G multiply-adds for ResNet-50 at 224 px, as its paper's table says 4.1."""
    assert trunk_gflop("resnet50", 224) == pytest.approx(2 * 4.1, rel=0.02)
