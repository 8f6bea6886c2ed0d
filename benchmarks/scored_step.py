"""What one scored step costs, in plain training steps: `python benchmarks/scored_step.py`.

A GPT-2 of 4 layers and width 256, vocabulary 8,192, batch 8 × 128, AdamW. Plain steps, steps whose sketches alone are
recorded and scored steps take turns; printed are the medians of their times over that of the plain ones, with the
spread of the plain ones (half the range that holds the middle half, over the median), for the given candidate casts.
Needs transformers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

import advisor
from probes.probing import USUAL_CASTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--casts", nargs="+", default=list(USUAL_CASTS))
    asked = parser.parse_args(arguments)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        ids = torch.randint(0, sizes["vocab_size"], (8, sizes["n_positions"]))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    def second_step(curvature_steps: int) -> float:
        """Of a window: its first one counts FLOPs as well, and a scored one is the second to be comparable."""
        with advisor.probe(
            model, optimizer, steps=2, every=1, curvature_steps=curvature_steps, casts=asked.casts
        ) as window:
            took = [step(), step()]
        assert window.done
        return took[1]

    for _ in range(2):
        step()
    second_step(2)
    times: dict[str, list[float]] = {"plain": [], "sketched": [], "scored": []}
    for _ in range(asked.rounds):
        times["plain"].append(step())
        times["sketched"].append(second_step(0))
        times["scored"].append(second_step(2))
    plain = statistics.median(times["plain"])
    quarters = statistics.quantiles(times["plain"], n=4)
    print(
        f"plain step {plain:.3f} s ± {(quarters[2] - quarters[0]) / 2 / plain:.1%}, {torch.get_num_threads()} threads"
    )
    for kind in ("sketched", "scored"):
        print(f"{kind:<9}{statistics.median(times[kind]) / plain:6.2f} plain steps, casts {', '.join(asked.casts)}")


if __name__ == "__main__":
    main()
