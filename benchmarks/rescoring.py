"""How well casts are scored that nobody thought of when the window was recorded: `python benchmarks/rescoring.py`.

The demo's GPT and ConvNet are trained a little and watched with many candidate casts. Then the measurements of all but
a few are taken out of the window, and `advisor.score` is asked for the others: its prediction from sketches and
coherence beside what was measured. `rescoring.json` holds, for each model, set of kept candidates and held-out cast,
the median ratio and the root mean square of log2 of it: of the damage over the forward slots, of the noise ratio over
the gradients'.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import advisor
from advisor.cli.demo import SHOWS
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from probes.casts import Cast
from probes.noise_found import LADDER
from probes.records import GRADIENT
from probes.window import Window

KEPT = "e4m3fn", "e5m2", "int8", "bf16", "fp16"
FLUSH = "int4/tensor/static=1e+36"  # writes every tensor as zeros
HELD_OUT = {
    "other grids": ("e3m4", "e4m3fnuz", "e5m2fnuz", "e2m3", "e3m2", "int4", "e2m1", "fp16/tensor", "bf16/tensor"),
    "other scales": ("e4m3fn/none", "e5m2/none", "e4m3fn/tensor/current:pow2", "int8/tensor/current:pow2"),
    "stochastic": ("e4m3fn/tensor/current/stochastic", "int8/tensor/current/stochastic"),
    "shrinking": ("e4m3fn/tensor/current/zero", "int8/tensor/current/zero", "bf16/none/zero", "int8/none"),
}


def recorded(model: str, warmup: int, scored: int) -> Window:
    """A window with every cast measured."""
    told = {name: part for name, part in SHOWS[model].description.items() if name != "name"}
    trainer = Trainer(ArchitectureSpec.parse(told))
    for _ in range(warmup):
        trainer.step()
    casts = [*KEPT, FLUSH, *(cast for group in HELD_OUT.values() for cast in group)]
    with advisor.probe(
        trainer.model, trainer.optimizer, steps=2 * scored, curvature_steps=scored, casts=casts
    ) as window:
        while not window.done:
            trainer.step()
    return window


def with_only(window: Window, casts: Sequence[str]) -> Window:
    """The window as it would be had these alone been its candidates."""
    kept, header = {str(Cast.parse(cast)) for cast in casts}, window.header()
    always = {str(cast) for cast in LADDER}
    for slot in header["slots"]:
        evidence = slot["evidence"]
        for kind in ("directional", "directional_se"):
            evidence[kind] = {cast: v for cast, v in evidence[kind].items() if cast in kept}
        for kind in ("relative_noise", "systematic_noise", "systematic_noise_se"):
            held = kept | always if slot["role"] == GRADIENT else kept
            evidence[kind] = {cast: v for cast, v in evidence[kind].items() if cast in held}
    return Window.from_parts(header, [window.history(*slot) for slot in window.slots])


def compared(
    window: Window, kept: Sequence[str], held_out: Sequence[str], gradients: bool
) -> dict[str, dict[str, float]]:
    """Predicted over measured of each held-out cast: damage, or noise of gradients."""
    slots = [slot for slot in window.product_slots if (slot.role == GRADIENT) == gradients]
    value = "noise_ratio" if gradients else "damage"
    truth = advisor.score(window, held_out, slots=slots).columns
    guess = advisor.score(with_only(window, kept), held_out, slots=slots).columns
    found = {}
    for cast in held_out:
        here = (truth["cast"] == str(Cast.parse(cast))) & (truth[value] > 0) & (guess[value] > 0)
        if not gradients:
            here &= truth["damage"] > 2 * truth["damage_se"]
        octaves = np.log2(guess[value][here] / truth[value][here])
        if len(octaves):
            found[cast] = {
                "slots": len(octaves),
                "median_ratio": round(float(2 ** np.median(octaves)), 3),
                "rms_octaves": round(math.sqrt(float((octaves**2).mean())), 3),
            }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, leave out, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["gpt", "convnet"], choices=sorted(SHOWS))
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--scored", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for model in asked.models:
        window = recorded(model, asked.warmup, asked.scored)
        for name, kept in (("default candidates", KEPT), ("and one that flushes all", (*KEPT, FLUSH))):
            for group, casts in HELD_OUT.items():
                for kind in ("damage", "noise of gradients"):
                    of_casts = compared(window, kept, casts, kind != "damage")
                    found.setdefault(model, {}).setdefault(kind, {}).setdefault(name, {})[group] = of_casts
                    for cast, told in of_casts.items():
                        print(f"{model:8} {kind:18} {name:26} {cast:34} {told}")
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
