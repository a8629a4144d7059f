"""One repository of the hub, asked through huggingface_hub: its commit and files, their first bytes, whole files, the cache.

Every request has a time limit, and what can fail is one of qlazy's errors, see `hub_errors.py`. The commit is
resolved once and everything is fetched at it. huggingface_hub is imported when the hub is asked, not before.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from qlazy.errors import HubUnreachable
from qlazy.sources.hub_errors import AGAIN, Asked

WORKERS = 8
"""Files fetched at a time."""

ATTEMPTS = 3
"""How often the first bytes of a file are asked for before the connection counts as broken."""

Progress = Callable[[int, int], None]
"""Called with bytes downloaded and bytes to download."""

_T = TypeVar("_T")


class Repository:
    """A repository at one revision.

    Args:
        id: `org/name`.
        revision: Branch, tag or commit.
        token: Hub token; None takes `HF_TOKEN` or the saved login, False sends none.
        cache_dir: Hub cache in place of `HF_HUB_CACHE`.
    """

    def __init__(self, id: str, *, revision: str, token: str | bool | None, cache_dir: str | os.PathLike[str] | None) -> None:
        from huggingface_hub import constants

        self.id = id
        self.revision = revision
        self.token = token
        self.cache = str(Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser())
        self.asked = Asked(id=id, revision=revision, endpoint=str(constants.ENDPOINT), cache=self.cache)
        self.offline = bool(constants.is_offline_mode())
        self.commit = ""
        self.sizes: dict[str, int] = {}
        self._stop = threading.Event()

    def resolve(self) -> None:
        """Ask for the commit of the revision and the sizes of its files.

        Weights in subfolders (`original/`, `onnx/`) are the same model in other clothes and left out.

        Memory: one entry a file.
        """
        from huggingface_hub import HfApi, constants

        with self.asked.errors():
            info = HfApi().model_info(
                self.id,
                revision=self.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                token=self.token,
            )
        self.commit = info.sha or self.revision
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}

    def first_bytes(self, name: str, count: int) -> tuple[bytes, int]:
        """Fetch the beginning of a file by range request.

        Args:
            name: The file.
            count: How many bytes.

        Returns:
            The first `count` bytes, fewer where the file is shorter, and the size of the whole file.

        Raises:
            HubUnreachable: If the connection broke or stood still, each of a few times.

        Memory: `count` bytes.
        """
        for attempt in range(1, ATTEMPTS):
            try:
                return self._first_bytes(name, count)
            except HubUnreachable:
                time.sleep(0.25 * attempt)
        return self._first_bytes(name, count)

    def _first_bytes(self, name: str, count: int) -> tuple[bytes, int]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        headers = build_hf_headers(token=self.token)
        headers |= {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        request = get_session().stream(
            "GET",
            hf_hub_url(self.id, name, revision=self.commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        )
        raw = bytearray()
        with self.asked.errors(name), request as response:
            if response.status_code >= 400:
                response.read()  # the error's text, which a stream does not have yet
            hf_raise_for_status(response)
            # "bytes 0-99/12345". A server that ignores the range answers 200 and sends everything, so stop reading early.
            total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
            for chunk in response.iter_bytes(chunk_size=1 << 16):
                raw += chunk
                if len(raw) >= count:
                    break
        if not total.isdecimal():
            raise HubUnreachable(f"the hub did not tell the size of {self.id}/{name}", hint="Is HF_ENDPOINT a hub?")
        if len(raw) < min(count, int(total)):
            raise HubUnreachable(f"the connection broke after {len(raw):,} bytes of {self.id}/{name}", hint=AGAIN)
        return bytes(raw[:count]), int(total)

    def in_cache(self, name: str) -> Path | None:
        """Path of a file that the cache holds at this commit.

        Args:
            name: The file.

        Returns:
            Its path, or None.

        Memory: none.
        """
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.id, name, cache_dir=self.cache, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def download(self, name: str, bar: type | None = None) -> Path:
        """Fetch one file into the cache, unless it is there.

        Args:
            name: The file.
            bar: A class with tqdm's face that is told of the bytes.

        Returns:
            Its path in the snapshot folder.

        Memory: a buffer of huggingface_hub, 10 MiB.
        """
        from huggingface_hub import hf_hub_download

        with self.asked.errors(name):
            path = hf_hub_download(
                self.id,
                name,
                revision=self.commit,
                token=self.token,
                cache_dir=self.cache,
                tqdm_class=bar or _silent_bar(self._stop, None, 0),
            )
            self._remember()
        return Path(path)

    def _remember(self) -> None:
        # As the hub's cache is laid out: refs/main holds the commit. A download at a commit does not write it, and without it
        # nothing would be found offline.
        ref = Path(self.cache) / f"models--{self.id.replace('/', '--')}" / "refs" / self.revision
        if self.revision == self.commit or (ref.is_file() and ref.read_text() == self.commit):
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(self.commit)
        temporary.replace(ref)

    def download_all(self, names: list[str], *, on_progress: Progress | None) -> dict[str, Path]:
        """Fetch files into the cache, several at a time; those that are complete stay when another one fails.

        Args:
            names: The files.
            on_progress: Called with bytes downloaded and bytes to download.

        Returns:
            The path of each.

        Memory: a buffer of huggingface_hub for each file on its way.
        """
        total = sum(self.sizes[name] for name in names if self.in_cache(name) is None)
        bar = _silent_bar(self._stop, on_progress, total)
        return self.each(lambda name: self.download(name, bar), names)

    def each(self, function: Callable[[str], _T], names: list[str]) -> dict[str, _T]:
        """Call a function with each name, in threads.

        Args:
            function: What to call.
            names: With what.

        Returns:
            The results by name. The first error or Ctrl-C is raised, and what is on its way or has not begun is given up.

        Memory: the results.
        """
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="qlazy-hub") as pool:
            futures = {name: pool.submit(function, name) for name in names}
            try:
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def snapshot(self) -> Path | None:
        """Folder of the revision in the cache, complete or not, without asking the hub.

        Returns:
            The folder, or None.

        Memory: none.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            # No pattern matches: which files are needed is for the caller to say.
            return Path(
                snapshot_download(
                    self.id, revision=self.revision, cache_dir=self.cache, local_files_only=True, allow_patterns=[]
                )
            )
        except (LocalEntryNotFoundError, ValueError):
            return None


class _Stopped(Exception):
    """Ends a download whose result nobody waits for any more; huggingface_hub then removes the partial file."""


def _silent_bar(stop: threading.Event, on_progress: Progress | None, total: int) -> type:
    # huggingface_hub makes one bar a file and takes any class with tqdm's face; this one adds the files up and draws nothing.
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
            if stop.is_set():
                raise _Stopped
            if on_progress is not None:
                with lock:
                    done += int(n or 0)
                    on_progress(done, max(done, total))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    return Bar
