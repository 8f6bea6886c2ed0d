"""The figures of `NOISE_CALIBRATION` in `advisor/intervals.py`: `python -m benchmarks.advice.noise_calibration`

From `advice.json`, of gradients' noise ratios: measured over predicted in the middle of the models; how far each
model's median is from that; and how far pairs are from their model's median, by the quartiles, without what a
confidence holds of it already. Of casts that were candidates, and of those that were told from other casts' noise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from advisor.confidence import NOISE
from advisor.intervals import Calibration
from benchmarks.advice.table import RESULT
from probes.numbers import from_json
from probes.records import GRADIENT

QUARTILES_APART = 1.349  # of a normal, in standard deviations


def fitted(agreements: Sequence[Mapping[str, Any]]) -> Calibration:
    """Of one agreement a model (`agreement.Agreement`): predicted over measured."""
    medians, spreads = [], []
    for one in agreements:
        ratio, low, high = (math.log2(from_json(one[name])) for name in ("ratio", "low", "high"))
        medians.append(-ratio)
        spreads.append((high - low) / QUARTILES_APART)
    own = math.sqrt(max(statistics.fmean(spread**2 for spread in spreads) - NOISE.floor**2, 0.0))
    return Calibration(2 ** statistics.median(medians), statistics.pstdev(medians), own)


def main() -> None:
    """Print both."""
    models = json.loads(RESULT.read_text())["models"].values()
    print("measured", fitted([one["roles"][GRADIENT]["agreement"] for one in models]))
    print("sketch  ", fitted([one["from_sketches"][GRADIENT] for one in models]))


if __name__ == "__main__":
    main()
