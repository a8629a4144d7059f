"""Hub models: which files are the model, and what of them to fetch: all of them, or only configuration, index and headers."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlazy.errors import CorruptCheckpoint, HubUnreachable, IncompleteCheckpoint, ModelNotFound, QlazyError, UnsupportedModel
from qlazy.sources.gguf import EndOfBuffer, GgufHeader, parse_gguf_header, read_gguf_header
from qlazy.sources.gguf_parts import join_gguf, models_among, part_names, require_parts
from qlazy.sources.hub_client import Progress, Repository
from qlazy.sources.index import INDEX_FILE, join_shards, listing, pick_weights, read_index
from qlazy.sources.safetensors import TensorInfo, header_nbytes, load_json, parse_header, read_header

FIRST_BYTES = 1 << 17
"""Bytes of a shard fetched at first: holds most headers, so that one request is enough."""

GGUF_BYTES = (1 << 20, 1 << 23, 1 << 26)
"""Bytes of a GGUF file fetched, one after the other, until its header is complete; the vocabulary is in it."""

SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Configuration and tokenizer files, fetched with the weights; no pickles and no Python."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was fetched: either a local folder or file, or configuration and headers."""

    commit: str
    """Commit of the repository."""
    path: Path | None = None
    """Snapshot folder, or GGUF file in it; None where only headers were fetched."""
    kind: Literal["safetensors", "gguf"] = "safetensors"
    """File format of the weights, where only headers were fetched."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration, where only headers were fetched."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """The tensors, where only headers were fetched."""


def fetch(
    hub_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    headers_only: bool = False,
    config_only: bool = False,
    on_progress: Progress | None = None,
) -> Found:
    """Fetch a hub model, or only its configuration and headers.

    Args:
        hub_id: `org/name`, or `org/name/file.gguf`.
        revision: Branch, tag or commit; None = main.
        token: Hub token; None takes `HF_TOKEN` or the saved login, False sends none.
        cache_dir: Hub cache in place of `HF_HUB_CACHE`.
        local_files_only: Do not ask the hub; what the cache holds must do.
        headers_only: Fetch config.json, index and the headers of the weights only, unless the cache holds the weights.
        config_only: Fetch config.json alone, as if the model were a file of that name.
        on_progress: Called with bytes downloaded and bytes to download.

    Returns:
        A snapshot folder or file in the hub's cache, or configuration and tensors.

    Raises:
        ModelNotFound: If the hub has no such repository, revision or file.
        GatedModel: If the hub wants a token, and only if the hub itself said so.
        HubUnreachable: If the hub cannot be asked, or the connection broke.
        UnsupportedModel: If all weights are pickles.
        CorruptCheckpoint: If a fetched header or index contradicts itself.
        IncompleteCheckpoint: If the index names a shard that the repository lacks.
        OutOfSpace: If the disk is full.

    Memory: the headers.
    """
    org, name, *rest = hub_id.split("/")
    file = "config.json" if config_only else rest[0] if rest else None
    repo = Repository(f"{org}/{name}", revision=revision or "main", token=token, cache_dir=cache_dir)
    if local_files_only:
        return _cached(repo, file, because="local_files_only forbids asking the hub")
    if repo.offline:
        return _cached(repo, file, because="HF_HUB_OFFLINE forbids asking the hub")
    try:
        repo.resolve()
    except HubUnreachable:
        # As everywhere in this ecosystem: a hub that is down does not take away what the cache holds.
        with contextlib.suppress(QlazyError):
            return _cached(repo, file, because="the hub is down")
        raise
    weights = _pick(repo, file)
    if config_only:
        return Found(commit=repo.commit, path=repo.download(weights))
    if weights.endswith(".gguf"):
        return _gguf(repo, weights, headers_only=headers_only, on_progress=on_progress)
    return _safetensors(repo, weights, headers_only=headers_only, on_progress=on_progress)


def _pick(repo: Repository, file: str | None) -> str:
    ggufs = models_among(name for name in repo.sizes if name.endswith(".gguf"))
    if file is not None:
        if file not in repo.sizes:
            raise ModelNotFound(f"{repo.id} has no file {file}; its GGUF files: {listing(ggufs)}")
        return file
    weights = pick_weights(repo.sizes, where=f"{repo.id} on the hub")
    if weights is None and len(ggufs) == 1:
        return ggufs[0]
    if weights is None and ggufs:
        raise ModelNotFound(f"{repo.id} has {len(ggufs)} GGUF files: {listing(ggufs)}", hint=f"Name one: {repo.id}/FILE.gguf")
    if weights is None or "config.json" not in repo.sizes:
        lacks = "*.safetensors" if weights is None else "config.json"
        raise UnsupportedModel(f"{repo.id} on the hub has no {lacks}; it has {listing(repo.sizes)}")
    return weights


def _safetensors(repo: Repository, weights: str, *, headers_only: bool, on_progress: Progress | None) -> Found:
    weight_map: dict[str, str] = {}
    shards = [weights]
    if weights == INDEX_FILE:
        weight_map = read_index(repo.download(weights).read_bytes(), file=f"{repo.id}: {weights}")
        shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in repo.sizes]
    if missing:
        raise IncompleteCheckpoint(f"{repo.id}: {weights} names {listing(missing)}, which the repository lacks")
    if not headers_only:
        small = [name for name in repo.sizes if name.endswith(SMALL_FILES)]
        paths = repo.download_all([*small, *shards], on_progress=on_progress)
        return Found(commit=repo.commit, path=paths[shards[0]].parent)
    config = repo.download("config.json")
    if all(repo.in_cache(shard) for shard in shards):
        return Found(commit=repo.commit, path=config.parent)
    headers = repo.each(lambda shard: _header(repo, shard), shards)
    tensors = join_shards(headers, weight_map, index=weights)
    return Found(commit=repo.commit, config=load_json(config.read_bytes(), file=f"{repo.id}: config.json"), tensors=tensors)


def _header(repo: Repository, shard: str) -> dict[str, TensorInfo]:
    cached = repo.in_cache(shard)
    if cached is not None:
        return read_header(cached)
    raw, size = repo.first_bytes(shard, FIRST_BYTES)
    needed = header_nbytes(raw, file=shard, file_size=size)
    if needed > len(raw):
        raw, size = repo.first_bytes(shard, needed)
    return parse_header(raw, file=shard, file_size=size, path=Path(shard))


def _gguf(repo: Repository, name: str, *, headers_only: bool, on_progress: Progress | None) -> Found:
    parts = part_names(name)
    require_parts(parts, repo.sizes, where=f"{repo.id} on the hub")
    if not headers_only or all(repo.in_cache(part) is not None for part in parts):
        return Found(commit=repo.commit, path=repo.download_all(parts, on_progress=on_progress)[parts[0]])
    headers = repo.each(lambda part: _gguf_header(repo, part), parts)
    config, tensors = join_gguf({part: headers[part] for part in parts})
    return Found(commit=repo.commit, kind="gguf", config=config, tensors=tensors)


def _gguf_header(repo: Repository, name: str) -> GgufHeader:
    cached = repo.in_cache(name)
    if cached is not None:
        return read_gguf_header(cached)
    for count in GGUF_BYTES:
        raw, size = repo.first_bytes(name, count)
        with contextlib.suppress(EndOfBuffer):
            return parse_gguf_header(raw, file=f"{repo.id}/{name}", file_size=size, path=Path(name))
    raise CorruptCheckpoint(f"{repo.id}/{name}: the header is longer than {GGUF_BYTES[-1]:,} bytes")


def _cached(repo: Repository, file: str | None, *, because: str) -> Found:
    folder = repo.snapshot()
    if folder is None:
        raise HubUnreachable(
            f"{repo.id} at {repo.revision} is not in the cache {repo.cache}, and {because}",
            hint=f"Fetch it while online: hf download {repo.id}",
        )
    files = {entry.name for entry in folder.iterdir() if entry.is_file()}
    weights = file or pick_weights(files, where=str(folder))
    wanted = set(part_names(file)) if file else {"config.json"}
    if weights == INDEX_FILE:
        wanted |= set(read_index((folder / INDEX_FILE).read_bytes(), file=INDEX_FILE).values())
    elif weights is None:
        wanted = wanted - files or {"*.safetensors"}
        ggufs = models_among(name for name in files if name.endswith(".gguf"))
        if ggufs:
            wanted = set(part_names(ggufs[0]) if len(ggufs) == 1 else ())
    if not wanted <= files:
        raise HubUnreachable(
            f"{repo.id} is in the cache only in part: {listing(wanted - files)} not in {folder}, and {because}",
            hint=f"Fetch the rest while online: hf download {repo.id}",
        )
    return Found(commit=folder.name, path=folder / file if file else folder)
