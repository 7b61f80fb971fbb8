"""What the pocket teachers learn by: losses against other libraries, draws, a cut-off training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from picture_zoo import write_tar
from torch import nn

from teachers.pocket.recipes import __main__ as recipes
from teachers.pocket.recipes import dinov2, sam
from teachers.pocket.recipes.checkpoint import Checkpoint, Origin
from teachers.pocket.recipes.clip import pairs_of
from teachers.pocket.recipes.contrastive import Names, Step, sigmoid_loss, softmax_loss
from teachers.pocket.recipes.data import (
    NUM_HELD_OUT,
    Classes,
    RecipeError,
    claim,
    fingerprint,
    imagenet_synsets,
    views,
)
from teachers.pocket.recipes.text import schedule, tokens_of, train_tokenizer

PAIRS, LABELLED, NAMES, DIM = 5, 4, 6, 8
ORIGIN = Origin(seed=0, steps=6, data="1f" * 32)


def unit(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture
def step() -> Step:
    generator = torch.Generator().manual_seed(0)
    return Step(
        pictures=unit(PAIRS + LABELLED, DIM, generator=generator),
        captions=unit(PAIRS, DIM, generator=generator),
        names=unit(NAMES, DIM, generator=generator),
        labels=torch.tensor([0, 3, 3, 5]),
        belief=torch.rand(PAIRS + LABELLED, NAMES, generator=generator).softmax(1),
        rows=unit(NAMES, DIM, generator=generator),
    )


def test_the_caption_losses_are_open_clips(step: Step) -> None:
    scale, bias = torch.tensor(12.0), torch.tensor(-3.0)
    pictures = step.pictures[:PAIRS]
    clip = ClipLoss()(pictures, step.captions, scale)
    siglip = SigLipLoss()(pictures, step.captions, scale, bias)
    torch.testing.assert_close(softmax_loss(step, scale)["captions"], clip)
    torch.testing.assert_close(sigmoid_loss(step, scale, bias)["captions"], siglip)


def test_names_and_belief_are_cross_entropies(step: Step) -> None:
    scale = torch.tensor(12.0)
    logits = (scale * step.pictures @ step.names.T).double()
    chances = logits.exp() / logits.exp().sum(1, keepdim=True)
    losses = softmax_loss(step, scale)
    true = chances[PAIRS:][torch.arange(LABELLED), step.labels]
    assert float(losses["names"]) == pytest.approx(float(-true.log().mean()), rel=1e-5)
    apart = (step.belief * (step.belief / chances).log()).sum(1).mean()
    assert float(losses["belief"]) == pytest.approx(float(apart), rel=1e-4)
    yes = 1 / (1 + (-logits - 2).exp())
    belief = step.belief.double()
    told = -(belief * yes.log() + (1 - belief) * (1 - yes).log()).sum(1).mean()
    found = sigmoid_loss(step, scale, torch.tensor(2.0))["belief"]
    assert float(found) == pytest.approx(float(told), rel=1e-4)


def test_held_out_classes_are_nowhere_among_the_names(tmp_path: Path) -> None:
    synsets = imagenet_synsets()
    chosen = range(0, 1000, 10)
    rows = [f"{at}\t{synsets[row]}\tname {at}, other" for at, row in enumerate(chosen)]
    (tmp_path / "classes.txt").write_text("\n".join(rows))
    classes = Classes.read(tmp_path)
    names = Names.of(classes)
    assert len(classes.held_out) == NUM_HELD_OUT
    assert not set(classes.held_out) & set(classes.seen)
    held = {chosen[at] for at in classes.held_out}
    assert len(names.texts) == len(names.rows) == 1000 - NUM_HELD_OUT
    assert not held & set(names.rows.tolist())
    assert names.texts[0] == f"name {classes.seen[0]}"
    at, texts = names.draw(torch.Generator().manual_seed(0))
    assert len(set(at.tolist())) == len(texts) == len(at)
    assert all(names.texts[place] in text for place, text in zip(at.tolist(), texts, strict=True))


def write_sets(folder: Path, labels: list[int]) -> None:
    """Write both sets that are paired: 30 classes, a picture a label, two captioned pictures."""
    tiny, flickr = folder / "tiny-imagenet-100", folder / "flickr8k"
    for each in (tiny, flickr):
        each.mkdir(parents=True)
    lines = [f"{at}\tn{at:08}\tname {at}" for at in range(30)]
    (tiny / "classes.txt").write_text("\n".join(lines))
    members = {f"{at:06}.cls": str(label).encode() for at, label in enumerate(labels)}
    write_tar(tiny / "train-000000.tar", members)
    said = {f"{at:06}.json": json.dumps({"captions": [f"said {at}"]}).encode() for at in range(2)}
    write_tar(flickr / "train-000000.tar", said)


def test_pictures_of_held_out_classes_are_never_paired(tmp_path: Path) -> None:
    labels = [*range(30), *range(29, -1, -1)]
    write_sets(tmp_path, labels)
    views = {"pooled": torch.zeros(1, len(labels) + 2, DIM)}
    pairs, classes = pairs_of(tmp_path, views, None)
    assert len(classes.held_out) == NUM_HELD_OUT
    paired = [labels[at] for at in pairs.labelled.tolist()]
    assert sorted(paired) == sorted(2 * classes.seen)  # all the others, each as often as it is
    assert [classes.seen[place] for place in pairs.labels.tolist()] == paired
    assert pairs.captioned.tolist() == [60, 61] and pairs.captions == [["said 0"], ["said 1"]]
    which = torch.cat([pairs.draw(8, torch.Generator().manual_seed(s))[0][1] for s in range(20)])
    drawn = {labels[at] for at in which.tolist() if at < len(labels)}
    assert drawn == set(classes.seen)


def test_the_tokenizer_begins_with_its_class_token_and_keeps_to_its_size(tmp_path: Path) -> None:
    texts = ["a dog on the grass", "two dogs run", "goldfish: a small fish"] * 3
    tokenizer = train_tokenizer(texts, tmp_path)
    tokens = tokens_of(tokenizer, [*texts[:3], "A DOG on the grass"])
    assert tokens.shape == (4, 20)
    assert (tokens[:, 0] == tokenizer.cls_token_id).all()
    assert torch.equal(tokens[0], tokens[3])
    assert (tmp_path / "tokenizer.json").is_file()


def test_views_are_seeded_crops_and_the_whole_picture() -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    first, again, other = (views([image], 32, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    whole = views([image], 32, None)
    assert whole.shape == (1, 3, 32, 32)
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1


def test_the_schedule_rises_and_falls() -> None:
    rates = [schedule(at, 1000, warmup=50) for at in range(1000)]
    assert rates.index(max(rates)) in range(45, 55)
    assert rates[0] == pytest.approx(0.02, abs=1e-3)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_mask_losses_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 5, generator=generator)
    predicted = torch.rand(2, 3, generator=generator)
    wanted = (torch.rand(2, 5, 5, generator=generator) > 0.5).float()
    loss, chosen = sam.mask_losses(logits, predicted, wanted)
    total = 0.0
    for n in range(2):
        each, ious = [], []
        for m in range(3):
            p = logits[n, m].double().sigmoid().numpy()
            y = wanted[n].double().numpy()
            at = np.where(y == 1, p, 1 - p)
            focal = (np.where(y == 1, 0.25, 0.75) * (1 - at) ** 2 * -np.log(at)).mean()
            dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
            each.append(20 * focal + dice)
            ious.append(((p > 0.5) & (y == 1)).sum() / ((p > 0.5) | (y == 1)).sum())
        total += min(each) + np.square(predicted[n].numpy() - ious).mean()
        assert float(chosen[n]) == pytest.approx(ious[int(predicted[n].argmax())], rel=1e-5)
    assert float(loss) == pytest.approx(total / 2, rel=1e-4)


def test_points_and_boxes_belong_to_their_masks() -> None:
    maps = torch.zeros(1, sam.SIZE, sam.SIZE, dtype=torch.int32)
    maps[0, 20:90, 30:120] = 1
    maps[0, 150:200, 10:250] = 2
    maps[0, :2, :2] = 3  # too small to be asked for
    canvas = sam.Labelled(torch.zeros(3, sam.SIZE, sam.SIZE, dtype=torch.uint8), maps)
    asked = sam.ask(canvas, np.random.default_rng(0))
    assert asked is not None
    assert len(asked.masks) == sam.PROMPTS  # by turns, where there are fewer
    assert {int(mask.sum()) for mask in asked.masks} == {70 * 90, 50 * 240}
    assert asked.pointed.all()
    for mask, point, box in zip(asked.masks, asked.points, asked.boxes, strict=True):
        assert mask[int(point[1]), int(point[0])] == 1
        rows, columns = mask.nonzero(as_tuple=True)
        tight = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - tight).abs().max() <= 10


def test_superpixels_are_asked_for_by_boxes_alone() -> None:
    image = torch.zeros(3, sam.SIZE, sam.SIZE, dtype=torch.uint8)
    image[:, :, 100:] = 255
    maps = torch.from_numpy(sam.superpixels(image, 300.0).astype(np.int32))[None]
    assert set(maps.unique().tolist()) == {-2, -1}
    both = sam.ask(sam.Labelled(image, maps), np.random.default_rng(0))
    maps[0, 20:90, 120:190] = 1
    mixed = sam.ask(sam.Labelled(image, maps), np.random.default_rng(0))
    assert both is not None and mixed is not None
    assert len(both.boxes) == sam.PROMPTS and both.points.shape == (0, 2)
    assert len(mixed.points) == int(mixed.pointed.sum()) < sam.PROMPTS
    for mask, (x, y) in zip(mixed.masks[mixed.pointed], mixed.points.long().tolist(), strict=True):
        assert int(mask.sum()) == 70 * 70
        assert mask[y, x] == 1


def test_a_canvas_without_masks_is_drawn_again() -> None:
    plain = torch.full((3, 300, 300), 128, dtype=torch.uint8)  # one superpixel, as large as all
    maps = torch.zeros(1, 300, 300, dtype=torch.int32)
    maps[0, 100:200, 100:200] = 1
    outlined = {name: [sam.Labelled(plain, maps)] for name in sam.SHARES}
    canvases, generator = sam.Canvases(outlined, [plain]), np.random.default_rng(0)
    assert sam.ask(sam.Labelled(plain, torch.zeros_like(maps)), generator) is None
    for _ in range(20):
        canvas, asked = canvases.draw(generator)
        assert canvas.image.shape == (3, sam.SIZE, sam.SIZE)
        assert len(asked.masks) == sam.PROMPTS


def test_hidden_patches_are_a_block_in_every_other_picture() -> None:
    masks = dinov2.draw_masks(8, 6, torch.Generator().manual_seed(0))
    counts = masks.flatten(1).sum(1)
    assert (counts[1::2] == 0).all()
    assert (counts[::2] > 0).all()
    for mask in masks[::2]:
        rows, columns = mask.nonzero(as_tuple=True)
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_a_training_that_is_cut_off_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.pocket.recipes.checkpoint.EVERY", 0.0)

    def run(path: Path, until: int, steps: int = 6) -> tuple[torch.Tensor, Checkpoint]:
        torch.manual_seed(0)
        model, scale = nn.Linear(3, 2), nn.Parameter(torch.ones([]))
        optimizer = torch.optim.AdamW([*model.parameters(), scale], lr=0.1)
        generator = torch.Generator().manual_seed(1)
        parts = {"model": model, "optimizer": optimizer}
        saved = Checkpoint(path, parts, generator, ORIGIN, scalars=[scale])
        while saved.step < until:
            inputs = torch.randn(4, 3, generator=generator)
            loss = (scale * model(inputs)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            saved.told(loss=loss.item())
            saved.done(saved.step == steps - 1)
        return torch.cat([model.weight.detach().flatten(), scale.detach()[None]]), saved

    whole, first = run(tmp_path / "whole.pt", 6)
    run(tmp_path / "cut.pt", 3)
    resumed, second = run(tmp_path / "cut.pt", 6)
    assert torch.equal(whole, resumed)
    assert [row["loss"] for row in first.curve] == [row["loss"] for row in second.curve]


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"seed": 1}, "seed 1,"), ({"steps": 7}, "7 steps"), ({"data": "2e" * 32}, "data 2e2e2e")],
)
def test_a_finished_training_of_another_seed_or_other_data_is_refused(
    tmp_path: Path, changed: dict[str, int | str], told: str
) -> None:
    def opened(origin: Origin) -> Checkpoint:
        parts = {"model": nn.Linear(3, 2)}
        return Checkpoint(tmp_path / "it.pt", parts, torch.Generator(), origin)

    opened(ORIGIN).done(finished=True)
    assert opened(ORIGIN).step == 1
    with pytest.raises(RecipeError, match=rf"of seed 0, 6 steps.*{told}.*another --work folder"):
        opened(replace(ORIGIN, **changed))  # type: ignore[arg-type]
    state = torch.load(tmp_path / "it.pt")
    del state["origin"]
    torch.save(state, tmp_path / "it.pt")
    with pytest.raises(RecipeError, match=r"a seed and data that it does not tell"):
        opened(ORIGIN)


def test_a_work_folder_is_of_one_data(tmp_path: Path) -> None:
    sets = ("tiny-imagenet-100", "flickr8k")
    for name, labels in (("one", [0, 1]), ("same", [0, 1]), ("other", [0, 2])):
        write_sets(tmp_path / name, labels)
    one, same, other = (fingerprint(tmp_path / name, sets) for name in ("one", "same", "other"))
    assert one == same != other
    (tmp_path / "same" / "tiny-imagenet-100" / "classes.txt").write_text("0\tn0\tanother name")
    assert fingerprint(tmp_path / "same", sets) != one
    for _ in range(2):
        claim(tmp_path / "work", one)
    with pytest.raises(RecipeError, match="made of other image sets; give another --work"):
        claim(tmp_path / "work", other)
    with pytest.raises(RecipeError, match="made of other image sets"):
        claim(tmp_path / "one", one)  # holds files that nothing is said of


def test_what_a_user_gets_wrong_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no train-\*\.tar in .*image sets as --data"):
        recipes.main(["clip", "--data", str(tmp_path), "--work", str(tmp_path / "work")])
    with pytest.raises(RecipeError, match="unknown teacher 'dino'; known: clip, siglip"):
        recipes.main(["dino", "--data", str(tmp_path)])
    assert not (tmp_path / "work").exists()
