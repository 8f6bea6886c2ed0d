"""What several roles say of their site is said once, and nothing is lost."""

from __future__ import annotations

from advisor.clauses import told_once


def test_shared_clauses_about_the_site_are_told_once() -> None:
    shared = "int8 throughout this site would cost 4× the loss"
    reasons = [f"e4m3fn: 31 dB; {shared}.", f"e4m3fn: 30 dB; {shared}; flagged: few values.", "e5m2: 25 dB."]
    of_site, own = told_once(reasons)
    assert of_site == [f"{shared}."]
    assert own == ["e4m3fn: 31 dB.", "e4m3fn: 30 dB; flagged: few values.", "e5m2: 25 dB."]


def test_what_one_role_alone_says_stays_with_it() -> None:
    reasons = ["stays fp32; this site's products would lose 9% of the batch.", "int8: 40 dB; e5m2 fails."]
    assert told_once(reasons) == ([], reasons)
