"""What a saved folder says of itself: its manifest, and whether its files are what that says. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlazy import __version__
from qlazy.calibrating.calibration import Calibrated
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UsageError
from qlazy.saving.durable import hash_file
from qlazy.saving.folder import LAST, MANIFEST
from qlazy.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save wrote."""

    folder: Path
    """The folder."""
    layout: str
    """Whose layout it has: compressed-tensors, bitsandbytes or gptq."""
    nbytes: int
    """Bytes of all tensors."""
    shards: int
    """Files that they are in."""
    shards_resumed: int
    """Of these, files that an earlier attempt had completed."""
    seconds: float
    """How long it took."""
    calibrated: Calibrated | None = None
    """What was calibrated, where something was."""
    unlike: tuple[tuple[str, ...], ...] = ()
    """Layers that vLLM merges into one though their formats differ, so that it cannot serve the folder."""

    def __str__(self) -> str:
        """One line, as a person reads it; more of what was calibrated."""
        files = f"{self.shards} file{'s' if self.shards != 1 else ''}"
        resumed = f", {self.shards_resumed} of them by an earlier attempt" if self.shards_resumed else ""
        calibrated = f"\n{self.calibrated}" if self.calibrated is not None else ""
        unlike = ""
        if self.unlike:
            more = f", and {len(self.unlike) - 1} more such groups" if len(self.unlike) > 1 else ""
            unlike = f"\nNot for vLLM: it merges {', '.join(self.unlike[0])}, whose formats differ{more}."
        what = f"{format_bytes(self.nbytes)} in {files}{resumed}, {self.layout}, {self.seconds:.1f} s"
        return f"{self.folder}: {what}{calibrated}{unlike}"


def make_manifest(layout: str, dtype: str, **source: Any) -> dict[str, Any]:
    """What every manifest says beside the key and the files.

    Args:
        layout: Whose layout.
        dtype: Torch dtype name of what is not quantized.
        **source: What the weights are of.
    Returns:
        Data for JSON.
    """
    return {"schema": 1, "made_by": f"qlazy {__version__}", "source": source, "layout": layout, "dtype": dtype}


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a saved folder.

    Args:
        folder: Any folder.
    Returns:
        What it says, or None where there is none, or one that is damaged: `files` has `config.json` and others, each with its
        `bytes` and `sha256`, none of them outside the folder.
    """
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or LAST not in files or not all(_is_record(*item) for item in files.items()):
        return None
    return dict(manifest)


def _is_record(name: str, told: Any) -> bool:
    inside = "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
    nbytes, digest = (told.get("bytes"), told.get("sha256")) if isinstance(told, dict) else (None, None)
    return inside and type(nbytes) is int and isinstance(digest, str)


def already_saved(folder: str | os.PathLike[str], key: str) -> SaveReport | None:
    """What lies in a folder, where it is just what would be written.

    Args:
        folder: The folder that is meant.
        key: What identifies the content.
    Returns:
        Its report; None where something else lies there, or nothing, or a file is missing.
    """
    path, manifest = Path(folder), read_manifest(folder)
    if manifest is None or manifest.get("key") != key or _contradictions(path, manifest):
        return None
    shards = [file["bytes"] for name, file in manifest["files"].items() if name.endswith(".safetensors")]
    return SaveReport(
        folder=path.absolute(),
        layout=str(manifest.get("layout")),
        nbytes=sum(shards),
        shards=len(shards),
        shards_resumed=len(shards),
        seconds=0.0,
    )


def verify(folder: str | os.PathLike[str]) -> int:
    """Read a saved folder whole and compare every file with the manifest.

    Args:
        folder: A folder that qlazy saved.
    Returns:
        Bytes that were read.
    Raises:
        UsageError: it has no manifest.
        CorruptCheckpoint: a file is not what was written; `IncompleteCheckpoint` where it is missing or has another size.

    Memory: 16 MiB.
    """
    path, manifest = Path(folder), read_manifest(folder)
    if manifest is None and (path / MANIFEST).exists():
        raise CorruptCheckpoint(f"{path / MANIFEST} is damaged: it does not say which files there are.", hint="Save it again.")
    if manifest is None:
        raise UsageError(f"{path} has no manifest {MANIFEST} to be verified by.", hint="Leave --verify out.")
    wrong = _contradictions(path, manifest)
    if wrong:
        raise IncompleteCheckpoint(f"{path}: {wrong}.", hint="Save it again.")
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    for name, told in files.items():
        found = hash_file(path / name)
        if found != told["sha256"]:
            raise CorruptCheckpoint(
                f"{path / name} has sha256 {found[:12]}..., and the manifest says {told['sha256'][:12]}....",
                hint="The file has changed since it was written; save it again.",
            )
    return sum(told["bytes"] for told in files.values())


def _contradictions(path: Path, manifest: Mapping[str, Any]) -> str:
    """The first file that is missing or of another size, or weights that are not told of; empty where there are none."""
    for file in sorted(path.glob("*.safetensors*")):
        if file.name not in manifest["files"]:
            return f"{file.name} is there, of which the manifest does not say anything"
    for name, told in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, and the manifest says {told['bytes']:,}"
    return ""
