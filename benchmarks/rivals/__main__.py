"""The plan against rules of thumb: `python -m benchmarks.rivals --data FOLDER`.

Six models on real data (`benchmarks/advice/models.py`), at least five seeds each: from one checkpoint a seed, every
contender (`recipes.py`) trains on, and so does fp32, on the same batches. Then the table: `docs/rivals.md` and
`benchmarks/rivals.json`. What was fixed before the first run is in `table.py` and `trainings.py`.

A run that was interrupted goes on where it was (`--results`). `--part 1/2` and `--part 2/2` share the seeds out between
two processes. Needs torchao and nvidia-modelopt beside the project (benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.advice.data import use
from benchmarks.advice.models import MODELS
from benchmarks.rivals.recipes import RECIPES
from benchmarks.rivals.table import write
from benchmarks.rivals.trainings import BASELINE, CONTROL, OURS, Results, plans, run, start

SEEDS = 5
CONTENDERS = [BASELINE, CONTROL, *RECIPES, *OURS]


def main() -> int:
    """Run what is missing, and write the table unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the real data; default: the environment's ADVISOR_DATA")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each model and contender")
    parser.add_argument("--results", type=Path, default=Path("advisor-data/rivals.jsonl"), help="where lines are kept")
    parser.add_argument("--part", default="1/1", help="which of several processes this is, as 1/2")
    parser.add_argument("--table", action="store_true", help="make no trainings: write the table of what there is")
    options = parser.parse_args()
    use(options.data)
    torch.set_num_threads(1)  # two trainings beside each other are faster than one with two threads
    warnings.simplefilter("ignore")  # torchao's and ModelOpt's, of kernels that only a GPU has
    part, parts = map(int, options.part.split("/"))
    results = Results(options.results)
    if not options.table:
        for seed in range(part - 1, options.seeds, parts):
            for model in options.models:
                _fill(results, model, seed, options.contenders)
    if parts == 1:
        print(write(Results(options.results).rows))
    return 0


def _fill(results: Results, model: str, seed: int, contenders: Sequence[str]) -> None:
    missing = [name for name in contenders if not results.has(model, seed, name)]
    if not missing:
        return
    at = start(model, seed)
    for name, plan in plans(at, missing).items():
        print(f"{model} seed {seed}: {name} ", end="", file=sys.stderr, flush=True)
        found = run(at, name, plan)
        predicted = None if plan is None else plan.predicted
        row = {"model": model, "seed": seed, "contender": name, **found}
        row["share_8bit"] = 0.0 if predicted is None else predicted.share_8bit
        row["predicted_damage"] = None if predicted is None else predicted.damage
        results.add(row)
        print(f"{found['held_out']:.5f} in {found['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
