"""The exception tree of the sidecar. It stands alone: the node maps it to wire codes.

::

    SidecarError                       every one carries the server's last log lines in `log_tail`
    ├ BinaryNotFound                   no usable llama.cpp server, or the given path is none
    ├ ModelLoadFailed                  wrong arguments or model: retrying cannot help
    │ └ OutOfMemory                    did not fit, also not with smaller settings
    ├ UnknownModel                     no model of that name is configured
    ├ SidecarCrashed                   the process ended by itself
    ├ SidecarUnresponsive              the process hangs: no answer, or no token while work is queued
    ├ SidecarStopped                   it was stopped on purpose
    ├ SidecarTimeout                   the caller's own deadline passed
    ├ BackendError                     the server answered a request with an error
    │ ├ InvalidRequest                 400
    │ ├ ContextExceeded                400, the prompt does not fit (`prompt_tokens`, `context`)
    │ ├ AccessDenied                   401, 403
    │ ├ NotFound                       404
    │ ├ NotSupported                   501
    │ └ ServerBusy                     429, 503 (also while the model loads)
    ├ BackendUnreachable               the connection failed or broke; `started` says after the first byte
    └ RuntimeFailure                   getting a server failed
      ├ DownloadFailed                 ├ ChecksumMismatch
      ├ UnsafeArchive                  └ BuildFailed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self


class SidecarError(Exception):
    """Base of every error of this package. `log_tail` holds the server's last lines, oldest first."""

    def __init__(self, message: str, *, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.log_tail = list(log_tail)

    def copy(self) -> Self:
        """The same error to raise elsewhere: one object raised twice collects the tracebacks of both."""
        twin = self.__class__.__new__(self.__class__, *self.args)
        twin.__dict__.update(self.__dict__)
        return twin

    def __str__(self) -> str:
        if not self.log_tail:
            return self.message
        lines = "\n".join(f"  | {line}" for line in self.log_tail[-12:])
        return f"{self.message}\nlast lines of the server:\n{lines}"


class BinaryNotFound(SidecarError):
    """No usable llama.cpp server was found, or the given path is not one."""


class ModelLoadFailed(SidecarError):
    """The server refused its arguments or its model; the same start would fail again."""


class OutOfMemory(ModelLoadFailed):
    """The model did not fit into memory, also not with less context, slots and GPU layers."""


class UnknownModel(SidecarError):
    """No model of that name is configured here."""


class SidecarCrashed(SidecarError):
    """The server's process ended by itself."""


class SidecarUnresponsive(SidecarError):
    """The server's process lives but does not answer or makes no progress."""


class SidecarStopped(SidecarError):
    """The server was stopped on purpose; whatever was open with it is closed."""


class SidecarTimeout(SidecarError):
    """A wait reached the caller's deadline; the text says which."""


class BackendUnreachable(SidecarError):
    """The connection to the server failed or broke.

    `started` is True when response bytes had arrived, so that a silent retry would repeat text.
    """

    def __init__(self, message: str, *, started: bool = False) -> None:
        super().__init__(message)
        self.started = started


class BackendError(SidecarError):
    """The server answered with an error: its HTTP `status`, its `kind` and its whole `body`."""

    def __init__(self, message: str, *, status: int, kind: str = "", body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.body = body


class InvalidRequest(BackendError):
    """400: the request is wrong in itself."""


class ContextExceeded(BackendError):
    """400: the prompt has more tokens than the context holds (both None where the server gave none)."""

    prompt_tokens: int | None = None
    context: int | None = None


class AccessDenied(BackendError):
    """401 or 403: the key is missing or wrong."""


class NotFound(BackendError):
    """404: no such endpoint or model."""


class NotSupported(BackendError):
    """501: this server or model cannot do it."""


class ServerBusy(BackendError):
    """429 or 503: try later; 503 also means that the model is still loading."""


class RuntimeFailure(SidecarError):
    """A llama.cpp server could not be installed, built or selected."""


class DownloadFailed(RuntimeFailure):
    """The release index or an asset could not be fetched. `retry_after` is in seconds or None."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ChecksumMismatch(RuntimeFailure):
    """The downloaded bytes are not those that the manifest promises; they were deleted."""


class UnsafeArchive(RuntimeFailure):
    """The archive holds a path, link or size that must not be unpacked; nothing of it was kept."""


class BuildFailed(RuntimeFailure):
    """cmake or the compiler failed; `log_tail` has its last lines."""


_BY_STATUS: Mapping[int, type[BackendError]] = {
    400: InvalidRequest,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    429: ServerBusy,
    501: NotSupported,
    503: ServerBusy,
}


def backend_error(status: int, error: object, body: bytes = b"") -> BackendError:
    """The exception for an error answer.

    `error` is the decoded `error` member of the body (llama.cpp: code, message, type); anything
    else, such as the plain text of another server, becomes the message.
    """
    details: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    message = str(details.get("message") or (error if isinstance(error, str) else "") or f"HTTP {status}")
    kind = str(details.get("type") or "")
    if kind == "exceed_context_size_error":
        exceeded = ContextExceeded(message, status=status, kind=kind, body=body)
        exceeded.prompt_tokens = _int(details.get("n_prompt_tokens"))
        exceeded.context = _int(details.get("n_ctx"))
        return exceeded
    return _BY_STATUS.get(status, BackendError)(message, status=status, kind=kind, body=body)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) else None
