"""A plan of many repeated blocks is a page that can be read, and nothing of it is lost."""

from __future__ import annotations

import re

import pytest

from advisor.hardware import hardware_named
from advisor.plan import Plan, Watch
from advisor.planner import plan_from_rows
from advisor.site_names import joint_name, ranges
from tests.planned import flops, linear, score

BLOCKS = 25


def plan_of(blocks: int, odd: int | None = None) -> Plan:
    """Two sites a block; block `odd` has an outlier that int8 does not survive."""
    sites = [linear(f"blocks.{index}.mlp.{name}") for index in range(blocks) for name in ("up", "down")]
    rows = []
    for index, site in enumerate(sites):
        for role in site.roles:
            for cast, cost in (("e4m3fn", 1e-6), ("e5m2", 4e-6), ("int8", 3e-7)):
                row = score(site.name, role, cast, cost * (1 + index / 100), confidence=0.9, sqnr_db=31 + index / 100)
                if odd is not None and site.name.startswith(f"blocks.{odd}.") and cast == "int8":
                    row |= {"amax": 300.0, "damage": row["damage"] and 1.0, "noise_ratio": 0.5}
                rows.append(row)
    return plan_from_rows(
        sites,
        rows,
        hardware=hardware_named("h100"),
        tolerance=1e-2,
        max_lost_batch=0.05,
        total_flops=flops(sites),
        mean_loss=2.3,
    )


def test_fifty_sites_fit_a_page_and_their_numbers_are_ranges() -> None:
    text = str(plan_of(BLOCKS))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 70
    assert f"blocks.0-{BLOCKS - 1}.mlp.up" in text
    assert "31.0–31.5 dB" in text


def test_a_block_that_differs_stands_apart() -> None:
    text = str(plan_of(BLOCKS, odd=7))
    assert f"blocks.0-6,8-{BLOCKS - 1}.mlp.up" in text
    assert "\n  blocks.7.mlp.up\n" in text
    assert "the largest value is 300× the RMS" in text


def test_a_cast_s_defaults_are_not_in_the_table() -> None:
    site = linear("blocks.0.mlp.up")
    rows = [score(site.name, role, "e4m3fn/row/current/nearest", 1e-6) for role in site.roles]
    plan = plan_from_rows(
        [site],
        rows,
        hardware=hardware_named("h100"),
        tolerance=1e-2,
        max_lost_batch=0.05,
        total_flops=flops([site]),
        mean_loss=2.3,
    )
    table = str(plan).split("casts\n")[1].split("\n\n")[0]
    assert " ".join(table.split()).endswith("input e4m3fn/row · weight e4m3fn/row · grad_output e4m3fn/row")


def test_every_word_of_every_reason_is_shown() -> None:
    plan = plan_of(6, odd=2)
    flat = set(re.findall(r"[a-z]+", str(plan)))
    for one in plan.assignments:
        assert set(re.findall(r"[a-z]+", one.reason)) <= flat


def test_what_to_watch_and_the_summary_come_first() -> None:
    entry = Watch(site="blocks.0.mlp.up", role="input", metric="amax", threshold=4.0, sentence="blocks.0.mlp.up: 4.")
    plan = plan_of(2).model_copy(update={"watch": (entry,), "summary": ("it is limited by nothing",)})
    text = str(plan)
    assert text.index("it is limited by nothing") < text.index("What to watch") < text.index("Reasons")
    assert "  - blocks.0.mlp.up: 4." in text


@pytest.mark.parametrize(
    ("names", "joint"),
    [
        (["blocks.0.up", "blocks.1.up", "blocks.3.up"], "blocks.0-1,3.up"),
        (["0/op.1"], "0/op.1"),
        (["layers.9", "layers.10"], "layers.9-10"),
        (["h.0.attn/sdpa.0", "h.1.attn/sdpa.0"], "h.0-1.attn/sdpa.0"),
    ],
)
def test_joint_names(names: list[str], joint: str) -> None:
    assert joint_name(names) == joint


def test_ranges() -> None:
    assert ranges(["10", "2", "1", "4"]) == "1-2,4,10"
