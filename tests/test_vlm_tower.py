from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_config, write_pictures
from transformers import AutoModel, BatchFeature, NemotronH_Omni_Reasoning_V3

from radio.encoder.fuse import fuse
from radio.training.distill import distill

SCRIPT = Path(__file__).parents[1] / "examples" / "vlm_tower.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vlm_tower", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _example()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vlm")
    config = tiny_config(root, steps=1)
    config.data.val = None
    config.threads.student = 1
    return fuse(distill(config).out, root / "encoder")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    wide, high = sorted(write_pictures(tmp_path / "pictures", 2, side=96).iterdir())
    Image.open(wide).resize((96, 64)).save(wide)
    Image.open(high).resize((64, 128)).save(high)
    return [wide, high]


@pytest.fixture
def pictures(paths: list[Path]) -> list[Image.Image]:
    return [Image.open(path) for path in paths]


class Built:
    """The example's objects, fresh."""

    def __init__(self, encoder: Path) -> None:
        torch.manual_seed(0)
        tower = example.load_tower(encoder)
        tokenizer = example.byte_tokenizer()
        self.processor = example.build_processor(tower.config, tokenizer)
        self.vlm: NemotronH_Omni_Reasoning_V3 = example.build_vlm(tower, tokenizer)
        self.conditioner = AutoModel.from_pretrained(encoder).make_preprocessor_external()

    def batch(self, pictures: list[Image.Image], captions: list[str] | None = None) -> BatchFeature:
        batch: BatchFeature = example.make_batch(self.processor, pictures, captions)
        return batch


@pytest.fixture
def built(encoder: Path) -> Built:
    torch.set_num_threads(1)  # matrices so small that a second thread only waits for the first
    return Built(encoder)


@torch.no_grad()
def test_the_tower_gives_the_encoders_features(
    built: Built, encoder: Path, pictures: list[Image.Image]
) -> None:
    alone = AutoModel.from_pretrained(encoder).eval()
    tower = built.vlm.eval().vision_model
    packed = built.processor.image_processor(pictures, do_normalize=False, return_tensors="pt")
    pixels, grids = packed["pixel_values"], packed["image_grid_hw"]
    assert grids.tolist() == [[4, 6], [8, 4]]
    expected = alone(pixels, image_grid_hw=grids).features

    normalised = built.conditioner(pixels.view(-1, 3, 16, 16)).flatten(1)
    assert torch.equal(tower(normalised, image_grid_hw=grids).features, expected)
    by_processor = built.batch(pictures)["pixel_values"]  # the same affine map, rounded elsewhere
    torch.testing.assert_close(by_processor, normalised, atol=1e-5, rtol=0)
    features = tower(by_processor, image_grid_hw=grids).features
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_token_is_a_square_of_two_by_two_patches(
    built: Built, pictures: list[Image.Image]
) -> None:
    batch = built.batch(pictures)
    inputs = batch["pixel_values"], batch["image_grid_hw"]
    seen: list[torch.Tensor] = []
    norm = built.vlm.multi_modal_projector.layer_norm
    norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    wide, high = built.vlm.get_image_features(*inputs).pooler_output
    assert (len(wide), len(high)) == (2 * 3, 4 * 2)
    assert (batch["input_ids"] == built.vlm.config.image_token_id).sum(1).tolist() == [6, 8]
    grid = built.vlm.vision_model(inputs[0], image_grid_hw=inputs[1]).features[:24].view(4, 6, -1)
    second = grid[0:2, 2:4].flatten(0, 1)  # the second token of the wide picture's first row
    ours = seen[0][1].view(4, -1)
    assert sorted(ours.tolist()) == sorted(second.tolist())


def test_a_missing_weight_is_named(encoder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(encoder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["radio_model.model.blocks.3.mlp.fc1.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*encoder\.layer\.3\.mlp\.fc1\.weight"):
        example.load_tower(broken)


@pytest.mark.parametrize("train_tower", [False, True])
def test_a_step_learns(built: Built, pictures: list[Image.Image], train_tower: bool) -> None:
    vlm = built.vlm
    vlm.vision_model.requires_grad_(train_tower)
    before = vlm.vision_model.embeddings.patch_projection.weight.clone()
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=1e-3)
    batch = built.batch(pictures, ["wide", "high"])
    assert (batch["labels"] >= 0).sum().item() == 2 * (4 + 1)
    losses, norms = zip(
        *(example.training_step(vlm, optimizer, batch) for _ in range(4)), strict=True
    )
    assert 0 < losses[-1] < losses[0] < 10 and min(norms) > 0
    assert torch.equal(vlm.vision_model.embeddings.patch_projection.weight, before) != train_tower


@torch.no_grad()
def test_two_shapes_in_one_call_are_as_each_alone(
    built: Built, pictures: list[Image.Image]
) -> None:
    vlm = built.vlm.eval()
    together = vlm(**built.batch(pictures)).logits[:, -1]  # padded on the left
    for picture, logits in zip(pictures, together, strict=True):
        alone = vlm(**built.batch([picture])).logits[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_generates_saves_and_reloads(
    built: Built, pictures: list[Image.Image], tmp_path: Path
) -> None:
    vlm, prompts = built.vlm.eval(), built.batch(pictures)
    tokens = vlm.generate(**prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, prompts["input_ids"].shape[1] + 5)
    vlm.save_pretrained(tmp_path / "saved")
    again = NemotronH_Omni_Reasoning_V3.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(**prompts).logits, vlm(**prompts).logits)


def test_the_script_runs(
    encoder: Path, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    example.main(encoder, paths, steps=2, out=tmp_path / "saved")
    printed = capsys.readouterr().out
    assert "frozen; not in the encoder: the video projection" in printed
    assert "p000 4 x 6 patches, p001 8 x 4 patches" in printed
    assert "largest difference of the logits 0.0\n" in printed
