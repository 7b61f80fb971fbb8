"""A fused encoder as the vision tower of a stock vision-language model of transformers.

    radio demo                                                      # makes runs/demo/encoder
    python examples/vlm_tower.py runs/demo/encoder                  # two photographs of scikit-image
    python examples/vlm_tower.py runs/demo/encoder cat.jpg cup.png --train-tower --steps 100

The model is transformers' own `NemotronH_Omni_Reasoning_V3`: no remote code, no subclass. It takes
any `RadioModel` as tower and, for the language model, a tiny Qwen2 here (swap in yours). Pictures
keep their shapes: their patches are packed one after the other and `image_grid_hw` names each grid;
2 x 2 patches become one token. The file names are the captions that are learnt. It prints

    tower      12 blocks of width 192, frozen; not in the encoder: the video projection
    pictures   coffee 26 x 38 patches, chelsea 20 x 30 patches
    training   loss 5.598 -> 0.000 in 30 steps, gradient of the projector 4.84
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
from torch import Tensor
from transformers import (
    AutoConfig,
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes, since nothing is downloaded here.

    With a real language model take its tokenizer, and add these three image tokens to it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    image_tokens = {"image_token": "<image>", "image_start_token": "<img>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",  # the prompts of one `generate` end together
        extra_special_tokens={**image_tokens, "image_end_token": "</img>"},
    )


def vlm_config(
    encoder: Path, tokenizer: PreTrainedTokenizerFast
) -> NemotronH_Omni_Reasoning_V3_Config:
    """Return a tiny model's configuration around the encoder's own."""
    # Both configurations must say how many frames a video patch has, even if no video is shown;
    # from_pretrained(..., video_temporal_patch_size=2) would not derive the patch's width from it.
    vision = {**AutoConfig.from_pretrained(encoder).to_dict(), "video_temporal_patch_size": 2}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_nextn_predict_layers=0,  # of NemotronH's own language model; the class asks for it
    )
    return NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision,
        text_config=text,
        vision_hidden_size=vision["hidden_size"],
        projector_hidden_size=256,
        video_temporal_patch_size=2,
        image_token_id=tokenizer.image_token_id,
    )


def build_vlm(
    encoder: Path, config: NemotronH_Omni_Reasoning_V3_Config
) -> NemotronH_Omni_Reasoning_V3:
    """Return the model with the encoder's weights in its tower; the rest is fresh."""
    tower, info = RadioModel.from_pretrained(
        encoder, config=config.vision_config, output_loading_info=True
    )
    strange = {key: set(found) - {VIDEO} for key, found in info.items() if set(found) - {VIDEO}}
    if strange:
        raise ValueError(f"{encoder} is not a whole encoder: {strange}")
    tower.make_preprocessor_external()  # as the model does: normalising is the processor's work
    vlm = NemotronH_Omni_Reasoning_V3(config)
    vlm.vision_model.load_state_dict(tower.state_dict())  # strict
    return vlm


def build_processor(
    vision: RadioConfig, tokenizer: PreTrainedTokenizerFast, max_patches: int = 1024
) -> NemotronH_Omni_Reasoning_V3Processor:
    """Return the model's own processor: pixels normalised as the encoder wants them, then packed.

    The encoder alone takes pixels in [0, 1]; here its statistics move into the processor.
    """
    mean, std, patch = vision.norm_mean, vision.norm_std, vision.patch_size
    return NemotronH_Omni_Reasoning_V3Processor(
        image_processor=NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=patch,
            image_mean=mean,
            image_std=std,
            min_num_patches=16,
            max_num_patches=max_patches,
        ),
        tokenizer=tokenizer,
        # The class insists on the parts for films and sound, too.
        video_processor=NemotronH_Omni_Reasoning_V3VideoProcessor(
            patch_size=patch, norm_mean=mean, norm_std=std
        ),
        feature_extractor=ParakeetFeatureExtractor(),
    )


def make_batch(
    processor: NemotronH_Omni_Reasoning_V3Processor,
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
) -> BatchFeature:
    """Return one prompt per picture, whatever the shapes; with captions also `labels`."""
    tokenizer = processor.tokenizer
    answers = [caption + tokenizer.eos_token for caption in captions or ()]
    texts = [tokenizer.image_token + answer for answer in answers or [""] * len(pictures)]
    batch = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    if captions:
        ids = batch["input_ids"]
        learnt = (ids < tokenizer.pad_token_id) | (ids == tokenizer.eos_token_id)
        batch["labels"] = ids.masked_fill(~learnt, -100)  # no loss on image tokens and padding
    return batch


def training_step(
    vlm: NemotronH_Omni_Reasoning_V3, optimizer: torch.optim.Optimizer, batch: BatchFeature
) -> Tensor:
    """Take one step and return the loss; gradients stay until the next step, to be looked at."""
    vlm.train()
    optimizer.zero_grad()
    loss: Tensor = vlm(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def main(
    encoder: Annotated[Path, typer.Argument(help="A folder from `radio fuse`.")] = Path(
        "runs/demo/encoder"
    ),
    pictures: Annotated[list[Path] | None, typer.Argument(help="Named by their captions.")] = None,
    train_tower: Annotated[bool, typer.Option(help="Train the tower, too.")] = False,
    steps: Annotated[int, typer.Option(help="Training steps on these pictures.", min=1)] = 30,
    out: Annotated[Path, typer.Option(help="Folder of the saved model.")] = Path("runs/vlm"),
) -> None:
    """Train a tiny VLM with the encoder as its tower, generate, save and reload."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    paths = pictures or PHOTOGRAPHS
    images, names = [Image.open(path) for path in paths], [path.stem for path in paths]

    tokenizer = byte_tokenizer()
    config = vlm_config(encoder, tokenizer)
    processor = build_processor(config.vision_config, tokenizer)
    vlm = build_vlm(encoder, config)
    vlm.vision_model.requires_grad_(train_tower)
    vision = config.vision_config
    shape = f"{vision.num_hidden_layers} blocks of width {vision.hidden_size}"
    state = "trained" if train_tower else "frozen"
    print(f"tower      {shape}, {state}; not in the encoder: the video projection")

    batch = make_batch(processor, images, names)
    grids = zip(names, batch["image_grid_hw"].tolist(), strict=True)
    print("pictures  ", ", ".join(f"{name} {rows} x {cols} patches" for name, (rows, cols) in grids))

    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=1e-3)
    losses = [training_step(vlm, optimizer, batch).item() for _ in range(steps)]
    gradient = vlm.multi_modal_projector.linear_1.weight.grad.norm()
    change = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps"
    print(f"training   {change}, gradient of the projector {gradient:.2g}")

    vlm.eval()
    prompts = make_batch(processor, images)
    tokens = vlm.generate(**prompts, max_new_tokens=16, do_sample=False)
    new = processor.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    print("generated ", ", ".join(f"{n}: {text!r}" for n, text in zip(names, new, strict=True)))

    vlm.save_pretrained(out)
    processor.save_pretrained(out)
    again = NemotronH_Omni_Reasoning_V3.from_pretrained(out).eval()
    with torch.no_grad():
        difference = (again(**prompts).logits - vlm(**prompts).logits).abs().max().item()
    print(f"reloaded   from {out}, largest difference of the logits {difference}")


if __name__ == "__main__":
    typer.run(main)
