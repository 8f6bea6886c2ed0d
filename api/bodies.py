"""What a JSON body must be before its schema is asked: declared as JSON, text that UTF-8 can hold, not absurdly deep.

JSON can spell half of a surrogate pair ("\\ud800"), which no database and no answer can hold. It is refused here, for
all routes at once.
"""

from typing import Any

from fastapi import Request

from api.problems import Refusal

JSON_TYPE = "application/json"
MOST_NESTED = 32  # ours: no schema here nests half as deep


def media_type(request: Request) -> str:
    """The Content-Type without its parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def require_json(request: Request) -> None:
    """Refuse (415, 422) a body that is not such JSON. Of an empty one the schema tells what is missing."""
    kind = media_type(request)
    if kind != JSON_TYPE:
        raise Refusal(415, f"the Content-Type {kind!r} is not taken here; send Content-Type: {JSON_TYPE}")
    if not await request.body():
        return
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise Refusal(422, f"the body is no JSON ({error})") from error
    _require_plain(body)


def _require_plain(body: Any) -> None:
    waiting = [(body, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_NESTED:
            raise Refusal(422, f"the body is nested more than {MOST_NESTED} deep; nothing here takes that")
        if isinstance(value, str):
            _require_encodable(value)
        elif isinstance(value, dict):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            422,
            f"the text {text[:80]!a} has half of a surrogate pair at character {error.start}, which is no "
            "character; send whole ones",
        ) from error
