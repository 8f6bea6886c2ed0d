"""Matrix products of a GPU beside their predicted times: `python benchmarks/products_cuda.py --hardware h100`.

Products of two matrices in bf16 (torch.mm) and, where the device has them, in 8-bit floats (torch._scaled_mm, one scale
a tensor), each the median of runs that are timed by CUDA events, with caches emptied in between. Prints a line a
product and, for those above 1 GFLOP, how many are predicted within 25%. The exit status is 0 where no CUDA device is at
hand too: then it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from advisor.hardware import HARDWARE, hardware_named
from advisor.operands import Operand
from advisor.product_shapes import ProductShape
from advisor.roofline import product_time_s
from probes.records import Product

SIZES = (256, 512, 1024, 2048, 4096, 8192)
FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="h100", choices=sorted(HARDWARE))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    hardware = hardware_named(options.hardware)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, predicted for {hardware.title}")
    ratios = []
    for name in ("bf16", *(one for one in FLOAT8 if hardware.takes(one, one))):
        for m, n, k in shapes():
            measured = median_s(product(name, m, n, k), options.repeats)
            flops = 2.0 * m * n * k
            shape = ProductShape(Product("forward", ("input", "weight"), flops), "linear", "bf16", 1, m, n, k, 1.0)
            operand = Operand(name, 16 if name == "bf16" else 8)
            predicted = product_time_s(shape, operand, operand, hardware)
            if flops > 1e9:
                ratios.append(predicted / measured)
            told = f"{flops / measured / 1e12:8.1f} TFLOPS, predicted over measured {predicted / measured:5.2f}"
            print(f"{name:8} {m:6} {n:6} {k:6} {measured * 1e6:10.1f} µs {told}")
    close = sum(abs(ratio - 1) < 0.25 for ratio in ratios)
    print(f"above 1 GFLOP: {close} of {len(ratios)} within 25%, median ratio {statistics.median(ratios):.2f}")


def shapes() -> list[tuple[int, int, int]]:
    """Square ones, and long and flat ones, up to 1.1 TFLOP."""
    square = [(side, side, side) for side in SIZES]
    return square + [(8192, side, 4096) for side in SIZES[:4]] + [(side, 8192, 1024) for side in SIZES[1:]]


def product(name: str, m: int, n: int, k: int) -> Callable[[], Tensor]:
    """The product of a row-major [m, k] and a column-major [k, n], which 8-bit kernels want."""
    left, right = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    if name == "bf16":
        return lambda: torch.mm(left, right.t())
    one = torch.ones((), device="cuda")
    narrow, other = left.to(FLOAT8[name]), right.to(FLOAT8[name]).t()
    return lambda: torch._scaled_mm(narrow, other, one, one, out_dtype=torch.bfloat16)


def median_s(run: Callable[[], Tensor], repeats: int) -> float:
    flush = torch.empty(1 << 26, device="cuda")  # 256 MB, more than any L2
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
