"""Errors as problem details (RFC 9457): one shape for all of them, and no traceback to the client.

The statuses of the lower floors' errors are in api.statuses. What is not there is a fault of ours: the client gets
500 and a number to ask about, the log gets the traceback.
"""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.statuses import STATUS, problem, problem_of

MEDIA_TYPE = "application/problem+json"


class Refusal(HTTPException):
    """An error that a route raises on purpose."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)


def problem_response(
    status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """A problem as a response."""
    return JSONResponse(problem(status, detail, **members), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let every error of the app become a problem."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    for kind, _ in STATUS:
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unknown)


# What OpenAPI says of every route's errors.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem (RFC 9457)",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404 and not isinstance(error, Refusal):
        detail = f"there is nothing at {request.url.path}; /docs lists what there is"
    if error.status_code == 405:
        detail = f"{request.method} is not possible at {request.url.path}"
    return problem_response(error.status_code, detail, headers=error.headers, instance=request.url.path)


def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return validation_response(request.url.path, list(error.errors()))


def validation_response(path: str, faults: list[Any]) -> JSONResponse:
    """422 with one entry a fault: where, what is wrong, and what was given if it is short."""
    errors = [_fault(fault) for fault in faults]
    first = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors[:5])
    return problem_response(422, first, instance=path, errors=errors)


def _fault(fault: Any) -> dict[str, Any]:
    entry = {
        "loc": list(fault["loc"]),
        "msg": str(fault["msg"]).removeprefix("Value error, "),
        "type": fault["type"],
    }
    given = repr(fault.get("input"))
    if fault["type"] not in ("missing", "json_invalid") and len(given) <= 200:
        entry["given"] = given
    return entry


def _known(request: Request, error: Exception) -> JSONResponse:
    members = problem_of(error)
    assert members is not None
    return JSONResponse({**members, "instance": request.url.path}, members["status"], media_type=MEDIA_TYPE)


def _gone(request: Request, _error: Exception) -> JSONResponse:
    """Nobody reads this answer: the client broke off while it sent its body."""
    structlog.get_logger("api").info("client left", path=request.url.path)
    return problem_response(400, "the body broke off", instance=request.url.path)


def _unknown(request: Request, error: Exception) -> JSONResponse:
    number = uuid4().hex[:12]
    structlog.get_logger("api").error("unexpected error", number=number, path=request.url.path, exc_info=error)
    detail = f"this is a fault of the service, not of the request; its log has it under the number {number}"
    return problem_response(500, detail, instance=request.url.path, number=number)
