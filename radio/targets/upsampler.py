"""A trained upsampler from a file, for view mode `sharpened` (FeatSharp 2502.16025 trains such)."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from radio.errors import RadioError
from radio.files import sha256_of


class FileUpsampler:
    """Call an exported program: features [b, d, h, w], normalised views [b, 3, H, W] to finer ones.

    The file is what `torch.export.save(torch.export.export(module, (features, pixels)), path)`
    writes. Files that could only be read by unpickling are refused, since that would run their
    code.

    Raises:
        RadioError: no such file, another kind of file, or one that needs unpickling.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        _refuse_pickles(Path(path))
        try:
            program = torch.export.load(path)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RadioError(f"upsampler {path} is no exported program: {error}") from error
        self._module = program.module().to(device)
        self.sha256 = sha256_of(Path(path))

    def __call__(
        self, features: Float[Tensor, "b d h w"], pixels: Float[Tensor, "b 3 height width"]
    ) -> Float[Tensor, "b d rows columns"]:
        """Return the finer features.

        Raises:
            RadioError: the program takes other sizes, or returns another number of channels.
        """
        try:
            finer: Tensor = self._module(features, pixels)
        except (RuntimeError, AssertionError) as error:
            raise RadioError(
                f"upsampler {self.path} does not take features {tuple(features.shape)} with views "
                f"{tuple(pixels.shape)}; export it with a dynamic batch, for this teacher: {error}"
            ) from error
        if finer.ndim != 4 or finer.shape[:2] != features.shape[:2]:
            raise RadioError(
                f"upsampler {self.path} returned {tuple(finer.shape)} for features "
                f"{tuple(features.shape)}; batch and channels must stay"
            )
        return finer


def _refuse_pickles(path: Path) -> None:
    """Look into the archive: only raw bytes and plain tensors are read."""
    if not path.is_file():
        raise RadioError(f"there is no upsampler file {path}")
    if not zipfile.is_zipfile(path):
        raise RadioError(f"upsampler {path} is no .pt2 archive of torch.export.save")
    with zipfile.ZipFile(path) as archive:
        bad = [name for name in archive.namelist() if _runs_code(archive, name)]
    if bad:
        raise RadioError(
            f"upsampler {path} holds {bad[0]}, which could only be read by running its code; "
            "export a module of plain tensors and operations"
        )


def _runs_code(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether torch.export.load would unpickle more than tensors from an entry."""
    base = name.rsplit("/", 1)[-1]
    if base.endswith("_config.json"):
        return '"use_pickle": true' in json.dumps(json.loads(archive.read(name)))
    if base.endswith((".pt", ".pth", ".pkl")):
        try:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            return True
    return base.startswith(("custom_obj", "opaque_obj"))
