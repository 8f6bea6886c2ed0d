"""Which status an error has, and the members of its problem (RFC 9457). No web framework: jobs end with problems too.

Errors of the lower floors carry their own sentence; the table gives each its status.
"""

import http
from collections.abc import Mapping
from typing import Any

from advisor.errors import AdvisorError
from api.schemas import Problem
from db.errors import NameTaken, NotFound, SchemaMismatch, StillRunning
from probes.errors import ProbeError

# The first class that fits decides. What a user can get wrong in a body is 422.
STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFound, 404),
    (NameTaken, 409),
    (StillRunning, 409),
    (SchemaMismatch, 503),
    (AdvisorError, 422),
    (ProbeError, 422),
)

TITLES: Mapping[int, str] = {
    409: "Conflict with the present state",
    413: "Body too large",
    422: "Request cannot be carried out as it is",
}


def problem(status: int, detail: str, **members: Any) -> dict[str, Any]:
    """The members of a problem; None ones are left out."""
    title = members.pop("title", None) or TITLES.get(status) or http.HTTPStatus(status).phrase
    return Problem(title=title, status=status, detail=detail, **members).model_dump(exclude_none=True)


def problem_of(error: Exception) -> dict[str, Any] | None:
    """The problem of an error that the table knows; None if it is a fault of ours."""
    for kind, status in STATUS:
        if isinstance(error, kind):
            return problem(status, str(error), type=f"urn:numerics-advisor:{type(error).__name__}")
    return None
