"""Column types that keep what SQLite would lose: non-finite floats, and the time zone of a time.

SQLite writes a NaN as NULL. So a Number is kept as a REAL where it is finite and as one of the texts "NaN",
"Infinity", "-Infinity" otherwise: SQLite's REAL affinity leaves a text that is no number alone. PostgreSQL's
double precision holds all of them natively. Json is kept as strict JSON text, in which a non-finite float is
the object {"$float": "NaN"}: readable by any JSON parser, and not to be confused with the string "NaN".
"""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, Double, Text
from sqlalchemy.types import TypeDecorator

FLOAT_TAG = "$float"


class Number(TypeDecorator[float]):
    """A float64; NaN, Infinity and -Infinity come back as they went in, and are not NULL. SQLite's -0.0 is 0.0."""

    impl = Double
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[float | None], Any] | None:
        # Instead of process_bind_param: after that, SQLAlchemy's Double would make floats of our texts again (2.1).
        return _sqlite_number if dialect.name == "sqlite" else super().bind_processor(dialect)

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        return None if value is None else float(value)


class Json(TypeDecorator[Any]):
    """Any JSON value, with non-finite floats; tuples come back as lists. None is SQL's NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(_tagged(value), allow_nan=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value, object_hook=_untagged)


class Time(TypeDecorator[datetime]):
    """A moment in UTC, to the microsecond; naive datetimes are refused."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; pass datetime.now(UTC) or another aware time")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def _sqlite_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else _name(value)


def _name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT_TAG: _name(value)}
    if isinstance(value, dict):
        return {key: _tagged(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(item) for item in value]
    return value


def _untagged(value: dict[str, Any]) -> Any:
    if len(value) == 1 and isinstance(value.get(FLOAT_TAG), str):
        return float(value[FLOAT_TAG])
    return value
