"""What huggingface_hub, its HTTP library and the disk raise, as qlazy's errors that name the model and say what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

from qlazy.errors import GatedModel, HubUnreachable, ModelNotFound, OutOfSpace, QlazyError

AGAIN = "Check the connection and run it again: complete files are not fetched twice. HF_HUB_OFFLINE=1 uses the cache alone."
"""What to do where the hub did not answer."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for, as messages name it."""

    id: str
    """Repository, `org/name`."""
    revision: str
    """Branch, tag or commit."""
    endpoint: str
    """Address of the hub."""
    cache: str
    """Folder that files are fetched to."""

    @contextlib.contextmanager
    def errors(self, file: str = "") -> Iterator[None]:
        """Turn what huggingface_hub, its HTTP library and the disk raise into qlazy's errors.

        Args:
            file: Which file is fetched, for messages.

        Yields:
            Nothing.

        Memory: none.
        """
        from huggingface_hub import errors as hub

        where = f"{self.id}/{file}" if file else self.id
        try:
            yield
        except hub.GatedRepoError as error:
            raise GatedModel(
                f"{self.id} is gated: the hub wants the token of someone who accepted its licence",
                hint=f"Accept it at {self.endpoint}/{self.id}, then: hf auth login (or set HF_TOKEN)",
            ) from error
        except hub.RevisionNotFoundError as error:
            hint = f"See {self.endpoint}/{self.id}/tree/main"
            raise ModelNotFound(f"{self.id} has no revision {self.revision!r}", hint=hint) from error
        except hub.RemoteEntryNotFoundError as error:
            raise ModelNotFound(f"{self.id} has no file {file!r} at {self.revision}") from error
        except (hub.RepositoryNotFoundError, hub.HFValidationError, hub.DisabledRepoError) as error:
            raise self._absent() from error
        except hub.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise self._absent(f" (it answered {status})") from error
            raise HubUnreachable(f"the hub answered {status} for {where}", hint=AGAIN) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "Free some, or set HF_HOME to another disk."
                raise OutOfSpace(f"no space left for {where} in {self.cache}", hint=hint) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise QlazyError(
                    f"{self.cache} cannot be written: {error.strerror}", hint="Set HF_HOME to a folder of yours."
                ) from error
            raise self._unreachable(where, error) from error
        except (hub.HTTPError, ValueError) as error:  # type: ignore[attr-defined]  # base class of its HTTP library, httpx or httpx2
            raise self._unreachable(where, error) from error

    def _absent(self, detail: str = "") -> ModelNotFound:
        return ModelNotFound(
            f"no folder {self.id!r} here, and the hub has no such model or does not show it to this token{detail}",
            hint=f"Check the spelling at {self.endpoint}/{self.id}; for a private model: hf auth login (or set HF_TOKEN)",
        )

    def _unreachable(self, where: str, error: Exception) -> HubUnreachable:
        reason = error.__cause__ or error
        text = str(reason).strip().partition("\n")[0] or "no details"
        return HubUnreachable(f"fetching {where} from {self.endpoint} failed: {type(reason).__name__}: {text}", hint=AGAIN)
