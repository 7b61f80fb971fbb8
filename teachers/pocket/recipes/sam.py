"""pocket_sam: segment-anything's Sam in small, trained to mask what a point or a box means.

Losses and prompts follow Segment Anything (2304.02643, appendix A): focal and dice loss in the
ratio 20 to 1, the mean square error of the predicted IoU, and of three masks only the best one
learns. Masks are those of coco-instances and people-masks, the connected regions of camvid's and
coco's label maps, and superpixels (scikit-image) of every picture. The encoder's blocks start from
a ViT that has learnt the dense features of the trunk, as SAM's start from MAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from teachers.base import IMAGENET_MEAN, IMAGENET_STD
from teachers.pocket.recipes.checkpoint import Checkpoint, Origin
from teachers.pocket.recipes.data import Image3, grey, rgb, samples
from teachers.pocket.recipes.optim import build_muon
from teachers.pocket.recipes.text import schedule

SIZE = 256
PATCH = 16
LOW = SIZE // 4  # side of the decoder's masks
NECK = 128
OPTIONS: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "width": 192,
    "depth": 8,
    "heads": 3,
    "window_size": 8,
    "global_attention": [1, 3, 5, 7],
    "neck": NECK,
    "decoder": {"heads": 4, "mlp_width": 512, "iou_width": 128},
}
SHARES = {"coco-instances": 0.5, "people-masks": 0.3, "camvid": 0.2}  # of outlined canvases
MIN_AREA = 0.005  # share of the canvas that a mask must have to be asked for
# Few canvases and prompts in a step, and many steps: how a box or a point becomes a place in the
# picture is learnt slowly, and more of them in a step hardly hasten it.
BATCH, PROMPTS = 2, 8  # canvases; masks asked for in each by points, and as many by boxes
LR = {"encoder": 1e-3, "decoder": 2e-3}


@dataclass(frozen=True)
class Labelled:
    """A picture and its label maps: regions from 1 up, superpixels from -1 down, 0 is none."""

    image: Image3
    maps: Int[Tensor, "maps h w"]


def build_sam() -> Sam:
    """Return the model of OPTIONS with new weights, in segment-anything's own classes."""
    decoder = OPTIONS["decoder"]
    grid = (SIZE // PATCH,) * 2
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=OPTIONS["width"],
            depth=OPTIONS["depth"],
            num_heads=OPTIONS["heads"],
            mlp_ratio=4,
            out_chans=NECK,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=OPTIONS["window_size"],
            global_attn_indexes=tuple(OPTIONS["global_attention"]),
        ),
        prompt_encoder=PromptEncoder(NECK, grid, (SIZE, SIZE), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=NECK,
            transformer=TwoWayTransformer(
                depth=2,
                embedding_dim=NECK,
                mlp_dim=decoder["mlp_width"],
                num_heads=decoder["heads"],
            ),
            iou_head_hidden_dim=decoder["iou_width"],
        ),
    )


def start_from_vit(sam: Sam, state: Mapping[str, Tensor]) -> None:
    """Copy the patch embedding, the positions and the first blocks of a timm ViT."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("mlp.fc1", "mlp.lin1").replace("mlp.fc2", "mlp.lin2")
        if key.startswith(("blocks.", "patch_embed.")):
            renamed[key] = value
    own = sam.image_encoder.state_dict()
    kept = {key: value for key, value in renamed.items() if key in own}
    side = int(state["pos_embed"].shape[1] ** 0.5)
    positions = state["pos_embed"].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = (SIZE // PATCH,) * 2
    finer = F.interpolate(positions, grid, mode="bicubic", align_corners=False)
    kept["pos_embed"] = finer.permute(0, 2, 3, 1)
    missing = sam.image_encoder.load_state_dict(kept, strict=False).missing_keys
    assert all("rel_pos" in key or key.startswith("neck") for key in missing), missing


def regions(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the connected regions of a label map, numbered from 1; -1 and 0 are none."""
    from skimage.measure import label

    found: NDArray[Any] = label(labels, background=0, connectivity=1)  # type: ignore[no-untyped-call]
    return found


def superpixels(image: Image3, scale: float) -> NDArray[Any]:
    """Return Felzenszwalb's regions (2004) of a picture, numbered from -1 down."""
    from skimage.segmentation import felzenszwalb

    picture = image.permute(1, 2, 0).numpy()
    least = picture.shape[0] * picture.shape[1] // 100
    return -1 - np.asarray(felzenszwalb(picture, scale=scale, sigma=0.8, min_size=least))


def annotated(folder: Path) -> dict[str, list[Labelled]]:
    """Return the pictures that people have outlined, by set."""
    found: dict[str, list[Labelled]] = {name: [] for name in SHARES}
    for sample in samples(folder / "coco-instances", "train"):
        image, things, stuff = rgb(sample["jpg"]), grey(sample["png"]), grey(sample["sem.png"])
        maps = [things.numpy(), regions(stuff.numpy())]
        found["coco-instances"] += [_labelled(image, maps), *2 * [_labelled(image, maps[:1])]]
    for sample in samples(folder / "people-masks", "train"):
        found["people-masks"].append(_labelled(rgb(sample["jpg"]), [grey(sample["png"]).numpy()]))
    for sample in samples(folder / "camvid", "train"):
        labels = grey(sample["png"]).numpy().astype(np.int32) + 1
        labels[labels == 12] = 0  # unlabelled
        found["camvid"].append(_labelled(rgb(sample["jpg"]), [regions(labels)]))
    return {
        name: [item for item in items if (item.maps > 0).any()] for name, items in found.items()
    }


def _labelled(image: Image3, maps: Sequence[NDArray[Any]]) -> Labelled:
    return Labelled(image, torch.from_numpy(np.stack([m.astype(np.int32) for m in maps])))


class Canvases:
    """Draws canvases: an outlined picture, one with superpixels, or four small ones side by side.

    Four at once are what the student shows to a mosaic teacher.
    """

    def __init__(
        self, outlined: Mapping[str, Sequence[Labelled]], others: Sequence[Image3]
    ) -> None:
        self.outlined = dict(outlined)
        self.others = others
        self.crop = v2.Compose(
            [
                v2.RandomResizedCrop(SIZE, (0.4, 1.0), (0.7, 1.4), antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.colour = v2.ColorJitter(0.3, 0.3, 0.3, 0.05)

    def draw(self, generator: np.random.Generator) -> tuple[Labelled, Asked]:
        """Return the next canvas [3, 256, 256] that has masks to ask for, and what is asked."""
        while True:
            canvas = self._canvas(generator)
            if (asked := ask(canvas, generator)) is not None:
                return canvas, asked

    def _canvas(self, generator: np.random.Generator) -> Labelled:
        kind = generator.random()
        if kind < 0.65:
            return self._view(self._outlined(generator), SIZE, generator)
        if kind < 0.8:
            return self._view(self._oversegmented(generator), SIZE, generator)
        tiles = [self._view(self._any(generator), SIZE // 2, generator) for _ in range(4)]
        image = _square([tile.image for tile in tiles])
        apart = [tile.maps[:1] + tile.maps[:1].sign() * 1000 * at for at, tile in enumerate(tiles)]
        return Labelled(image, _square(apart))

    def _any(self, generator: np.random.Generator) -> Labelled:
        if generator.random() < 0.5:
            return self._outlined(generator)
        return self._oversegmented(generator)

    def _outlined(self, generator: np.random.Generator) -> Labelled:
        items = self.outlined[str(generator.choice(list(SHARES), p=list(SHARES.values())))]
        return items[int(generator.integers(len(items)))]

    def _oversegmented(self, generator: np.random.Generator) -> Labelled:
        image = self.others[int(generator.integers(len(self.others)))]
        scale = float(np.exp(generator.uniform(np.log(100), np.log(800))))
        return _labelled(image, [superpixels(image, scale)])

    def _view(self, item: Labelled, side: int, generator: np.random.Generator) -> Labelled:
        torch.manual_seed(int(generator.integers(1 << 31)))
        image, maps = self.crop(tv_tensors.Image(item.image), tv_tensors.Mask(item.maps))
        image = self.colour(image)
        if side != SIZE:
            image = v2.functional.resize(image, [side, side], antialias=True)
            maps = v2.functional.resize_mask(maps, [side, side])
        return Labelled(torch.Tensor(image).byte(), torch.as_tensor(maps))


def _square(parts: Sequence[Tensor]) -> Tensor:
    rows = [torch.cat(list(parts[at : at + 2]), dim=-1) for at in (0, 2)]
    return torch.cat(rows, dim=-2)


@dataclass(frozen=True)
class Asked:
    """The masks asked for in a canvas by boxes, and of them by points; both in px."""

    masks: Float[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    pointed: Bool[Tensor, " n"]
    points: Float[Tensor, "pointed 2"]


def ask(canvas: Labelled, generator: np.random.Generator) -> Asked | None:
    """Draw the masks to ask for: each one's box, moved a little, and a point inside.

    Where there are few masks they are asked for again, by other points and boxes. Half of the
    points are any of the mask's, half the one farthest from its border, which is where people
    click and what task `masks` asks for. Superpixels have boxes alone: a point in one does not
    say how large a region is meant.
    """
    found = []
    for labels in canvas.maps:
        numbers, counts = labels.unique(return_counts=True)
        large = (counts >= MIN_AREA * SIZE * SIZE) & (counts <= 0.9 * SIZE * SIZE) & (numbers != 0)
        found += [(labels == number, bool(number > 0)) for number in numbers[large]]
    if not found:
        return None
    chosen = [found[at] for at in np.resize(generator.permutation(len(found)), PROMPTS)]
    boxes = [box_of(mask, generator) for mask, _ in chosen]
    points = [point_of(mask, generator) for mask, outlined in chosen if outlined]
    return Asked(
        torch.stack([mask for mask, _ in chosen]).float(),
        torch.tensor(boxes),
        torch.tensor([outlined for _, outlined in chosen]),
        torch.tensor(points).reshape(-1, 2),
    )


def point_of(mask: Bool[Tensor, "h w"], generator: np.random.Generator) -> list[float]:
    """Return the middle (x, y) of one of a mask's pixels."""
    rows, columns = mask.nonzero(as_tuple=True)
    if generator.random() < 0.5:
        at = int(generator.integers(len(rows)))
    else:
        away = distance_transform_edt(np.pad(mask.numpy(), 1))[1:-1, 1:-1]
        at = int(away[rows, columns].argmax())
    return [float(columns[at]) + 0.5, float(rows[at]) + 0.5]


def box_of(mask: Bool[Tensor, "h w"], generator: np.random.Generator) -> list[float]:
    """Return a mask's box (left, top, right, bottom), each side moved by some of its length."""
    rows, columns = mask.nonzero(as_tuple=True)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=float)
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    moved = box + np.clip(generator.normal(0, 0.05, 4) * sides, -10, 10)
    clipped: list[float] = np.clip(moved, 0, SIZE).tolist()
    return clipped


def mask_losses(
    logits: Float[Tensor, "n masks low low"],
    predicted: Float[Tensor, "n masks"],
    wanted: Float[Tensor, "n low low"],
) -> tuple[Tensor, Tensor]:
    """Return the loss, of each prompt's least bad mask, and the IoUs of the masks chosen [n]."""
    wanted = wanted[:, None].expand_as(logits)
    probability = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    hit = probability * wanted + (1 - probability) * (1 - wanted)
    weight = 0.25 * wanted + 0.75 * (1 - wanted)
    focal = (weight * (1 - hit).square() * cross).mean((2, 3))
    both = (probability * wanted).sum((2, 3))
    dice = 1 - (2 * both + 1) / (probability.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    mask_loss = 20 * focal + dice
    with torch.no_grad():
        on = logits > 0
        inside = (on & (wanted > 0.5)).sum((2, 3))
        iou = inside / (on | (wanted > 0.5)).sum((2, 3)).clamp(min=1)
    best = mask_loss.argmin(1, keepdim=True)
    iou_loss = (predicted - iou).square().mean(1)
    chosen = iou.gather(1, predicted.argmax(1, keepdim=True))
    return (mask_loss.gather(1, best)[:, 0] + iou_loss).mean(), chosen[:, 0]


def train_sam(
    sam: Sam, canvases: Canvases, path: Path, *, origin: Origin
) -> list[dict[str, float]]:
    """Train the whole model; return the curve."""
    optimizers = build_optimizers(sam)
    saved = Checkpoint(path, {"sam": sam, **optimizers}, torch.Generator(), origin)
    steps = origin.steps
    recent: dict[str, list[float]] = {}
    while saved.step < steps:
        generator = np.random.default_rng([origin.seed, saved.step])
        told = _step(sam, [canvases.draw(generator) for _ in range(BATCH)])
        sam.zero_grad(set_to_none=True)
        told["loss"].backward()
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = LR[name] * schedule(saved.step, steps)
            optimizer.step()
        for name, value in told.items():
            recent.setdefault(name, []).append(value.item())
        if saved.step % 50 == 49:
            saved.told(**{name: float(np.nanmean(values)) for name, values in recent.items()})
            recent.clear()
        saved.done(saved.step == steps - 1)
    return saved.curve


def build_optimizers(sam: Sam) -> dict[str, torch.optim.Optimizer]:
    """Return Muon for the encoder, slower because it is no longer new, and for the rest."""
    encoder, decoder = sam.image_encoder, sam.mask_decoder
    others = [*sam.prompt_encoder.parameters(), *decoder.parameters()]
    matrices = nn.ModuleList([decoder.transformer, decoder.output_hypernetworks_mlps])
    return {
        "encoder": build_muon(encoder.blocks, encoder.parameters(), LR["encoder"]),
        "decoder": build_muon(matrices, others, LR["decoder"]),
    }


def _step(sam: Sam, pairs: Sequence[tuple[Labelled, Asked]]) -> dict[str, Tensor]:
    """Return the loss, and the mean IoUs of the masks chosen by points and by boxes."""
    pixels = torch.stack([canvas.image for canvas, _ in pairs]).float() / 255
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    embedded = sam.image_encoder((pixels - mean) / std)
    positions = sam.prompt_encoder.get_dense_pe()
    losses, points, boxes = [], [], []
    for features, (_, asked) in zip(embedded, pairs, strict=True):
        count = len(asked.points)
        inside = torch.ones(count, 1, dtype=torch.int)
        # Two tokens each: a point and a pad, or two corners. So one pass of the decoder does both.
        point, _ = sam.prompt_encoder((asked.points[:, None], inside), None, None)
        box, dense = sam.prompt_encoder(None, asked.boxes, None)
        logits, iou = sam.mask_decoder(
            image_embeddings=features[None],
            image_pe=positions,
            sparse_prompt_embeddings=torch.cat([point, box]),
            dense_prompt_embeddings=torch.cat([dense[:count], dense]),
            multimask_output=True,
        )
        wanted = F.interpolate(asked.masks[:, None], (LOW, LOW), mode="area")[:, 0]
        loss, chosen = mask_losses(logits, iou, torch.cat([wanted[asked.pointed], wanted]))
        losses.append(loss)
        points.append(chosen[:count])
        boxes.append(chosen[count:])
    return {
        "loss": torch.stack(losses).mean(),
        "point": torch.cat(points).mean(),
        "box": torch.cat(boxes).mean(),
    }
