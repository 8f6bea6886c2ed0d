"""Which sites a plan may touch: those that the user wants kept, the only ones wanted, the first and the last."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from advisor.errors import InvalidPlan
from probes.records import Site


@dataclass(frozen=True)
class Restrictions:
    """What a user demands of a plan, whatever it costs in speed.

    keep          globs of modules or sites that stay as they are; what lies inside a module goes with it
    only          globs of those that may be touched; empty: all
    first_last    so many sites at the beginning and at the end, in the order of execution, stay as they are
    uniform_roles one cast a role, the same at every site that is cast at all, as most kernels want it
    native_only   only what native kernels run: a site all of whose products they take, or that stays as it is
    """

    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    first_last: int = 0
    uniform_roles: bool = False
    native_only: bool = False

    def __post_init__(self) -> None:
        if self.first_last < 0:
            raise InvalidPlan(f"first_last={self.first_last!r} is not possible: give a number of sites, 0 or more")

    def kept(self, sites: Sequence[Site]) -> dict[str, str]:
        """Name of each site that stays as it is → why. Raises InvalidPlan for a glob that no site matches."""
        found: dict[str, str] = {}
        for glob in self.keep:
            found |= dict.fromkeys(_matched(glob, sites, "keep"), f"keep names {glob!r}")
        touched = {name for glob in self.only for name in _matched(glob, sites, "only")}
        if self.only:
            others = [site.name for site in sites if site.name not in touched]
            found |= {name: "only does not name it" for name in others if name not in found}
        if self.first_last:
            ends = [*sites[: self.first_last], *sites[-self.first_last :]]
            why = f"it is among the {self.first_last} first or last sites"
            found |= {site.name: why for site in ends if site.name not in found}
        return found

    @property
    def told(self) -> tuple[str, ...]:
        """The demands as sentences, for the plan's notes."""
        said = [
            (self.keep, f"kept as asked: {', '.join(self.keep)}"),
            (self.only, f"only these were to be touched: {', '.join(self.only)}"),
            (self.first_last, f"the first {self.first_last} and the last {self.first_last} sites stay as asked"),
            (self.uniform_roles, "one cast a role at every site that is cast, as asked"),
            (self.native_only, "only sites whose products native kernels all take are cast to 8 bits, as asked"),
        ]
        return tuple(text for given, text in said if given)


def globs(given: str | Iterable[str] | None) -> tuple[str, ...]:
    """One glob or several as a tuple; None is none."""
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _matched(glob: str, sites: Sequence[Site], option: str) -> list[str]:
    found = [site.name for site in sites if any(fnmatchcase(place, glob) for place in _places(site.name))]
    if found:
        return found
    known = list(dict.fromkeys(place for site in sites for place in _places(site.name)))
    near = difflib.get_close_matches(glob.strip("*."), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise InvalidPlan(
        f"{option} names {glob!r}, and no site or module of the window matches: {hint}"
        f"Sites: {', '.join(site.name for site in sites[:8])}{', …' if len(sites) > 8 else ''}"
    )


def _places(name: str) -> list[str]:
    """A site's name, its module's path, and the paths of all modules that this lies in."""
    path = name.rsplit("/", 1)[0]
    parts = path.split(".")
    return [name, *(".".join(parts[:count]) for count in range(len(parts), 0, -1))]
