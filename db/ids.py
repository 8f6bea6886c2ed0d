"""Ids of rows: a prefix that says what the row is, and 64 random bits in hex."""

import secrets
from typing import Literal

Prefix = Literal["mdl", "win", "pln", "run", "job", "wrk"]


def new_id(prefix: Prefix) -> str:
    """A fresh id such as `job_5f0c3a9be17d2c44`."""
    return f"{prefix}_{secrets.token_hex(8)}"
