"""The encoders that come with the package: a folder each beside this file."""

from __future__ import annotations

from pathlib import Path

from radio.errors import RadioError

HERE = Path(__file__).parent
DEFAULT = "pocket"  # what `radio encode` takes when no other is named
CONFIG = "config.json"


def shipped() -> dict[str, Path]:
    """Return the encoder folders that ship, by the names that `radio.load` takes."""
    return {path.parent.name: path.parent for path in sorted(HERE.glob(f"*/{CONFIG}"))}


def located(path: str | Path) -> Path:
    """Return a path that exists, or the folder of the shipped encoder of that name.

    Raises:
        RadioError: neither; the names of those that ship are listed.
    """
    if Path(path).exists():
        return Path(path)
    known = shipped()
    if str(path) not in known:
        raise RadioError(
            f"{path} does not exist; expected an encoder folder, a .pth.tar file, or the name of "
            f"an encoder that ships ({', '.join(known) or 'none does here'})"
        )
    return known[str(path)]


def default() -> Path:
    """Return the folder of the encoder that is taken when none is named.

    Raises:
        RadioError: it does not ship with this installation.
    """
    known = shipped()
    if DEFAULT not in known:
        raise RadioError(
            f"no encoder is named, and '{DEFAULT}' does not ship with this installation "
            f"({', '.join(known) or 'no other does'}); give an encoder folder with --model"
        )
    return known[DEFAULT]
