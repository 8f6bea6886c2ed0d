"""The one number type of everything that becomes JSON: NaN and infinities survive, as words.

The strings are those of `probes.numbers`; here they become pydantic types.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from probes.numbers import NON_FINITE, as_json, from_json

Number = Annotated[
    float,
    BeforeValidator(from_json),
    PlainSerializer(as_json, return_type=float | str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(NON_FINITE), "type": "string"}]}),
]
"""A float of which NaN and the infinities survive JSON, as "NaN", "Infinity" and "-Infinity"."""

FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]
"""A float that must be finite: for inputs such as a tolerance."""
