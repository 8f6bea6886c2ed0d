"""Matrix products of this CPU beside their predicted times: `python benchmarks/products_cpu.py`.

The hardware is `advisor.measured_cpu()`, measured at the start; `--fixed` takes the table's row `cpu`
instead, which is one core of another machine perhaps. Each product is the best of a few runs, all in turns. With one
thread (OMP_NUM_THREADS=1) it is the processor's time that counts, so that other work on the machine takes none away
except by sharing caches and execution units. Takes half a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from advisor.calibration import measured_cpu
from advisor.hardware import hardware_named
from advisor.operands import Operand
from advisor.product_shapes import ProductShape
from advisor.roofline import product_time_s
from probes.format_names import format_named
from probes.records import Product

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((64, 64, 64), (256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 512, 512), (512, 2048, 512))
LARGE = ((512, 512, 2048), (2048, 2048, 512), (4096, 256, 1024), (1024, 1024, 4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed", action="store_true", help="predict with the table's row, not with a measurement")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    hardware = hardware_named("cpu") if options.fixed else measured_cpu(15)
    rates = ", ".join(f"{name} {hardware.tflops[name] * 1e3:.0f} GFLOPS" for name in DTYPES)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {hardware.title}: {rates}")
    jobs = [(name, *shape) for name in DTYPES for shape in (*SHAPES, *LARGE)]
    best = dict.fromkeys(jobs, float("inf"))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(options.rounds):
        for name, m, n, k in jobs:
            left, right = torch.randn(m, k).to(DTYPES[name]), torch.randn(k, n).to(DTYPES[name])
            started = clock()
            left @ right
            best[name, m, n, k] = min(best[name, m, n, k], clock() - started)
    ratios = []
    for (name, m, n, k), measured in best.items():
        flops = 2.0 * m * n * k
        shape = ProductShape(Product("forward", ("input", "weight"), flops), "linear", name, 1, m, n, k, 1.0)
        operand = Operand(name, format_named(name).stored_bits)
        predicted = product_time_s(shape, operand, operand, hardware)
        if flops > 1e9:
            ratios.append(predicted / measured)
        print(
            f"{name:5} {m:5} {n:5} {k:5} {measured * 1e3:9.3f} ms, predicted over measured {predicted / measured:5.2f}"
        )
    close = sum(abs(ratio - 1) < 0.25 for ratio in ratios)
    print(f"above 1 GFLOP: {close} of {len(ratios)} within 25%, median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
