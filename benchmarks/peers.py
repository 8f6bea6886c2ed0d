"""What other libraries make of the values on which they differ: `python benchmarks/peers.py --write docs/peers.md`.

Each library in `peer_casts.py` is given one value at a time (or one block of 32), and what comes back is put into the
tables of docs/peers.md, beside our own casts, with the versions. Without --write the page is printed.
The page is only overwritten if every library is there, so that no row of it is older than another; --partial writes
what there is, and says on the page what was missing. tests/test_docs.py holds our own rows to what our casts give.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peer_casts import LIBRARIES, PeerCast, installed
from torch import Tensor

from probes.casts import Cast

Row = list[float | None]  # what came back; None for an error

INF, NAN = math.inf, math.nan
BLOCK, PLACE = 32, 5  # in the blocks: their size, and where the one odd value stands


@dataclass(frozen=True)
class Table:
    """One format and the values that are given to it.

    casts   ours; the work of the first is what other libraries are asked to do
    inputs  a value each; or, `in_block`, a block of ones with the value in it, of which the value and a one are read
    """

    title: str
    casts: tuple[str, ...]
    inputs: tuple[float, ...]
    about: str
    in_block: bool = False

    @property
    def columns(self) -> list[str]:
        """Headings."""
        shown = [text(value) for value in self.inputs]
        return [part for one in shown for part in (one, f"a 1 beside {one}")] if self.in_block else shown

    @property
    def given(self) -> list[float]:
        """The value in each column."""
        return [part for value in self.inputs for part in ((value, 1.0) if self.in_block else (value,))]

    def results(self, run: Callable[[Tensor], Tensor]) -> Row:
        """What comes back, column by column."""
        return [value for given in self.inputs for value in self._read(run, given)]

    def _read(self, run: Callable[[Tensor], Tensor], value: float) -> Row:
        x = torch.ones(1, BLOCK if self.in_block else 1)
        places = (PLACE, PLACE - 1) if self.in_block else (0,)
        x[0, places[0]] = value
        try:
            back = run(x)
        except (ValueError, OverflowError):
            return [None] * len(places)
        return [float(back[0, place]) for place in places]


TABLES = (
    Table(
        "E4M3 (largest value 448)",
        ("e4m3fn/none/nearest", "e4m3fn/none/nearest:inf"),
        (464.0, 464.1, INF, NAN, 2.0**-10, -0.0),
        "464 is the tie between 448 and 480, whose code is NaN's: the even neighbour is 448. 2^-10 is the tie between "
        "0 and the smallest value, 2^-9: the even neighbour is 0.",
    ),
    Table(
        "E5M2 (largest value 57344)",
        ("e5m2/none/nearest", "e5m2/none/nearest:inf"),
        (61439.0, 61440.0, INF, NAN, 2.0**-17, -0.0),
        "61440 is the tie between 57344 and 65536, whose code is Inf's: the even neighbour is Inf.",
    ),
    Table(
        "E4M3 FNUZ (largest value 240, no Inf, no -0)",
        ("e4m3fnuz/none/nearest", "e4m3fnuz/none/nearest:inf"),
        (247.9, 248.0, INF, NAN, -0.0, -(2.0**-11)),
        "The code of -0 is NaN's, so whatever rounds to -0 must become +0.",
    ),
    Table(
        "E8M0 (powers of two from 2^-127 to 2^127: a format for scales)",
        ("e8m0/none/nearest", "e8m0/none/nearest:inf"),
        (0.0, 2.0**-128, 1.5, 3.0, -2.0, INF, NAN),
        "There is no zero and no sign. 1.5 and 3 are ties: up is the even significand, down (of 3 to 2) the even code.",
    ),
    Table(
        "E2M1 (largest value 6, neither Inf nor NaN)",
        ("e2m1/none/nearest",),
        (0.25, 5.0, 7.0, INF, NAN, -0.0),
        "0.25 is the tie between 0 and 0.5, 5 the tie between 4 and 6: the even neighbours are 0 and 4. Neither Inf "
        "nor NaN has a code.",
    ),
    Table(
        "A block of 32 ones and one other value, to MX E4M3",
        ("e4m3fn/block32/e8m0/nearest", "e4m3fn/block32/e8m0/nearest:inf", "e4m3fn/block32/e8m0up/nearest"),
        (500.0, INF, NAN),
        "What one value does to the 31 beside it. OCP's rule gives the block with 500 the scale 1, so that 500 lies "
        "beyond the largest value; the rounded-up rule gives it 2.",
        in_block=True,
    ),
)

WHY = """Two libraries that both say "E4M3" can turn the same tensor into different numbers, and they differ where it
hurts: at overflow, Inf and NaN. An emulation that turns NaN into 448 hides a divergence; one that turns 464.1 into NaN
makes one. So here

- values that overflow, are flushed to zero or are not finite are counted before a cast, from the tensor itself: no
  cast's behaviour can hide them;
- the mode is in the cast's string: saturation unless `:inf` is at its end, never a setting elsewhere;
- NaN stays NaN in every format, also where the format has no code for it.
"""

HEAD = """# The same values in other libraries

<!-- Written by benchmarks/peers.py: change it there. -->

Measured, not quoted: `python benchmarks/peers.py --write docs/peers.md` gives each value to each library that is
installed and writes this page. Our own casts stand first, as their strings; what a string means is in
[formats.md](formats.md). Every input is a float32 on the CPU; `x` is a torch tensor, `a` a numpy array.
"""


@dataclass(frozen=True)
class Measured:
    """Rows of every table, ours first: what was called, the library ("" for ours), what came back."""

    rows: Mapping[str, list[tuple[str, str, Row]]]

    @classmethod
    def of(cls, peers: Sequence[PeerCast]) -> Measured:
        """Every table with our casts and these."""
        rows = {}
        for table in TABLES:
            own = [(f"`{cast}`", "", table.results(Cast.parse(cast))) for cast in table.casts]
            theirs = [
                (f"{peer.library} `{peer.call}`", peer.library, table.results(peer.run))
                for peer in peers
                if peer.work == table.casts[0]
            ]
            rows[table.title] = own + theirs
        return cls(rows)

    def section(self, table: Table) -> str:
        """The table in Markdown."""
        head = f"| | {' | '.join(table.columns)} |\n|---|{'---:|' * len(table.columns)}"
        rows = [f"| {call} | {' | '.join(map(text, back))} |" for call, _, back in self.rows[table.title]]
        return "\n".join((f"## {table.title}\n\n{wrapped(table.about)}\n", head, *rows))

    def findings(self) -> str:
        """Which libraries do what an engineer may not expect, said from the tables."""
        formats: dict[str, dict[str, list[str]]] = {said: {} for said in FINDINGS}
        for table in TABLES:
            written = Cast.parse(table.casts[0])
            name = written.format.name + (" blocks" if table.in_block else "")
            own = self.rows[table.title][0][2]
            for _, library, back in self.rows[table.title][len(table.casts) :]:
                for given, got, ours in zip(table.given, back, own, strict=True):
                    beside = table.in_block and given == 1
                    has = table.in_block or is_value(got, written)
                    for said in found(given, got, ours, beside, has):
                        formats[said].setdefault(library, [])
                        formats[said][library] += [name] * (name not in formats[said][library])
        told = (
            f"- {said}: " + "; ".join(f"{library} ({', '.join(names)})" for library, names in by_library.items()) + "."
            for said, by_library in formats.items()
            if by_library
        )
        return "\n".join(wrapped(line, indent="  ") for line in told)


NAN_LOST = "NaN becomes a number"
INF_LOST = "Inf becomes a number, in some mode"
NUMBER_LOST = "A number becomes Inf or NaN or an error, in some mode"
NEIGHBOUR_LOST = "A value beside Inf or NaN is lost"
SIGN_LOST = "-0 becomes +0 in a format that has both"
NO_SUCH_VALUE = "A number or Inf comes back that the format does not have"
FINDINGS = (NAN_LOST, INF_LOST, NUMBER_LOST, NEIGHBOUR_LOST, SIGN_LOST, NO_SUCH_VALUE)


def found(given: float, got: float | None, own: float | None, beside: bool, has: bool) -> Iterator[str]:
    """Those of FINDINGS that apply to what a library made of one value.

    own     what our default makes of it
    beside  whether it is a 1 beside another value
    has     whether the format has what came back
    """
    number = got is not None and math.isfinite(got)
    if beside and got != given:
        yield NEIGHBOUR_LOST
    elif number and not math.isfinite(given):
        yield NAN_LOST if math.isnan(given) else INF_LOST
    elif math.isfinite(given) and not number:
        yield NUMBER_LOST
    elif number and given == 0 and got == own == 0 and math.copysign(1, got) != math.copysign(1, own):
        yield SIGN_LOST
    if not has:
        yield NO_SUCH_VALUE


def is_value(got: float | None, written: Cast) -> bool:
    """Whether a cast's format has what came back; NaN and errors count as if it had."""
    if got is None or math.isnan(got):
        return True
    return written.format.overflow == INF if math.isinf(got) else float(written(torch.tensor(got))) == got


def page(measured: Measured, versions: Mapping[str, str], missing: Iterable[str]) -> str:
    """docs/peers.md."""
    note = f"{', '.join(f'{library} {version}' for library, version in versions.items() if version)}; "
    note += f"Python {platform.python_version()}. "
    if missing:
        note += f"Not installed, hence without rows: {', '.join(missing)}. "
    note += (
        "microxcaling is on no package index: its rows are its algorithm, re-expressed in `benchmarks/peer_casts.py`."
    )
    sections = [HEAD, WHY, *(measured.section(table) + "\n" for table in TABLES)]
    sections += ["## What stands out\n\nFrom the tables, by library and format:\n\n" + measured.findings() + "\n"]
    return "\n".join([*sections, "## Versions\n", wrapped(note)]) + "\n"


def text(value: float | None) -> str:
    """448, 2^-10, -0, Inf, NaN."""
    if value is None:
        return "an error"
    if math.isnan(value):
        return "NaN"
    sign = "-" if math.copysign(1, value) < 0 else ""
    if math.isinf(value):
        return f"{sign}Inf"
    mantissa, exponent = math.frexp(abs(value))
    if mantissa == 0.5 and not -2 <= exponent - 1 <= 20:
        return f"{sign}2^{exponent - 1}"
    return f"{sign}{abs(value):.7g}"


def wrapped(paragraph: str, indent: str = "") -> str:
    """The paragraph in lines of the page's width, the second and later ones indented."""
    return textwrap.fill(paragraph, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the file to write; without it the page is printed")
    parser.add_argument("--partial", action="store_true", help="write even though libraries are missing")
    asked = parser.parse_args(arguments)
    peers, versions, missing = installed()
    for library, reason in missing.items():
        print(f"{library} cannot be imported ({reason}): pip install {LIBRARIES[library][0]}", file=sys.stderr)
    if asked.write and missing and not asked.partial:
        sys.exit(f"{asked.write} is left as it is: install what is missing, or write a partial page with --partial")
    told = page(Measured.of(peers), versions, missing)
    if asked.write:
        asked.write.write_text(told)
    else:
        print(told)


if __name__ == "__main__":
    main()
