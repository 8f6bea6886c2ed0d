"""The devices that plans can be made for by name, with a source for every figure.

A pair is what decides whether a product runs in 8 bits: two narrow operands that no kernel takes together are
widened first, and nothing is gained. Pairs are ordered (left operand, right operand), both orders written out, of
formats with one scale a tensor: products of 4 and 6 bits and of blocks with scales of their own (MX, NVFP4) are absent,
also where the hardware has them. A name is a format exactly: an MI300X multiplies e4m3fnuz, another format than e4m3fn.

Rates are dense. The data sheets of NVIDIA print them with 2:4 sparsity; here is half of that. What a kernel reaches of
the peak is no data sheet's: those figures are measurements that others published or our own fit to such measurements
(benchmarks/speedups.py prints what they come to), and for devices of which none were found they are borrowed from the
nearest relative. `sources` says which is which.

The peaks, bandwidths and memories were compared with copies of the data sheets that others publish, and agree:
glennklockwood.com/garden/processors (A100, H100 and H200, B200), archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html
(both H100), mullet.se/product.html?product_id=355414 (L40S), waredb.com/processor/nvidia-geforce-rtx-4090; the
bandwidths of the A100 at 80 GB in thundercompute.com/blog/nvidia-a100-specs-full-guide and of the H200 in
aiwiki.ai/wiki/nvidia_h200; an MI300X's 16-bit and 8-bit floats, fp32, memory and bandwidth in the rooflines of public
repositories, its fp64, tf32 and int8 nowhere. For the B200 one copy has an earlier 80 and 40 TFLOPS of fp32 and fp64,
192 GB and 8 TB/s.
"""

from __future__ import annotations

from typing import Any

from advisor.device import Hardware, Pair

# Like formats: what the matrix units of Ampere and everything after it multiply (fp32 on the vector units, or as
# tf32). NVIDIA A100 Tensor Core GPU Architecture white paper, "A100 Tensor Cores"; int8 with int32 sums.
_LIKE: frozenset[Pair] = frozenset({("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8")})

# cuBLAS documentation, cublasLtMatmul(), data types of FP8 kernels (compute capability 8.9 and above): A×B is
# E4M3×E4M3, E4M3×E5M2 or E5M2×E4M3. E5M2×E5M2 is not in that list, and PyTorch's _scaled_mm refuses it for
# this reason (pytorch/pytorch issue 132005).
_FP8: frozenset[Pair] = frozenset({("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn")})

# hipBLASLt: A and B may each be fp8 or bf8 (README, table of data types), and on gfx942 these are the FNUZ variants
# alone ("Data type support"). PyTorch's _scaled_mm lets two e5m2 operands pass on ROCm (pytorch/pytorch pull request
# 148228).
_FP8_FNUZ: frozenset[Pair] = frozenset(
    (left, right) for left in ("e4m3fnuz", "e5m2fnuz") for right in ("e4m3fnuz", "e5m2fnuz")
)

# Scales that 8-bit kernels take beside one a tensor. A scale a row along the inner dimension of both operands:
# torch._scaled_mm on compute capability 8.9 and above (aten/src/ATen/native/cuda/RowwiseScaledMM.cu; the right operand
# must be e4m3fn, which is not looked at here) and on gfx942; the sums of torch._int_mm are scaled afterwards, so rows
# are free there. Blocks of 128 with float32 scales: cuBLAS 12.9, compute capability 9.0 alone (PyTorch's
# test_scaled_matmul_cuda.py expects other versions to fail). Blocks of 32 with e8m0 scales: compute capability 10.
_ROWS = frozenset({"tensor", "row"})
_HOPPER_SCALES = _ROWS | {"block1x128", "block128x128"}
_BLACKWELL_SCALES = _ROWS | {"block32"}

_GB = 10**9

# What kernels reach. The first three: pytorch/ao torchao/testing/training/roofline_utils.py, measured on an H100
# ("pct_achievable_gemm_tops" with large inputs, "pct_achievable_mem_bw" of pointwise kernels, and
# KERNEL_LAUNCH_OVERHEAD_SEC, a kernel of one element). The last two are ours, fitted to products measured on an H100
# and a B200 that OpenXLA published (benchmarks/published_products.json); they come out alike on both.
_KERNELS: dict[str, Any] = {
    "achieved": 0.78,
    "achieved_8bit": 0.78,
    "achieved_bandwidth": 0.92,
    "launch_s": 2e-6,
    "product_start_s": 5e-6,
    "tile_s": 1.2e-6,
}
_TORCHAO = "pytorch/ao torchao/testing/training/roofline_utils.py"
_OURS = "own fit to OpenXLA's measured products on H100 and B200, benchmarks/published_products.json"


def _sources(achieved: str = "", kernels: str = "") -> dict[str, str]:
    """Where the figures of `_KERNELS` are from: as on an H100, unless `achieved` or `kernels` says otherwise."""
    taken = f"{_TORCHAO}, measured on an H100 and taken to be the same here"
    return {
        "achieved": achieved or taken,
        "achieved_8bit": achieved or taken,
        "achieved_bandwidth": taken,
        "launch_s": taken,
        "product_start_s": kernels or f"{_OURS}; taken to be the same here",
        "tile_s": kernels or f"{_OURS}; taken to be the same here",
    }


def _rates(fp64: float, fp32: float, tf32: float, sixteen: float, eight: float, *floats: str) -> dict[str, float]:
    """Rates by format, int8 and the named 8-bit floats at `eight`."""
    return {
        "fp64": fp64,
        "fp32": fp32,
        "tf32": tf32,
        "fp16": sixteen,
        "bf16": sixteen,
        "int8": eight,
    } | dict.fromkeys(floats, eight)


ROWS = (
    Hardware(
        name="a100",
        title="NVIDIA A100 SXM 80 GB",
        pairs=_LIKE,  # Ampere, compute capability 8.0: no FP8 kernels
        granularities=_ROWS,
        memory_bytes=80 * _GB,
        tflops=_rates(19.5, 19.5, 156, 312, 624),
        bandwidth_bytes_s=2.039e12,
        units=108,
        source="NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM); A100 Tensor Core GPU Architecture white paper",
        sources=_sources(),
        **_KERNELS,
        note="no 8-bit floating point; int8 is its only 8-bit format",
    ),
    Hardware(
        name="b200",
        title="NVIDIA B200",
        # tcgen05.mma kinds f16, i8 and f8f6f4: CUTLASS documentation, "Blackwell SM100 GEMMs". The
        # instruction takes E5M2×E5M2; the library that training calls does not, so the pair is left out here
        # too.
        pairs=_LIKE | _FP8,
        granularities=_BLACKWELL_SCALES,
        memory_bytes=180 * _GB,  # DGX B200 data sheet: 1,440 GB over 8 GPUs
        # NVIDIA Blackwell data sheet, HGX B200, a GPU: FP4 18, FP8 and INT8 9, FP16 4.5, TF32 2.2 PFLOPS with sparsity;
        # FP32 75, FP64 37 TFLOPS; 180 GB, 7.7 TB/s
        tflops=_rates(37, 75, 1100, 2250, 4500, "e4m3fn", "e5m2") | {"e2m1": 9000},
        bandwidth_bytes_s=7.7e12,
        units=148,
        # Blackwell takes any layout (TransformerEngine, cublaslt_gemm.cu, nvte_is_non_tn_fp8_gemm_supported)
        inner_layout=False,
        source="NVIDIA Blackwell data sheet (HGX B200); CUTLASS documentation, Blackwell SM100 GEMMs; cuBLAS",
        sources=_sources(f"{_TORCHAO}, taken from the H100; OpenXLA's measured products agree", _OURS),
        **_KERNELS,
    ),
    Hardware(
        name="cpu",
        title="one CPU core with AVX-512 (AMD EPYC), as a reference",
        pairs=_LIKE,
        granularities=_ROWS,
        memory_bytes=25 * _GB,
        # float16 has no fast kernel there; fp32 products never run as tf32
        tflops=_rates(0.046, 0.101, 0.101, 0.225, 0.439) | {"fp16": 0.0009},
        bandwidth_bytes_s=1.2e10,
        launch_s=1.2e-6,
        product_start_s=1.2e-6,
        inner_layout=False,
        source="own measurement, advisor.measured_cpu with one thread of torch 2.13: products of 512 × 512 "
        "matrices, a copy of 64 MiB, products of 4 × 4",
        note="fixed figures, so that plans are the same everywhere; advisor.measured_cpu() measures the "
        "CPU at hand. No kernel multiplies 8-bit floats on a CPU",
    ),
    Hardware(
        name="h100",
        title="NVIDIA H100 SXM 80 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        granularities=_HOPPER_SCALES,
        memory_bytes=80 * _GB,
        # Data sheet, half of its figures with sparsity: 989, 1,979, 3,958
        tflops=_rates(67, 67, 494.7, 989.4, 1978.9, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=3.35e12,
        units=132,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM); cuBLAS documentation, cublasLtMatmul",
        sources=_sources(f"{_TORCHAO}, measured on an H100", _OURS),
        **_KERNELS,
    ),
    Hardware(
        name="h100-pcie",
        title="NVIDIA H100 PCIe 80 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        granularities=_HOPPER_SCALES,
        memory_bytes=80 * _GB,
        # Data sheet of 2022, half of its figures with sparsity: 756, 1,513, 3,026
        tflops=_rates(51, 51, 378, 756, 1513, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=2.0e12,
        units=114,
        source="NVIDIA H100 Tensor Core GPU data sheet (PCIe); cuBLAS documentation, cublasLtMatmul",
        sources=_sources(),
        **_KERNELS,
        note="its 350 W may hold long products below this",
    ),
    Hardware(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        granularities=_HOPPER_SCALES,
        memory_bytes=141 * _GB,
        tflops=_rates(67, 67, 494.7, 989.4, 1978.9, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=4.8e12,
        units=132,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM); cuBLAS documentation, cublasLtMatmul",
        sources=_sources(),
        **_KERNELS,
    ),
    Hardware(
        name="l40s",
        title="NVIDIA L40S",
        pairs=_LIKE | _FP8,  # Ada, compute capability 8.9
        granularities=_ROWS,
        memory_bytes=48 * _GB,
        tflops=_rates(1.43, 91.6, 183, 362.05, 733, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=0.864e12,
        units=142,
        source="NVIDIA L40S data sheet; fp64 at 1/64 of fp32, Ada GPU Architecture white paper; cuBLAS documentation, "
        "cublasLtMatmul",
        sources=_sources(),
        **_KERNELS,
    ),
    Hardware(
        name="mi300x",
        title="AMD Instinct MI300X",
        pairs=_LIKE | _FP8_FNUZ,  # CDNA 3, gfx942
        granularities=_ROWS,
        memory_bytes=192 * _GB,
        tflops=_rates(163.4, 163.4, 653.7, 1307.4, 2614.9, "e4m3fnuz", "e5m2fnuz"),
        bandwidth_bytes_s=5.3e12,
        units=304,
        source="AMD Instinct MI300X data sheet; hipBLASLt README and documentation, Data type support",
        sources=_sources(
            "half: meta-pytorch/MSLK pull request 457 measures products against 654 and 1,307 TFLOPS; "
            "not checked against products of known shapes"
        ),
        **_KERNELS | {"achieved": 0.5, "achieved_8bit": 0.5},
        note="its 8-bit floats are e4m3fnuz and e5m2fnuz, which are candidates only where they are named; e4m3fn and "
        "e5m2 are not multiplied",
    ),
    Hardware(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090",
        pairs=_LIKE | _FP8,  # Ada, compute capability 8.9
        granularities=_ROWS,
        memory_bytes=24 * _GB,
        # With float32 sums, which is half of what the card does with float16 sums: Ada white paper, appendix A (its
        # figures with sparsity are 330.3 for 16 bits and 660.6 for FP8); int8 is not halved
        tflops=_rates(1.29, 82.6, 82.6, 165.2, 330.3, "e4m3fn", "e5m2") | {"int8": 660.6},
        bandwidth_bytes_s=1.008e12,
        units=128,
        source="NVIDIA Ada GPU Architecture white paper, appendix A; cuBLAS documentation, cublasLtMatmul",
        sources=_sources(),
        **_KERNELS,
    ),
)
