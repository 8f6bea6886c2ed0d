"""What several roles say of their site is said once, and nothing is lost."""

from __future__ import annotations

from advisor.clauses import merged, told_once


def test_shared_clauses_about_the_site_are_told_once() -> None:
    shared = "int8 throughout this site would cost 4× the loss"
    reasons = [f"e4m3fn: 31 dB; {shared}.", f"e4m3fn: 30 dB; {shared}; flagged: few values.", "e5m2: 25 dB."]
    of_site, own = told_once(reasons)
    assert of_site == [f"{shared}."]
    assert own == ["e4m3fn: 31 dB.", "e4m3fn: 30 dB; flagged: few values.", "e5m2: 25 dB."]


def test_what_one_role_alone_says_stays_with_it() -> None:
    reasons = ["stays fp32; this site's products would lose 9% of the batch.", "int8: 40 dB; e5m2 fails."]
    assert told_once(reasons) == ([], reasons)


def test_sentences_that_differ_in_numbers_become_one() -> None:
    """Ranges are the outermost ends; digits inside words stay words."""
    told = [
        "e4m3fn: 31.5 dB, +1.0e-06 loss (2.0e-07 to 4.0e-06, under 0.1% of the tolerance).",
        "e4m3fn: 30.9 dB, +3.0e-06 loss (9.0e-07 to 9.0e-06, under 0.1% of the tolerance).",
        "e5m2: 25.0 dB, +3.0e-06 loss (9.0e-07 to 9.0e-06, under 0.1% of the tolerance).",
    ]
    assert merged(told) == [
        (
            "e4m3fn: 30.9–31.5 dB, +1.0e-06 to +3.0e-06 loss (2.0e-07 to 9.0e-06, under 0.1% of the tolerance).",
            [0, 1],
        ),
        (told[2], [2]),
    ]
    assert merged(["loses <0.0001% of it", "loses 0.2% of it"])[0][0] == "loses <0.0001–0.2% of it"
    assert merged(["12× the RMS", "9× the RMS"]) == [("9–12× the RMS", [0, 1])]
