"""Models on the Hugging Face hub: found, listed, and fetched whole or by their headers, through huggingface_hub.

Every request has a time limit, and every way in which the hub or the network can fail becomes one of qlazy's errors. The commit
is resolved once and everything is fetched at it. huggingface_hub is imported when a hub model is asked for, not before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlazy.errors import (
    CorruptCheckpoint,
    GatedModel,
    HubUnreachable,
    IncompleteCheckpoint,
    ModelNotFound,
    OutOfSpace,
    QlazyError,
    UnsupportedModel,
)
from qlazy.source_gguf import EndOfBuffer, parse_gguf
from qlazy.source_safetensors import (
    TensorInfo,
    header_nbytes,
    join_shards,
    load_json,
    parse_header,
    pick_weights,
    read_header,
    read_index,
)

WORKERS = 8
"""Files fetched at a time."""

FIRST_BYTES = 1 << 17
"""Bytes of a shard fetched at first: holds most headers, so that one request is enough."""

GGUF_BYTES = (1 << 20, 1 << 23, 1 << 26)
"""Bytes of a GGUF file fetched until its header is complete; the vocabulary is in it."""

SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Configuration and tokenizer files, fetched with the weights; no pickles and no Python."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to ask the hub."""

    token: str | bool | None = None
    """Token; None takes `HF_TOKEN` or the saved login, False sends none."""
    cache_dir: str | os.PathLike[str] | None = None
    """Cache in place of `HF_HUB_CACHE`."""
    local_files_only: bool = False
    """Do not ask, take what the cache holds."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was fetched: either a local folder or file, or config and headers."""

    commit: str
    """Commit of the repository."""
    path: Path | None = None
    """Snapshot folder, or GGUF file in it."""
    kind: Literal["safetensors", "gguf"] = "safetensors"
    """File format of the weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration, where only headers were fetched."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """The tensors, where only headers were fetched."""


def fetch(
    model_id: str, *, revision: str | None, access: Access, headers_only: bool = False, on_progress: Progress | None = None
) -> Found:
    """Fetch a hub model, or only its configuration and headers.

    Args:
        model_id: `org/name`, or `org/name/file.gguf`.
        revision: Branch, tag or commit; None = main.
        access: How to ask.
        headers_only: Fetch config.json, index and the headers of the weights only.
        on_progress: Called with bytes downloaded and bytes to download.

    Returns:
        A snapshot folder or file in the hub's cache; with `headers_only` config and tensors where the cache lacks the weights.

    Raises:
        ModelNotFound: If the hub has no such repository, revision or file.
        GatedModel: If the hub wants a token, and only if the hub itself said so.
        HubUnreachable: If the hub cannot be asked, or the connection broke.
        UnsupportedModel: If all weights are pickles.
        CorruptCheckpoint: If a fetched header or index contradicts itself.
        OutOfSpace: If the disk is full.

    Memory: the headers.
    """
    org, name, *file = model_id.split("/")
    repo = _Repository(id=f"{org}/{name}", revision=revision or "main", access=access)
    if access.local_files_only or _offline():
        return repo.cached(file)
    try:
        repo.resolve()
    except HubUnreachable:
        # As everywhere in this ecosystem: a hub that is down does not take away what the cache holds.
        with contextlib.suppress(QlazyError):
            return repo.cached(file)
        raise
    weights = repo.pick(file)
    if weights.endswith(".gguf"):
        return repo.gguf(weights, headers_only=headers_only, on_progress=on_progress)
    return repo.safetensors(weights, headers_only=headers_only, on_progress=on_progress)


class _Repository:
    """One repository at one commit."""

    def __init__(self, *, id: str, revision: str, access: Access) -> None:
        self.id, self.revision, self.access = id, revision, access
        self.commit = ""
        self.sizes: dict[str, int] = {}

    def resolve(self) -> None:
        """Ask for the commit and the files of the revision."""
        from huggingface_hub import HfApi, constants

        with self.errors():
            info = HfApi().model_info(
                self.id,
                revision=self.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                token=self.access.token,
            )
        self.commit = info.sha or self.revision
        # Weights in subfolders (`original/`, `onnx/`) are the same model in other clothes.
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}

    def pick(self, file: list[str]) -> str:
        """Name of the file or index that holds the weights."""
        if file:
            if file[0] not in self.sizes:
                raise ModelNotFound(f"{self.id} has no file {file[0]}; it has {_some(self.sizes, '.gguf')}")
            return file[0]
        weights = pick_weights(self.sizes, where=f"{self.id} on the hub")
        ggufs = [name for name in self.sizes if name.endswith(".gguf")]
        if weights is None and len(ggufs) == 1:
            return ggufs[0]
        if weights is None and ggufs:
            raise ModelNotFound(
                f"{self.id} has {len(ggufs)} GGUF files: {_some(self.sizes, '.gguf')}", hint=f"Name one: {self.id}/FILE.gguf"
            )
        if weights is None or "config.json" not in self.sizes:
            lacks = "*.safetensors" if weights is None else "config.json"
            raise UnsupportedModel(f"{self.id} on the hub has no {lacks}; it has {_some(self.sizes)}")
        return weights

    def safetensors(self, weights: str, *, headers_only: bool, on_progress: Progress | None) -> Found:
        """Fetch a repository of safetensors."""
        weight_map: dict[str, str] = {}
        shards = [weights]
        if weights.endswith(".json"):
            weight_map = read_index(self.download(weights).read_bytes(), file=f"{self.id}: {weights}")
            shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if shard not in self.sizes]
        if missing:
            raise IncompleteCheckpoint(
                f"{self.id}: {weights} names {', '.join(missing[:5])}, which the repository does not have"
            )
        if not headers_only or all(self.in_cache(name) for name in ("config.json", *shards)):
            files = [name for name in self.sizes if name.endswith(SMALL_FILES) and not name.endswith(".index.json")]
            # When only headers are wanted nothing more than what the cache lacks of the small files is fetched.
            paths = self.download_all([*files, *([weights] if weight_map else []), *shards], on_progress=on_progress)
            return Found(commit=self.commit, path=paths[weights].parent)
        config = load_json(self.download("config.json").read_bytes(), file=f"{self.id}: config.json")
        headers = dict(zip(shards, self.each(self.header, shards), strict=True))
        tensors = join_shards(headers, weight_map, index=weights)
        return Found(commit=self.commit, config=config, tensors=tensors)

    def gguf(self, name: str, *, headers_only: bool, on_progress: Progress | None) -> Found:
        """Fetch one GGUF file."""
        if not headers_only or self.in_cache(name):
            return Found(commit=self.commit, path=self.download_all([name], on_progress=on_progress)[name])
        for count in GGUF_BYTES:
            raw, size = self.first_bytes(name, count)
            try:
                config, tensors = parse_gguf(raw, file=f"{self.id}/{name}", file_size=size, path=Path(name))
            except EndOfBuffer:
                continue
            return Found(commit=self.commit, kind="gguf", config=config, tensors=tensors)
        raise CorruptCheckpoint(f"{self.id}/{name}: the header is longer than {GGUF_BYTES[-1]:,} bytes")

    def header(self, shard: str) -> dict[str, TensorInfo]:
        """Header of one shard: from the cache, else by range request."""
        cached = self.in_cache(shard)
        if cached:
            return read_header(cached)
        raw, size = self.first_bytes(shard, FIRST_BYTES)
        needed = header_nbytes(raw, file=shard, file_size=size)
        if needed > len(raw):
            raw, size = self.first_bytes(shard, needed)
        return parse_header(raw, file=shard, file_size=size, path=Path(shard))

    def first_bytes(self, name: str, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a file, fewer where it is shorter, and the size of the whole file."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.id, name, revision=self.commit)
        headers = build_hf_headers(token=self.access.token)
        headers |= {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        raw = bytearray()
        with (
            self.errors(name),
            get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as response,
        ):
            if response.status_code >= 400:
                response.read()  # the error's text, which is not there yet in a stream
            hf_raise_for_status(response)
            # "bytes 0-99/12345"; a server that ignores the range says 200 and would send everything, so stop reading early.
            size = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
            for chunk in response.iter_bytes(chunk_size=1 << 16):
                raw += chunk
                if len(raw) >= count:
                    break
        if not size.isdecimal():
            raise HubUnreachable(f"the hub did not tell the size of {self.id}/{name}", hint="Is HF_ENDPOINT a hub?")
        if len(raw) < min(count, int(size)):
            raise HubUnreachable(
                f"the connection broke after {len(raw):,} bytes of the header of {self.id}/{name}", hint=_AGAIN
            )
        return bytes(raw[:count]), int(size)

    def in_cache(self, name: str) -> Path | None:
        """Path of a file that the cache holds at this commit."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.id, name, cache_dir=self.cache_dir, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def download(self, name: str, tqdm_class: Any = None) -> Path:
        """Fetch one file into the cache, unless it is there."""
        from huggingface_hub import hf_hub_download

        with self.errors(name):
            return Path(
                hf_hub_download(
                    self.id,
                    name,
                    revision=self.commit,
                    token=self.access.token,
                    cache_dir=self.cache_dir,
                    tqdm_class=tqdm_class or _progress_bar(None, 0),
                )
            )

    def download_all(self, names: list[str], *, on_progress: Progress | None) -> dict[str, Path]:
        """Fetch files into the cache, several at a time; those that are complete stay when another one fails."""
        total = sum(self.sizes[name] for name in names if not self.in_cache(name))
        bar = _progress_bar(on_progress, total)
        return dict(zip(names, self.each(lambda name: self.download(name, bar), names), strict=True))

    def each(self, function: Callable[[str], Any], names: list[str]) -> list[Any]:
        """Call `function` with each name in threads; the first error stops what has not begun."""
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="qlazy-hub") as pool:
            futures = [pool.submit(function, name) for name in names]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def cached(self, file: list[str]) -> Found:
        """The model from the cache alone."""
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        why = "local_files_only" if self.access.local_files_only else "HF_HUB_OFFLINE"
        root = self.cache_dir or constants.HF_HUB_CACHE
        try:
            folder = Path(
                snapshot_download(
                    self.id, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True, allow_patterns=[]
                )
            )
        except IncompleteSnapshotError as error:  # pragma: no cover - no pattern, nothing expected
            folder = Path(error.snapshot_path)
        except (LocalEntryNotFoundError, ValueError) as error:
            raise HubUnreachable(
                f"{self.id} at {self.revision} is not in the cache {root}, and {why} forbids asking the hub",
                hint=f"Fetch it while online: hf download {self.id}",
            ) from error
        self.commit = folder.name
        if not file and not (folder / "config.json").exists() and not any(folder.glob("*.gguf")):
            raise HubUnreachable(
                f"{self.id} is in the cache only in part ({folder}), and {why} forbids asking the hub",
                hint=f"Fetch it while online: hf download {self.id}",
            )
        if file and not (folder / file[0]).is_file():
            raise HubUnreachable(f"{self.id}/{file[0]} is not in the cache {root}, and {why} forbids asking the hub")
        return Found(commit=self.commit, path=folder / file[0] if file else folder)

    @property
    def cache_dir(self) -> str | None:
        """The cache as huggingface_hub wants it."""
        return None if self.access.cache_dir is None else os.fspath(self.access.cache_dir)

    @contextlib.contextmanager
    def errors(self, file: str = "") -> Iterator[None]:
        """Turn what huggingface_hub and its HTTP library raise into qlazy's errors."""
        from huggingface_hub import errors as hub

        where = f"{self.id}/{file}" if file else self.id
        try:
            yield
        except QlazyError:
            raise
        except hub.GatedRepoError as error:
            raise GatedModel(
                f"{self.id} is gated: the hub wants the token of someone who accepted its licence",
                hint=f"Accept it at {_endpoint()}/{self.id}, then: hf auth login (or set HF_TOKEN)",
            ) from error
        except hub.RevisionNotFoundError as error:
            raise ModelNotFound(
                f"{self.id} has no revision {self.revision!r}", hint=f"See {_endpoint()}/{self.id}/tree"
            ) from error
        except hub.RemoteEntryNotFoundError as error:
            raise ModelNotFound(f"{self.id} has no file {file!r} at {self.revision}") from error
        except (hub.RepositoryNotFoundError, hub.HFValidationError, hub.DisabledRepoError) as error:
            raise self.absent() from error
        except hub.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise self.absent(f" (the hub answered {status})") from error
            raise HubUnreachable(f"the hub answered {status} for {where}", hint=_AGAIN) from error
        except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, hub.FileMetadataError) as error:
            reason = error.__cause__ or error
            raise HubUnreachable(
                f"{where} could not be fetched from {_endpoint()}: {_first_line(reason)}", hint=_AGAIN
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(
                    f"no space left for {where} in {self.root()}", hint="Free some, or set HF_HOME or --cache-dir."
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise QlazyError(
                    f"{self.root()} cannot be written: {error.strerror}", hint="Set HF_HOME or --cache-dir."
                ) from error
            raise HubUnreachable(f"fetching {where} from {_endpoint()} failed: {_first_line(error)}", hint=_AGAIN) from error
        except hub.HTTPError as error:  # type: ignore[attr-defined]  # its HTTP library's base class: httpx or httpx2
            raise HubUnreachable(f"fetching {where} from {_endpoint()} failed: {_first_line(error)}", hint=_AGAIN) from error

    def absent(self, detail: str = "") -> ModelNotFound:
        """The error for a repository that the hub does not show us."""
        return ModelNotFound(
            f"{self.id} at {self.revision}: the hub has no such model, or does not show it to this token{detail}",
            hint=f"Check the spelling at {_endpoint()}/{self.id}; for a private model: hf auth login (or set HF_TOKEN)",
        )

    def root(self) -> str:
        """The cache's folder, for messages."""
        from huggingface_hub import constants

        return self.cache_dir or str(constants.HF_HUB_CACHE)


def _progress_bar(on_progress: Progress | None, total: int) -> type:
    """A class with tqdm's face that adds up the bytes of all files and draws nothing."""
    lock = threading.Lock()
    done = 0

    class Bar:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if on_progress is not None:
                with lock:
                    done += int(n or 0)
                    on_progress(done, max(done, total))

        def __getattr__(self, name: str) -> Callable[..., None]:
            if name.startswith("_"):
                raise AttributeError(name)
            return lambda *args, **kwargs: None

    return Bar


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _some(names: dict[str, int], suffix: str = "", limit: int = 8) -> str:
    chosen = sorted(name for name in names if name.endswith(suffix))
    return (", ".join(chosen[:limit]) or "none") + (f" and {len(chosen) - limit} more" if len(chosen) > limit else "")


_AGAIN = (
    "Check the connection and run it again: files that are complete are not fetched twice. HF_HUB_OFFLINE=1 uses the cache."
)
