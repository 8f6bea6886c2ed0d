"""Reasons as a reader meets them: what those of several roles say of their whole site is said once."""

from __future__ import annotations

from collections.abc import Sequence


def told_once(reasons: Sequence[str]) -> tuple[list[str], list[str]]:
    """The clauses about "this site" that several of a site's reasons share, and the reasons without them.

    A reason is clauses between semicolons, and starts with the name of the cast: that one it keeps.
    """
    clauses = [reason.removesuffix(".").split("; ") for reason in reasons]
    rest = [clause for own in clauses for clause in own[1:] if "this site" in clause]
    shared = [clause for clause in dict.fromkeys(rest) if rest.count(clause) > 1]
    own = ["; ".join(clause for clause in parts if clause not in shared) + "." for parts in clauses]
    return [f"{clause}." for clause in shared], own
