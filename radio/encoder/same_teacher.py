"""Is a teacher still the one that an encoder was distilled from?

An adaptor gives the space of its own teacher. The text tower or mask decoder of another, such as of
the same name trained anew, would read it without complaint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from radio.errors import RadioError
from teachers import build_teacher


def check_teacher(name: str, facts: Mapping[str, Any], encoder: str) -> None:
    """Build the teacher that an encoder's facts name, and refuse it as `check_fingerprint`.

    Facts without a fingerprint, as of NVIDIA's encoders, have nothing to compare.

    Raises:
        RadioError: its weights are others, or cannot be had.
    """
    if "fingerprint" not in facts:
        return
    try:
        teacher = build_teacher(
            facts["kind"],
            name,
            dict(facts["options"]),
            facts.get("pretrained"),
            int(facts.get("seed", 0)),
        )
    except (ValueError, OSError, TypeError) as error:
        raise RadioError(
            f"whether '{name}' is still the teacher of {encoder} cannot be said: {error}"
        ) from error
    check_fingerprint(name, facts, teacher.fingerprint, encoder)


def check_fingerprint(name: str, facts: Mapping[str, Any], fingerprint: str, encoder: str) -> None:
    """Refuse a teacher whose fingerprint is not the one that an encoder's facts record, if any.

    Raises:
        RadioError: it is another.
    """
    if facts.get("upsampler") is not None:
        # A run's fingerprint covers what made the features finer, as TargetMaker.facts has it.
        both = f"{fingerprint}/{facts['upsampler']}"
        fingerprint = hashlib.sha256(both.encode()).hexdigest()
    recorded = facts.get("fingerprint", fingerprint)
    if recorded != fingerprint:
        raise RadioError(
            f"teacher '{name}' has other weights than when {encoder} was distilled from it "
            f"(fingerprint {fingerprint[:12]}, then {recorded[:12]}), so its adaptor does not fit "
            "what goes with them; give the teacher back its weights, distil anew, or fuse the run "
            "anew if an earlier version of this package did"
        )
