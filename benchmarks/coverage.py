"""What share of an architecture's matrix FLOPs the probe sees: a table over those that the tests share.

For each: its sites; `window.coverage.share`; and the FLOPs of sites with those listed as unseen, over what torch's
FlopCounterMode counts around forward and backward of the same step. Once as torch counts, and once with what its table
lacks (fused attention on a CPU, grouped products, recurrent layers) or has wrong (the weight gradient of a grouped
convolution, taken `groups` times; sparse matrices, taken as dense) put right: `tests/flops.py`.

    python benchmarks/coverage.py --json benchmarks/coverage.json
    python benchmarks/coverage.py gpt2-sdpa mamba
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from architectures import ARCHITECTURES, build  # noqa: E402 - found where the line above says
from flops import torch_flops  # noqa: E402

from probes.probing import probe  # noqa: E402


def measured(name: str) -> dict[str, Any]:
    """One row of the table."""
    _, step = build(name)
    with FlopCounterMode(display=False) as counter:
        step().backward()
    _, step = build(name)
    corrected = torch_flops(lambda: step().backward())
    model, step = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        step().backward()
        optimizer.step()
    return {
        "architecture": name,
        "sites": len(window.sites),
        "share": window.coverage.share,
        "of_flop_counter": window.total_flops / counter.get_total_flops(),
        "of_corrected_counter": window.total_flops / corrected,
        "unseen": list(window.coverage.unseen),
    }


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all without any", metavar="NAME")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    print(f"{'architecture':24} {'sites':>5} {'share':>8} {'/ counter':>10} {'/ corrected':>12}")
    for name in options.names or ARCHITECTURES:
        row = measured(name)
        rows.append(row)
        ratios = f"{row['of_flop_counter']:10.4f} {row['of_corrected_counter']:12.4f}"
        print(f"{name:24} {row['sites']:5} {row['share']:8.4f} {ratios}", flush=True)
    if options.json:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
