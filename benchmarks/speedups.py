"""Predicted times against those that others measured: `python benchmarks/speedups.py`.

Three tables, from the figures in `published_products.json` and `published_speedups.json`, each with its source:

    products  single matrix products on an H100 and a B200; two constants of the model (`product_start_s` and `tile_s`)
              and the rate of its small tiles were fitted to the 16-bit and B200 sets, nothing to the others
    layers    linear layers, forward and backward, in bf16 and in 8 bits with all casts; nothing was fitted to these.
              They were measured on an H100 with less power and bandwidth than the data sheet's (`machine` in the file):
              once predicted for the table's row, once for that one
    steps     whole training steps of Llama 3 8B: what was measured in bf16, with the predicted time of its linear
              layers exchanged for that in 8 bits. Communication, recomputation and fusion are not in it

Ratios are predicted over measured. Takes a second; no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from advisor.castnames import KEEP, parse_cast
from advisor.hardware import Hardware, hardware_named
from advisor.operands import Operand
from advisor.product_shapes import ProductShape
from advisor.roofline import product_time_s, site_time_s
from probes.format_names import format_named
from probes.records import Product, Site

HERE = Path(__file__).parent
LARGE_FLOPS = 1e9
ROLES = ("input", "weight", "grad_output")
# Meta's Llama 3 8B: 32 layers of (inputs, outputs), how many of each; the output layer stays in bf16 in these runs
LLAMA_LAYERS = ((4096, 4096, 2), (4096, 1024, 2), (4096, 14336, 2), (14336, 4096, 1))
LLAMA_TOKENS, LLAMA_DEPTH = 8192, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    speedups = json.loads((HERE / "published_speedups.json").read_text())
    print_products(json.loads((HERE / "published_products.json").read_text())["sets"])
    machine = speedups["machine"]
    print_layers(speedups["sets"], replace(hardware_named(machine["device"]), **machine["changes"]))
    print_steps(speedups["steps"]["runs"])


def print_products(sets: list[dict[str, Any]]) -> None:
    print(f"{'products of more than 1 GFLOP':42}   n  median ratio  within 25%   least    most")
    for one in sets:
        ratios = product_ratios(one)
        close = sum(abs(ratio - 1) < 0.25 for ratio in ratios) / len(ratios)
        print(
            f"{one['device']:6} {one['format']:8} {one['source'][:26]:26} {len(ratios):3}"
            f" {statistics.median(ratios):13.2f} {close:11.0%} {min(ratios):7.2f} {max(ratios):7.2f}"
        )


def print_layers(sets: list[dict[str, Any]], machine: Hardware) -> None:
    print(f"\n{'tokens, inputs, outputs':24} {'cast':18} speed-up  table  there   bf16 ms  there   8-bit ms  there")
    ratios: dict[str, list[float]] = {"the table's row": [], "that machine": []}
    for one in sets:
        for *shape, measured, wide_s, narrow_s in one["layers"]:
            wide, narrow = layer_times_s(shape, hardware_named(one["device"]), one["cast"])
            wide_there, narrow_there = layer_times_s(shape, machine, one["cast"])
            for name, ratio in zip(ratios, (wide / narrow, wide_there / narrow_there), strict=True):
                ratios[name].append(ratio / measured)
            times = [wide_s, wide_there, narrow_s, narrow_there] if wide_s else []
            told = "".join(f"{value * 1e3:{width}.3f}" for value, width in zip(times, (10, 7, 11, 7), strict=False))
            speedups = f"{measured:8.2f} {wide / narrow:6.2f} {wide_there / narrow_there:6.2f}"
            print(f"{shape!s:24} {one['cast'][:18]:18} {speedups}{told}")
    for name, found in ratios.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"speed-up, predicted for {name} over measured: median {statistics.median(found):.2f}, {spread}")


def print_steps(runs: list[dict[str, Any]]) -> None:
    print(f"\n{'steps':41} speed-up predicted   share of linear layers, their speed-up")
    for one in runs:
        found, share, layers = step_speedup(one)
        print(f"{one['device']:6} {one['cast']:34} {one['speedup']:8.2f} {found:9.2f} {share:10.0%} {layers:14.2f}")


def product_ratios(one: dict[str, Any]) -> list[float]:
    """Predicted over measured time of each product above 1 GFLOP."""
    hardware = hardware_named(one["device"])
    operand = Operand(one["format"], format_named(one["format"]).stored_bits)
    found = []
    for batch, m, n, k, tflops in one["products"]:
        flops = 2.0 * batch * m * n * k
        if flops > LARGE_FLOPS:
            shape = ProductShape(Product("forward", ("input", "weight"), flops), "linear", "bf16", batch, m, n, k, 1.0)
            found.append(product_time_s(shape, operand, operand, hardware) / (flops / tflops / 1e12))
    return found


def layer_times_s(shape: list[int], hardware: Hardware, cast: str) -> tuple[float, float]:
    """A linear layer of (tokens, inputs, outputs), three products, as it is in bf16 and with all roles cast."""
    site = linear(*shape)
    kept, narrow = parse_cast(KEEP), parse_cast(cast)
    return (
        site_time_s(site, dict.fromkeys(ROLES, kept), hardware),
        site_time_s(site, dict.fromkeys(ROLES, narrow), hardware),
    )


def step_speedup(one: dict[str, Any]) -> tuple[float, float, float]:
    """Predicted speed-up of a step, what part of it the linear layers took, and their own speed-up."""
    wide = narrow = 0.0
    hardware = hardware_named(one["device"])
    for inputs, outputs, count in LLAMA_LAYERS:
        before, after = layer_times_s([LLAMA_TOKENS, inputs, outputs], hardware, one["cast"])
        wide, narrow = wide + LLAMA_DEPTH * count * before, narrow + LLAMA_DEPTH * count * after
    step_s = LLAMA_TOKENS / one["tokens_s"]
    return step_s / (step_s - wide + narrow), wide / step_s, wide / narrow


def linear(tokens: int, inputs: int, outputs: int) -> Site:
    """The record of a bias-free linear layer in bf16."""
    shapes = {"input": (tokens, inputs), "weight": (outputs, inputs), "grad_output": (tokens, outputs)}
    flops = 2.0 * tokens * inputs * outputs
    return Site(
        name="linear",
        op="linear",
        roles=ROLES,
        shapes=shapes,
        dtypes=dict.fromkeys(ROLES, "bfloat16"),
        elements={role: float(a * b) for role, (a, b) in shapes.items()},
        products=(
            Product("forward", ("input", "weight"), flops),
            Product("input_grad", ("grad_output", "weight"), flops),
            Product("weight_grad", ("input", "grad_output"), flops),
        ),
        parameter="weight",
        calls=1.0,
    )


if __name__ == "__main__":
    main()
