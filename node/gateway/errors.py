"""What a client of the gateway is told when something goes wrong, in the form of its API. Pure.

Sources: https://platform.openai.com/docs/guides/error-codes and
https://docs.anthropic.com/en/api/errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson

from mesh import errors as mesh
from node.gateway.endpoints import Form

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error. `retry_after` is in seconds, `allow` names the methods of a 405."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.allow = allow
        self.details = dict(details or {})

    def body(self, form: Form, request_id: str) -> bytes:
        """The response's body."""
        return orjson.dumps(self._as_dict(form, request_id))

    def event(self, form: Form, request_id: str) -> bytes:
        """The error as the last event of a stream whose status was sent before."""
        data = self.body(form, request_id)
        return (b"event: error\ndata: " if form is Form.ANTHROPIC else b"data: ") + data + b"\n\n"

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def _as_dict(self, form: Form, request_id: str) -> dict[str, Any]:
        if form is Form.ANTHROPIC:
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            error = {"type": kind, "message": self.message, **self.details}
            return {"type": "error", "error": error, "request_id": request_id}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
                **self.details,
            }
        }


def api_error(error: mesh.QMeshError | OSError) -> ApiError:
    """The answer for an error of the mesh."""
    text = str(error) or type(error).__name__
    match error:
        case mesh.BadRequest():
            return ApiError(400, error.message)
        case mesh.ContextExceeded():
            return ApiError(400, error.message, code="context_length_exceeded")
        case mesh.Unauthorized():
            return ApiError(403, error.message, code="worker_refused")
        case mesh.ModelNotFound():
            return ApiError(404, error.message, code="model_not_found", param="model")
        case mesh.Overloaded():
            return ApiError(429, text, code="overloaded", retry_after=error.retry_after or 1.0)
        case mesh.NoWorkers() | mesh.ShuttingDown() | mesh.ConnectFailed():
            return ApiError(503, text, code="no_worker", retry_after=5.0)
        case mesh.RemoteDeadline() | mesh.DeadlineExceeded():
            return ApiError(504, text, code="deadline")
        case _:
            return ApiError(502, text, code="worker_failed")
