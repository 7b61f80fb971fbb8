"""A fused encoder as the vision tower of a stock vision-language model of transformers.

    radio demo && python examples/vlm_tower.py                  # runs/demo/encoder, two photographs
    python examples/vlm_tower.py encoder cat.jpg cup.png --train-tower --steps 100

The model is transformers' own `NemotronH_Omni_Reasoning_V3`: no remote code, no subclass. It takes
any `RadioModel` as tower and other language models than its own, here a tiny Qwen2. Pictures keep
their shapes: their patches are packed one after the other, `image_grid_hw` names each grid, and
2 x 2 patches become one token. The model learns to say a picture's file name. It prints

    tower      12 blocks of width 192, frozen; not in the encoder: the video projection
    pictures   coffee 26 x 38 patches, chelsea 20 x 30 patches
    training   loss 5.624 -> 0.137 in 40 steps, first gradient of the projector 6.1
    generated  coffee: 'coffee', chelsea: 'chelsea'
    reloaded   from runs/vlm, largest difference of the logits 0.0
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import skimage
import torch
import typer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3ImageProcessor,
    NemotronH_Omni_Reasoning_V3Processor,
    NemotronH_Omni_Reasoning_V3VideoProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RadioConfig,
    RadioModel,
)
from transformers.utils import logging

PHOTOGRAPHS = [Path(skimage.__file__).parent / "data" / f"{n}.png" for n in ("coffee", "chelsea")]
VIDEO = "embeddings.video_patch_projection.weight"


def load_tower(encoder: Path) -> RadioModel:
    """Return the encoder with a place for a video projection, which it does not have."""
    # As an argument of from_pretrained the key would come too late to size the projection.
    fields = {**RadioConfig.from_pretrained(encoder).to_dict(), "video_temporal_patch_size": 2}
    tower, info = RadioModel.from_pretrained(
        encoder, config=RadioConfig(**fields), output_loading_info=True
    )
    strange = {kind: set(keys) - {VIDEO} for kind, keys in info.items() if set(keys) - {VIDEO}}
    if strange:
        raise ValueError(f"{encoder} does not hold the tower's weights: {strange}")
    return tower


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes, so that nothing is downloaded.

    A real language model brings its own; add the three image tokens to it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    image = {"image_token": "<image>", "image_start_token": "<img>", "image_end_token": "</img>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",  # prompts of several lengths end together for `generate`
        extra_special_tokens=image,
    )


def build_vlm(tower: RadioModel, tokenizer: PreTrainedTokenizerFast) -> NemotronH_Omni_Reasoning_V3:
    """Return a tiny model whose tower has the encoder's weights; the rest is fresh."""
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_nextn_predict_layers=0,  # a field of NemotronH's own language model that is asked for
    )
    config = NemotronH_Omni_Reasoning_V3_Config(
        vision_config=tower.config,
        text_config=text,
        vision_hidden_size=tower.config.hidden_size,
        projector_hidden_size=256,
        video_temporal_patch_size=tower.config.video_temporal_patch_size,  # both must say it
        image_token_id=tokenizer.image_token_id,
    )
    vlm = NemotronH_Omni_Reasoning_V3(config)
    tower.make_preprocessor_external()  # the model did it to its own: normalising happens outside
    vlm.vision_model.load_state_dict(tower.state_dict())
    return vlm


def build_processor(
    vision: RadioConfig, tokenizer: PreTrainedTokenizerFast, max_patches: int = 1024
) -> NemotronH_Omni_Reasoning_V3Processor:
    """Return the model's own processor: it resizes, normalises in the encoder's place, packs."""
    mean, std, patch = list(vision.norm_mean), list(vision.norm_std), vision.patch_size
    images = NemotronH_Omni_Reasoning_V3ImageProcessor(
        patch_size=patch,
        image_mean=mean,
        image_std=std,
        min_num_patches=16,
        max_num_patches=max_patches,
    )
    videos = NemotronH_Omni_Reasoning_V3VideoProcessor(
        patch_size=patch, norm_mean=mean, norm_std=std
    )
    sounds = ParakeetFeatureExtractor()  # as unused as `videos`, but the class wants both
    return NemotronH_Omni_Reasoning_V3Processor(images, videos, tokenizer, sounds)


def make_batch(
    processor: NemotronH_Omni_Reasoning_V3Processor,
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
) -> BatchFeature:
    """Return a prompt per picture, of whatever shape; with captions, answers and `labels` too."""
    tokenizer = processor.tokenizer
    answers = [text + tokenizer.eos_token for text in captions or ()] or [""] * len(pictures)
    texts = [tokenizer.image_token + answer for answer in answers]
    batch = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    if captions:
        ids = batch["input_ids"]
        answer = (ids < tokenizer.pad_token_id) | (ids == tokenizer.eos_token_id)
        batch["labels"] = ids.masked_fill(~answer, -100)  # no loss on image tokens and padding
    return batch


def training_step(
    vlm: NemotronH_Omni_Reasoning_V3, optimizer: torch.optim.Optimizer, batch: BatchFeature
) -> tuple[float, float]:
    """Take one step; return the loss and the norm of the projector's gradient before it."""
    vlm.train()
    optimizer.zero_grad()
    loss = vlm(**batch).loss
    loss.backward()
    gradients = [parameter.grad for parameter in vlm.multi_modal_projector.parameters()]
    optimizer.step()
    return loss.item(), torch.nn.utils.get_total_norm(gradients).item()


def main(
    encoder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A folder from `radio fuse`.")
    ] = Path("runs/demo/encoder"),
    pictures: Annotated[list[Path] | None, typer.Argument(help="Named as they show.")] = None,
    train_tower: Annotated[bool, typer.Option(help="Train the tower, too.")] = False,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 40,
    out: Annotated[Path, typer.Option(help="Where the model is saved.")] = Path("runs/vlm"),
) -> None:
    """Train a tiny vision-language model on a few pictures, let it speak, save and reload it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    paths = pictures or PHOTOGRAPHS
    images, names = [Image.open(path) for path in paths], [path.stem for path in paths]

    tower, tokenizer = load_tower(encoder), byte_tokenizer()
    processor = build_processor(tower.config, tokenizer)
    vlm = build_vlm(tower, tokenizer)
    vlm.vision_model.requires_grad_(train_tower)
    size = f"{tower.config.num_hidden_layers} blocks of width {tower.config.hidden_size}"
    state = "trained" if train_tower else "frozen"
    print(f"tower      {size}, {state}; not in the encoder: the video projection")

    batch = make_batch(processor, images, names)
    grids = zip(names, batch["image_grid_hw"].tolist(), strict=True)
    print("pictures  ", ", ".join(f"{name} {h} x {w} patches" for name, (h, w) in grids))

    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=3e-3)
    losses, norms = zip(*(training_step(vlm, optimizer, batch) for _ in range(steps)), strict=True)
    change = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps"
    print(f"training   {change}, first gradient of the projector {norms[0]:.2g}")

    vlm.eval()
    prompts = make_batch(processor, images)
    tokens = vlm.generate(**prompts, max_new_tokens=16, do_sample=False)
    start = prompts["input_ids"].shape[1]
    texts = processor.batch_decode(tokens[:, start:], skip_special_tokens=True)
    print("generated ", ", ".join(f"{n}: {text!r}" for n, text in zip(names, texts, strict=True)))

    vlm.save_pretrained(out)
    processor.save_pretrained(out)
    again = NemotronH_Omni_Reasoning_V3.from_pretrained(out).eval()
    with torch.no_grad():
        difference = (again(**prompts).logits - vlm(**prompts).logits).abs().max().item()
    print(f"reloaded   from {out}, largest difference of the logits {difference}")


if __name__ == "__main__":
    typer.run(main)
