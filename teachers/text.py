"""The text towers of CLIP and SigLIP: texts to unit vectors in the space of a teacher's summary.

They are built from the same kind, options and weights as the image towers, whose modules drop
them. open_clip and transformers are slow to import, so that happens when a tower is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from teachers.base import seeded
from teachers.weights import load_state, load_strictly

Tokenize = Callable[[list[str]], Tensor]
Template = str | Callable[[str], str]

BATCH = 1024  # texts per forward
CLASSES = 10  # of a zero-shot classifier at once
DEFAULT_CONTEXT = 77  # open_clip's, of models that do not say one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class TextTower(nn.Module):
    """A frozen text encoder with its own tokenizer; texts beyond its context are cut, as upstream.

    `dim` is that of the teacher's summary.
    """

    def __init__(self, name: str, model: nn.Module, tokenize: Tokenize, dim: int, vocab: int):
        super().__init__()
        self.name = name
        self.model = model
        self.tokenize = tokenize
        self.dim = dim
        self.vocab = vocab
        self.float().eval().requires_grad_(False)

    def train(self, mode: bool = True) -> TextTower:
        """Stay in eval mode whatever is asked, like the image towers."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: str | Sequence[str], batch: int = BATCH) -> Float[Tensor, "texts dim"]:
        """Return a unit vector per text; ValueError for none, or a tokenizer of another model."""
        several = [texts] if isinstance(texts, str) else list(texts)
        if not several or not all(isinstance(text, str) for text in several):
            raise ValueError(f"teacher '{self.name}': expected one text or more, got {several[:3]}")
        device = next(self.parameters()).device
        parts = [
            self.embed(self._tokens(several[start : start + batch]).to(device))
            for start in range(0, len(several), batch)
        ]
        return F.normalize(torch.cat(parts), dim=-1)

    def embed(self, tokens: Int[Tensor, "texts context"]) -> Float[Tensor, "texts dim"]:
        """Return the tower's pooled and projected output."""
        output: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return output

    def _tokens(self, texts: list[str]) -> Int[Tensor, "texts context"]:
        tokens = self.tokenize(texts)
        if int(tokens.max()) >= self.vocab:
            raise ValueError(
                f"teacher '{self.name}': the tokenizer gives token {int(tokens.max())} but the "
                f"text tower knows {self.vocab}; give the tokenizer of this model"
            )
        return tokens


class TransformersTextTower(TextTower):
    """SigLIP's and SigLIP2's in transformers: the projected last token, nothing masked."""

    def embed(self, tokens: Int[Tensor, "texts context"]) -> Float[Tensor, "texts dim"]:
        """Return `pooler_output`."""
        output: Tensor = self.model(input_ids=tokens).pooler_output
        return output


def build_text_tower(
    kind: str,
    name: str,
    options: dict[str, Any],
    pretrained: str | None,
    seed: int,
    tokenizer: str | Path | None = None,
) -> TextTower:
    """Build the text tower of the teacher `name` of a kind.

    `options`, `pretrained` and `seed` are those of `build_teacher`; NVIDIA's names for kinds,
    open_clip and siglip2, are known too. `tokenizer` is a folder as `save_pretrained` writes it,
    or a file in it; without it files next to local weights are taken, or those of the hub where
    the weights come from there. Raises ValueError for a kind without text, unfitting weights, or a
    tokenizer that cannot be had.
    """
    if kind not in TEXT_KINDS:
        raise ValueError(
            f"teacher '{name}': the kind '{kind}' has no text tower; kinds that have one: "
            f"{', '.join(TEXT_KINDS)}"
        )
    return TEXT_KINDS[kind](name, options, pretrained, seed, tokenizer)


def _open_clip(
    name: str,
    options: dict[str, Any],
    pretrained: str | None,
    seed: int,
    tokenizer: str | Path | None,
) -> TextTower:
    import open_clip

    from teachers.open_clip_tower import VISUAL, build_whole

    model, side = str(options.get("model")), options.get("image_size")
    # The image tower is built too, so that seeded weights are those of the teacher.
    whole, path = build_whole(name, model, side, pretrained, seed)
    config = open_clip.get_model_config(model)
    from_hub = pretrained is not None and path is None
    tokenize = _open_clip_tokenizer(name, config["text_cfg"], path, from_hub, tokenizer)
    whole.visual = None
    if path is not None:
        state = {k: v for k, v in load_state(path).items() if not k.startswith(VISUAL)}
        load_strictly(name, whole, state, str(path))
    return TextTower(name, whole, tokenize, int(config["embed_dim"]), int(whole.vocab_size))


def _open_clip_tokenizer(
    name: str,
    config: dict[str, Any],
    path: Path | None,
    from_hub: bool,
    tokenizer: str | Path | None,
) -> Tokenize:
    import open_clip

    options = config.get("tokenizer_kwargs", {})
    context = int(config.get("context_length", DEFAULT_CONTEXT))
    source = config.get("hf_tokenizer_name")
    if not source:  # OpenAI's BPE, which open_clip brings along
        if tokenizer is not None:
            raise ValueError(
                f"teacher '{name}': this model reads open_clip's own tokenizer, so leave out "
                f"'{tokenizer}'"
            )
        own: Tokenize = open_clip.SimpleTokenizer(context_length=context, **options)
        return own
    place = _tokenizer_place(name, tokenizer, path, source if from_hub else None)
    return _hub_tokenizer(name, place, context, config.get("tokenizer_mode"), options)


def _siglip(
    name: str,
    options: dict[str, Any],
    pretrained: str | None,
    seed: int,
    tokenizer: str | Path | None,
) -> TextTower:
    from transformers import AutoConfig, Siglip2TextModel, SiglipTextModel

    from teachers.siglip_naflex import RELEASES
    from teachers.transformers_trunk import trunk_state

    if pretrained is None:
        raise ValueError(
            f"teacher '{name}': its seeded weights are an image tower alone; give the text tower's "
            f"weights: a local folder of a whole SigLIP model, or one of {', '.join(RELEASES)}"
        )
    state = trunk_state(name, pretrained, ("text_model.",), RELEASES)
    path = Path(pretrained).expanduser()
    folder = path.parent if path.is_file() else path
    try:
        config = AutoConfig.from_pretrained(
            folder if folder.is_dir() else pretrained, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher '{name}': the text tower's shape is read from config.json, which is not with "
            f"'{pretrained}' ({_short(error)}); put it next to the weights"
        ) from error
    models = {"siglip": SiglipTextModel, "siglip2": Siglip2TextModel}
    if config.model_type not in models:
        raise ValueError(
            f"teacher '{name}': '{pretrained}' is a model of type '{config.model_type}', expected "
            f"{' or '.join(models)}"
        )
    text = config.text_config
    hub = None if folder.is_dir() else pretrained
    place = _tokenizer_place(name, tokenizer, folder if hub is None else None, hub)
    # The last position is pooled, so a tokenizer that pads on the left, as Gemma's does where
    # nothing else is said, would change everything.
    cleaning = {"clean": "canonicalize", "padding_side": "right"}
    tokenize = _hub_tokenizer(name, place, text.max_position_embeddings, None, cleaning)
    with seeded(seed):
        model = models[config.model_type](text)
    load_strictly(name, model, state, pretrained)
    return TransformersTextTower(name, model, tokenize, text.projection_size, text.vocab_size)


def _tokenizer_place(
    name: str, given: str | Path | None, weights: Path | None, hub: str | None
) -> str:
    """Return the folder, or hub name where the weights come from the hub, to read files from."""
    if given is not None:
        path = Path(given).expanduser()
        folder = path.parent if path.is_file() else path
        if not _has_tokenizer(folder):
            raise ValueError(
                f"teacher '{name}': '{given}' holds no tokenizer; expected a folder with "
                f"{' or '.join(TOKENIZER_FILES)}"
            )
        return str(folder)
    if weights is not None:
        folder = weights.parent if weights.is_file() else weights
        if _has_tokenizer(folder):
            return str(folder)
    if hub is not None:
        return hub
    beside = "its weights are seeded" if weights is None else f"there is none next to '{weights}'"
    raise ValueError(
        f"teacher '{name}': its texts need a tokenizer, and {beside}; "
        f"give a local folder that holds {' or '.join(TOKENIZER_FILES)} as `tokenizer`"
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _hub_tokenizer(
    name: str, place: str, context: int, mode: str | None, options: dict[str, Any]
) -> Tokenize:
    """Return open_clip's reader of a tokenizer: cleaned as asked, padded to the context."""
    import open_clip

    try:
        tokenize: Tokenize = open_clip.tokenizer.HFTokenizer(
            place, context_length=context, tokenizer_mode=mode, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher '{name}': the tokenizer of '{place}' cannot be had ({_short(error)}); give a "
            "local folder as `tokenizer`"
        ) from error
    return tokenize


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


TEXT_KINDS = {
    "clip": _open_clip,
    "siglip": _open_clip,
    "siglip_naflex": _siglip,
    "open_clip": _open_clip,
    "siglip2": _siglip,
}


def zero_shot_weights(
    tower: Callable[[Sequence[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[Template],
    batch: int = CLASSES,
) -> Float[Tensor, "dim classes"]:
    """Return a unit column per class: the mean direction of its name in each template.

    Unit summaries [B, dim] times this are the cosines [B, classes] (CLIP, 2103.00020, 3.1.4).
    `tower` is a TextTower or another function from texts to unit vectors; a template is a
    function, or a text with {} in the name's place; `batch` classes go through at once. Raises
    ValueError for no classes or templates, or a template without a place.
    """
    if not classes or not templates:
        raise ValueError(f"{len(classes)} classes and {len(templates)} templates; expected some")
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(
                f"the template '{template}' has no {{}}, the place of the class's name"
            )
    columns = []
    for start in range(0, len(classes), batch):
        names = classes[start : start + batch]
        texts = [_filled(template, name) for name in names for template in templates]
        means = tower(texts).unflatten(0, (len(names), len(templates))).mean(dim=1)
        columns.append((means / means.norm(dim=1, keepdim=True)).T)
    return torch.cat(columns, dim=1)


def _filled(template: Template, name: str) -> str:
    return template.replace("{}", name) if isinstance(template, str) else template(name)
