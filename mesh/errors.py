"""The exception tree of QMesh, ordered by whose fault it is.

::

    QMeshError
    ├ ConfigurationError                 the user's input: cause, fix and exit code
    ├ ProtocolError                      the peer's fault: close the connection and penalise
    │ ├ FrameTooLarge
    │ ├ MalformedMessage
    │ ├ AuthenticationError
    │ ├ VersionMismatch
    │ └ ReplayError
    ├ TransportError                     the network's fault: retry elsewhere
    │ ├ ConnectFailed
    │ ├ ConnectionClosed
    │ └ DeadlineExceeded
    ├ RemoteError                        the peer answered with an error code
    │ ├ BadRequest          ├ Unauthorized     ├ ModelNotFound   ├ Overloaded
    │ ├ ContextExceeded     ├ RemoteDeadline   ├ Cancelled       ├ BackendFailed
    │ └ ShuttingDown        ├ FlowControl      └ InternalError
    └ GenerationError                    no worker could give the whole answer
      ├ NoWorkers
      ├ StreamInterrupted
      └ AllWorkersFailed

A bug in our own code is none of these and never blames a peer. Exception text never crosses the
wire: `ErrorCode` and a short message do.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import ClassVar


class ErrorCode(IntEnum):
    """Codes carried by RESET, END and GOAWAY (docs/protocol.md, "Error codes")."""

    BAD_REQUEST = 1
    UNAUTHORIZED = 2
    MODEL_NOT_FOUND = 3
    OVERLOADED = 4
    CONTEXT_EXCEEDED = 5
    DEADLINE = 6
    CANCELLED = 7
    BACKEND_FAILED = 8
    SHUTTING_DOWN = 9
    FLOW_CONTROL = 10
    INTERNAL = 11


RETRYABLE_CODES = frozenset(
    {
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.OVERLOADED,
        ErrorCode.BACKEND_FAILED,
        ErrorCode.SHUTTING_DOWN,
        ErrorCode.FLOW_CONTROL,
        ErrorCode.INTERNAL,
    }
)
"""Codes after which another worker may be tried with the same request."""


class QMeshError(Exception):
    """Base of every error that QMesh raises on purpose."""


class ConfigurationError(QMeshError):
    """The user's input is wrong: says the cause, the fix and the exit code of the command line."""

    def __init__(self, cause: str, fix: str, *, exit_code: int = 2) -> None:
        super().__init__(f"{cause}. {fix}" if fix else cause)
        self.cause = cause
        self.fix = fix
        self.exit_code = exit_code


class ProtocolError(QMeshError):
    """The peer broke the protocol. The connection is closed and the peer penalised."""


class FrameTooLarge(ProtocolError):
    """A declared length is over its cap; nothing of the payload was read."""


class MalformedMessage(ProtocolError):
    """Bytes that authenticated but do not decode to a message of the protocol."""


class AuthenticationError(ProtocolError):
    """A handshake or frame did not authenticate: wrong key, wrong network secret, or tampered bytes."""


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""


class ReplayError(ProtocolError):
    """A message that was seen before, or that is older than the allowed clock skew."""


class TransportError(QMeshError):
    """The network failed. The same request may be tried elsewhere."""


class ConnectFailed(TransportError):
    """No connection could be made to any of the peer's addresses."""


class ConnectionClosed(TransportError):
    """The connection is gone; the text says who closed it and why."""


class DeadlineExceeded(TransportError):
    """A wait reached its deadline; the text says which."""


class RemoteError(QMeshError):
    """The peer refused or failed a request with an error code.

    `retry_after` is in seconds, or None where the peer named no time.
    """

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message or self.code.name.lower())
        self.message = message
        self.retry_after = retry_after


class BadRequest(RemoteError):
    """The request is wrong in itself; every worker would refuse it."""

    code = ErrorCode.BAD_REQUEST


class Unauthorized(RemoteError):
    """The peer does not serve this caller."""

    code = ErrorCode.UNAUTHORIZED


class ModelNotFound(RemoteError):
    """The worker does not have the model."""

    code = ErrorCode.MODEL_NOT_FOUND


class Overloaded(RemoteError):
    """The worker's queue is full; `retry_after` says when a place is expected."""

    code = ErrorCode.OVERLOADED


class ContextExceeded(RemoteError):
    """The prompt does not fit into the model's context."""

    code = ErrorCode.CONTEXT_EXCEEDED


class RemoteDeadline(RemoteError):
    """The request's own deadline passed at the worker."""

    code = ErrorCode.DEADLINE


class Cancelled(RemoteError):
    """The stream was cancelled by the other side."""

    code = ErrorCode.CANCELLED


class BackendFailed(RemoteError):
    """The worker's llama.cpp crashed, hung or answered with an error of its own."""

    code = ErrorCode.BACKEND_FAILED


class ShuttingDown(RemoteError):
    """The worker is leaving; the stream was not started."""

    code = ErrorCode.SHUTTING_DOWN


class FlowControl(RemoteError):
    """Too many streams, or credit was exceeded or never granted."""

    code = ErrorCode.FLOW_CONTROL


class InternalError(RemoteError):
    """The peer met a fault of its own."""

    code = ErrorCode.INTERNAL


_BY_CODE: dict[int, type[RemoteError]] = {cls.code: cls for cls in RemoteError.__subclasses__()}


def remote_error(code: int, message: str = "", retry_after: float | None = None) -> RemoteError:
    """The exception for a wire code; an unknown code is an `InternalError` that names it."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return InternalError(f"unknown error code {code}: {message}", retry_after=retry_after)
    return cls(message, retry_after=retry_after)


class GenerationError(QMeshError):
    """No worker could give the whole answer."""


class NoWorkers(GenerationError):
    """The mesh has no worker for the model."""


class StreamInterrupted(GenerationError):
    """An answer broke off and cannot be continued exactly elsewhere.

    `text` and `tokens` are what was delivered before.
    """

    def __init__(self, message: str, *, text: str, tokens: int) -> None:
        super().__init__(message)
        self.text = text
        self.tokens = tokens


class AllWorkersFailed(GenerationError):
    """Every worker that was tried failed; `attempts` holds (worker id, error) in order."""

    def __init__(self, message: str, attempts: Sequence[tuple[str, BaseException]]) -> None:
        super().__init__(message)
        self.attempts = list(attempts)


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may be tried on another worker. The one place that decides it."""
    if isinstance(error, RemoteError):
        return error.code in RETRYABLE_CODES
    return isinstance(error, TransportError | ProtocolError | OSError)
