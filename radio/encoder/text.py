"""Which text tower goes with which adaptor of an encoder, and building it when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radio.encoder.same_teacher import check_teacher
from radio.errors import RadioError
from teachers.text import TEXT_KINDS, TextTower, build_text_tower


@dataclass(frozen=True)
class TextSource:
    """What an encoder says of a teacher whose summaries it gives: `facts` and their channels."""

    name: str
    facts: Mapping[str, Any]
    summary_dim: int

    @property
    def may_have_text(self) -> bool:
        """Whether teachers of this kind have a text tower, or the kind is not said."""
        return "kind" not in self.facts or self.facts["kind"] in TEXT_KINDS

    def build(self, weights: str | Path | None, tokenizer: str | Path | None) -> TextTower:
        """Build the tower; `weights` (file, folder or tag) go before those that the facts name.

        Those of the facts must be what the encoder was distilled from; `weights` may hold texts
        alone and are not compared.

        Raises:
            RadioError: the folder says too little, weights or tokenizer cannot be had, the
                teacher's weights are others by now, or the tower is of another width than the
                summary.
        """
        missing = [key for key in ("kind", "options") if key not in self.facts]
        if missing:
            raise RadioError(
                f"this encoder does not say which text tower goes with '{self.name}' (its "
                f"config.json has no {' and no '.join(missing)}): it was fused before encoders "
                "did; make it anew with `radio fuse RUN FOLDER`"
            )
        pretrained = self.facts.get("pretrained") if weights is None else str(weights)
        if pretrained is None and "seed" not in self.facts:
            raise RadioError(
                f"this encoder does not say which weights the text tower of '{self.name}' has; "
                "pass text_weights="
            )
        try:
            tower = build_text_tower(
                self.facts["kind"],
                self.name,
                dict(self.facts["options"]),
                pretrained,
                int(self.facts.get("seed", 0)),
                tokenizer,
            )
        except (ValueError, OSError) as error:
            raise RadioError(f"{error}; text_weights= and tokenizer= take local paths") from error
        if weights is None:
            check_teacher(self.name, self.facts, "this encoder")
        if tower.dim != self.summary_dim:
            raise RadioError(
                f"the text tower of '{self.name}' gives {tower.dim} channels but its summary has "
                f"{self.summary_dim}; pass the text_weights= of this teacher's own model"
            )
        return tower
