"""SAM's decoder against segment_anything, prompts against scipy, shapes as they are defined."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import distance_transform_edt
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
from segment_anything.modeling import PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.image_encoder import ImageEncoderViT
from small_encoder import head, small_weights

from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from radio.evaluation.masks import asked_of, masks
from radio.evaluation.pictures import Pictures
from radio.evaluation.prompts import (
    Instance,
    bounding_box,
    distance_to_border,
    inner_point,
    instances_of,
    to_square,
)
from radio.evaluation.result import Options
from radio.evaluation.shapes import average_mask, best_box_shape, best_point_shape, iou
from radio.evaluation.target_kinds import EncoderTarget
from radio.evaluation.targets import resolve
from teachers import build_teacher
from teachers.base import seeded
from teachers.sam import build_mask_decoder

SMALL: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "width": 24,
    "depth": 2,
    "heads": 2,
    "window_size": 4,
    "global_attention": [1],
    "neck": 32,
    "decoder": {"depth": 1, "heads": 4, "mlp_width": 48, "iou_width": 40, "mask_channels": 8},
}
RELEASED = {key: value for key, value in SMALL.items() if key not in ("neck", "decoder")} | {
    "image_size": 1024,
    "patch_size": 16,
    "depth": 1,
    "window_size": 14,
    "global_attention": [],
}


def shaken(sam: Sam) -> Sam:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in sam.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return sam.eval().requires_grad_(False)


@seeded(0)
def small_sam() -> Sam:
    encoder = ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=4, qkv_bias=True,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6), use_rel_pos=True,
        window_size=4, global_attn_indexes=(1,), out_chans=32,
    )  # fmt: skip
    decoder = SamMaskDecoder(
        transformer_dim=32,
        transformer=TwoWayTransformer(depth=1, embedding_dim=32, num_heads=4, mlp_dim=48),
        iou_head_hidden_dim=40,
    )
    return shaken(Sam(encoder, PromptEncoder(32, (8, 8), (64, 64), 8), decoder))


def test_the_decoder_is_segment_anythings_own(tmp_path: Path):
    sam = small_sam()
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    seen: list[torch.Tensor] = []
    sam.image_encoder.neck.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    points = torch.tensor([[3.0, 5.0], [40.0, 20.5]])
    boxes = torch.tensor([[2.0, 3.0, 30.0, 33.0], [10.0, 12.0, 60.0, 40.0]])
    labels = torch.tensor([1, 0])
    given = {"point_coords": points[:, None], "point_labels": labels[:, None]}
    prompts: list[tuple[dict[str, Any], tuple[Any, Any, Any]]] = [
        (given, (points, labels, None)),
        ({"boxes": boxes}, (None, None, boxes)),
        (given | {"boxes": boxes}, (points, labels, boxes)),
    ]
    decoder = build_mask_decoder("sam", "s", SMALL, str(tmp_path / "sam.pth"), 0)
    for asked, prompt in prompts:
        seen.clear()
        (expected,) = sam([{"image": image, "original_size": (64, 64)} | asked], True)
        logits, quality = decoder(seen[0], *prompt, 64)
        assert torch.equal(logits, expected["low_res_logits"])
        assert torch.equal(quality, expected["iou_predictions"])
    teacher = build_teacher("sam", "s", SMALL, str(tmp_path / "sam.pth"), 0)
    pixels = (image[None] - sam.pixel_mean) / sam.pixel_std
    assert torch.allclose(teacher(pixels).features, seen[0], atol=1e-5)


def test_a_released_checkpoint_fits_without_more_options(tmp_path: Path):
    """The state dict of segment_anything's own `_build_sam`, which made every published SAM."""
    sam = shaken(_build_sam(24, 1, 2, [], None))
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    build_teacher("sam", "s", RELEASED, str(tmp_path / "sam.pth"), 0)
    decoder = build_mask_decoder("sam", "s", RELEASED, str(tmp_path / "sam.pth"), 0)
    features = torch.randn(1, 24, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[100.0, 200.0, 500.0, 900.0]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    embedded, positions = sam.image_encoder.neck(features), sam.prompt_encoder.get_dense_pe()
    expected = sam.mask_decoder(embedded, positions, sparse, dense, multimask_output=True)
    found = decoder(features, None, None, boxes, 1024)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@torch.no_grad()
def test_another_size_asks_at_the_same_share_of_the_picture():
    decoder = build_mask_decoder("sam", "s", SMALL, None, 3)
    features = torch.randn(24, 8, 8, generator=torch.Generator().manual_seed(0))
    native = torch.tensor([[11.5, 31.5]])
    double = (native + 0.5) * 2 - 0.5
    ours, theirs = (
        decoder(features, points, None, None, size)
        for points, size in ((native, 64), (double, 128))
    )
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    logits, quality = decoder(torch.randn(24, 12, 10), native, None, None, 64)
    assert logits.shape == (1, 3, 48, 40) and quality.shape == (1, 3)


def test_seeded_decoders_repeat_and_half_precision_loads(tmp_path: Path):
    first, second, other = (build_mask_decoder("sam", "s", SMALL, None, s) for s in (1, 1, 2))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in first.state_dict().items())
    state = {key: value.half() for key, value in small_sam().state_dict().items()}
    save_file(state, tmp_path / "sam.safetensors")
    decoder = build_mask_decoder("sam", "s", SMALL, str(tmp_path / "sam.safetensors"), 0)
    assert all(weight.dtype == torch.float32 for weight in decoder.parameters())
    assert not any(weight.requires_grad for weight in decoder.parameters())


def test_decoders_that_cannot_be_say_why(tmp_path: Path):
    with pytest.raises(ValueError, match="kind 'clip' has no mask decoder"):
        build_mask_decoder("clip", "c", {}, None, 0)
    with pytest.raises(ValueError, match="decoder has no hats; it has depth"):
        build_teacher("sam", "s", SMALL | {"decoder": {"hats": 1}}, None, 0)
    with pytest.raises(ValueError, match="neck is 20 channels"):
        build_mask_decoder("sam", "s", SMALL | {"neck": 20}, None, 0)
    state = small_sam().state_dict()
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="of another model"):
        build_mask_decoder("sam", "s", SMALL | {"neck": 48}, str(tmp_path / "sam.pth"), 0)
    blocks = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    torch.save(blocks, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="holds no mask decoder"):
        build_mask_decoder("sam", "s", SMALL, str(tmp_path / "encoder.pth"), 0)
    decoder = build_mask_decoder("sam", "s", SMALL, None, 0)
    with pytest.raises(ValueError, match="neither points nor boxes"):
        decoder(torch.zeros(24, 8, 8), None, None, None, 64)
    with pytest.raises(ValueError, match=r"expected one picture's \[24, h, w\]"):
        decoder(torch.zeros(32, 8, 8), torch.zeros(1, 2), None, None, 64)


# Prompts


@settings(max_examples=40, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_distances_are_scipys(mask: np.ndarray):
    expected = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    assert np.allclose(distance_to_border(mask), expected)
    if mask.any():
        column, row = inner_point(mask)
        assert mask[row, column] and expected[row, column] == expected.max()
        left, top, right, bottom = bounding_box(mask)
        outside = mask.copy()
        outside[top:bottom, left:right] = False
        assert not outside.any() and mask[top].any() and mask[:, right - 1].any()


def test_instances_leave_out_crowds_and_crumbs():
    labels = np.zeros((40, 50), np.uint8)
    labels[2:12, 3:23], labels[20:30, 20:30], labels[35:37, 40:45] = 1, 2, 3
    listed = [{"id": 1, "iscrowd": 0}, {"id": 2, "iscrowd": 1}, {"id": 3, "iscrowd": 0}]
    (found,) = instances_of(labels, listed)
    assert found.box == (3, 2, 23, 12) and found.share == pytest.approx(0.1)
    assert found.point == (7, 6)
    for number in (None, 0, 300):
        with pytest.raises(RadioError, match="expected the value"):
            instances_of(labels, [{"id": number}])


def test_prompts_are_squashed_side_by_side():
    boxes = np.array([[10.0, 20.0, 30.0, 40.0]])
    assert to_square(boxes, (40, 80), 160).tolist() == [[20, 80, 60, 160]]


# Constant shapes


def drawn(shape: np.ndarray) -> Instance:
    return Instance(shape, inner_point(shape), bounding_box(shape))


def ellipses(count: int) -> list[Instance]:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:60, :80]
    found = []
    for _ in range(count):
        x, y, a, b = (
            rng.uniform(25, 55),
            rng.uniform(25, 35),
            rng.uniform(8, 20),
            rng.uniform(8, 20),
        )
        found.append(drawn(((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1))
    return found


def test_the_best_constant_is_the_truth_where_there_is_one():
    shape = best_box_shape(ellipses(8))
    scores = [iou(shape.draw(instance), instance.mask) for instance in ellipses(12)]
    assert "ellipse" in shape.name or "average" in shape.name
    assert min(scores) > 0.9
    rectangle = np.zeros((60, 80), bool)
    rectangle[10:40, 20:50] = True
    assert best_box_shape([drawn(rectangle)]).name == "rectangle, 1 of the box"
    assert (average_mask([drawn(rectangle)]) == 1).all()
    rows, columns = np.mgrid[:60, :80]
    disc = (columns - 40) ** 2 + (rows - 30) ** 2 <= 0.2**2 * 60 * 80
    assert best_point_shape([drawn(disc)]).name == "disc, radius 0.2 of sqrt(h w)"


def test_the_decoder_of_a_teacher_that_was_trained_anew_is_refused(tmp_path: Path):
    path = str(tmp_path / "sam.pth")
    torch.save(small_sam().state_dict(), path)
    of_then = build_teacher("sam", "edges", SMALL, path, 0).fingerprint
    facts = {"kind": "sam", "options": SMALL, "pretrained": path, "seed": 0}
    heads = TeacherHeads(None, {"features": head(96, SMALL["width"])}, {}, facts)
    heads.facts["fingerprint"] = of_then
    target = EncoderTarget("mine", replace(small_weights(), teachers={"edges": heads}))
    assert target.mask_decoder().width == SMALL["width"]
    state = small_sam().state_dict()
    torch.save({key: value + 1e-3 for key, value in state.items()}, path)
    with pytest.raises(RadioError, match="'edges' has other weights than when 'mine' was"):
        target.mask_decoder()
    (tmp_path / "sam.pth").unlink()
    with pytest.raises(RadioError, match=r"still the teacher of 'mine' cannot be said.*sam\.pth"):
        target.mask_decoder()


def test_iou_counts_pixels():
    first, second = np.zeros((2, 4, 4), bool)
    assert iou(first, second) == 0
    first[:2], second[1:3] = True, True
    assert iou(first, second) == pytest.approx(4 / 12)


# The task


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "things"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 3)):
        members: dict[str, bytes] = {}
        for at in range(count):
            labels = np.zeros((48, 64), np.uint8)
            for number in (1, 2)[: 1 + (at > 0)]:
                x, y = rng.integers(0, 30), rng.integers(0, 24)
                labels[y : y + 20, x : x + 24] = number
            listed = [{"id": n, "class": 5, "iscrowd": 0} for n in (1, 2)[: 1 + (at > 0)]]
            picture = (np.stack([labels * 100] * 3, -1) + 20).astype(np.uint8)
            for field, values in (("jpg", picture), ("png", labels)):
                out = io.BytesIO()
                Image.fromarray(values).save(out, "PNG")
                members[f"{at:06}.{field}"] = out.getvalue()
            members[f"{at:06}.json"] = json.dumps({"instances": listed}).encode()
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def small_teacher(tmp_path: Path) -> Path:
    import yaml

    torch.save(small_sam().state_dict(), tmp_path / "sam.pth")
    values = {"kind": "sam", "options": SMALL, "pretrained": str(tmp_path / "sam.pth")}
    path = tmp_path / "small_sam.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_masks_of_a_teacher_are_segment_anythings(data: Path, tmp_path: Path):
    """One instance's IoU, made again by segment_anything's own Sam from the same picture."""
    target, pictures = resolve(small_teacher(tmp_path)), Pictures(data)
    result = masks(target, pictures, Options(prompt="box"))
    assert result.details["pictures"] == 3 and result.details["instances"] == 5
    assert result.samples[:, 1].tolist() == [1, 2, 2]
    rows = {(row["prompt"], row["by"]): row for row in result.details["rows"]}
    assert result.score == rows["box", "decoder"]["iou"]
    assert result.score == pytest.approx(result.samples[:, 0].sum() / 5)
    low, high = result.interval
    assert low <= result.score <= high
    split = pictures.split("val")
    (instance,) = [i for p, i in zip(*_asked(split), strict=True) if p == 0]
    square = split.picture(0).resize((64, 64), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()
    box = torch.tensor(instance.box) * torch.tensor([1, 64 / 48, 1, 64 / 48])
    (found,) = small_sam()(
        [{"image": image, "original_size": (48, 64), "boxes": box[None]}], multimask_output=True
    )
    logits = found["low_res_logits"][:, int(found["iou_predictions"].argmax())]
    best = F.interpolate(logits[None], (48, 64), mode="bilinear")[0, 0].numpy() > 0
    # The two normalise pixels in another order, so that a pixel on the border may differ.
    assert best.any() and iou(best, instance.mask) == pytest.approx(result.samples[0, 0], abs=0.01)
    point = masks(target, pictures, Options(prompt="point"))
    assert point.score == rows["point", "decoder"]["iou"]
    assert point.details["rows"] == result.details["rows"]


def _asked(split: Any) -> tuple[list[int], list[Instance]]:
    asked = asked_of(split)
    return asked.pictures, asked.instances


def test_gains_are_paired_with_the_constant(data: Path, tmp_path: Path):
    details = masks(resolve(small_teacher(tmp_path)), Pictures(data), Options()).details
    rows = {(row["prompt"], row["by"] == "decoder"): row for row in details["rows"]}
    for prompt in ("point", "box"):
        gain = details["over_constant"][prompt]
        expected = rows[prompt, True]["iou"] - rows[prompt, False]["iou"]
        assert gain["difference"] == pytest.approx(expected)
        assert gain["interval"][0] <= gain["difference"] <= gain["interval"][1]
        assert details["best_of_the_masks"][prompt] >= rows[prompt, True]["iou"]
    json.dumps(details)


def test_targets_without_masks_are_refused(data: Path):
    with pytest.raises(RadioError, match="no mask decoder"):
        masks(resolve("pixels"), Pictures(data), Options())


def test_features_that_the_decoder_does_not_read_are_refused(data: Path):
    facts = {"kind": "sam", "options": SMALL, "pretrained": None, "seed": 0}
    states = {"features": head(96, SMALL["width"]), "summary": head(96, 5)}
    heads = {"edges": TeacherHeads(0, states, {}, facts)}
    target = EncoderTarget("mine", replace(small_weights(), teachers=heads))
    for name, said in (("features", r"\[96, 4, 4\]"), ("edges:summary", r"\[5\]")):
        with pytest.raises(RadioError, match=rf"'{name}' of 'mine' gives {said} .*\[24, h, w\]"):
            masks(target, Pictures(data), Options(features=name))


def test_a_split_without_instances_is_refused(data: Path, tmp_path: Path):
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "PNG")
    with tarfile.open(data / "val-000000.tar", "w") as tar:
        for name, content in (("a.jpg", out), ("a.png", out), ("a.json", b'{"instances": []}')):
            raw = content if isinstance(content, bytes) else content.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    with pytest.raises(RadioError, match="no instance of 1% or more"):
        masks(resolve(small_teacher(tmp_path)), Pictures(data), Options())
