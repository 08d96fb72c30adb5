"""The gateway's OpenAPI description, from the table of endpoints. Pure."""

from __future__ import annotations

from typing import Any

from node.__about__ import VERSION
from node.gateway.endpoints import ENDPOINTS, Endpoint

_ERRORS = {
    "400": "The request is wrong in itself.",
    "401": "An API key is needed.",
    "403": "The caller may not use this gateway or worker.",
    "404": "The model does not exist.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "422": "The model server cannot make sense of the request.",
    "429": "The key's limit is reached, or every queue is full.",
    "501": "The model cannot do this.",
    "502": "Every worker that was asked failed.",
    "503": "No worker is ready.",
    "504": "A deadline passed.",
}
_FIELDS: dict[str, dict[str, Any]] = {
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"type": "string", "enum": ["system", "user", "assistant"]},
                "content": {"type": "string"},
            },
        },
    },
    "prompt": {"type": "string"},
    "input": {"type": "string"},
    "content": {"type": "string"},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2147483647}},
    "query": {"type": "string"},
    "documents": {"type": "array", "items": {"type": "string"}},
    "input_prefix": {"type": "string"},
    "input_suffix": {"type": "string"},
    "max_tokens": {"type": "integer", "minimum": 1},
}


def description() -> dict[str, Any]:
    """The description as a JSON value (https://spec.openapis.org/oas/v3.1.0)."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "QMesh gateway",
            "version": VERSION,
            "description": "llama-server's API, answered by the best worker of the mesh.",
        },
        "security": [{}, {"bearer": []}],
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "object"}, "type": {"type": "string"}},
                }
            },
        },
        "paths": {
            **{endpoint.path: {"post": _operation(endpoint)} for endpoint in ENDPOINTS},
            "/v1/models": {"get": _reading("The models of the mesh")},
            "/health": {"get": _reading("Whether a request would be answered now")},
            "/metrics": {"get": _reading("Prometheus metrics", "text/plain")},
            "/openapi.json": {"get": _reading("This description")},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    properties: dict[str, Any] = {"model": {"type": "string"}}
    properties |= {name: _FIELDS[name] for name in endpoint.required}
    answers: dict[str, Any] = {"application/json": {"schema": {}}}
    if endpoint.streams:
        properties["stream"] = {"type": "boolean"}
        event = {"type": "object", "properties": {"data": {"type": "string"}}}
        answers["text/event-stream"] = {"schema": event}
    schema = {"type": "object", "required": list(endpoint.required), "properties": properties}
    return {
        "summary": endpoint.summary,
        "operationId": endpoint.path.strip("/").replace("/", "_").replace("-", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The model server's answer.", "content": answers}, **_errors()},
    }


def _reading(summary: str, kind: str = "application/json") -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {kind: {"schema": {}}}}, **_errors()},
    }


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}
