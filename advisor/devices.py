"""The devices that plans can be made for by name, with a source for every figure.

A pair is what decides whether a product runs in 8 bits: two narrow operands that no kernel takes together are
widened first, and nothing is gained. Pairs are ordered (left operand, right operand), both orders written out, of
formats with one scale a tensor: products of 4 and 6 bits and of blocks with scales of their own (MX, NVFP4) are absent,
also where the hardware has them. A name is a format exactly: an MI300X multiplies e4m3fnuz, another format than e4m3fn.

Rates are dense. The data sheets of NVIDIA print them with 2:4 sparsity; here is half of that. What a kernel reaches of
the peak is no data sheet's: those figures are measurements that others published or our own fit to such measurements
(benchmarks/speedups.py prints what they come to), and for devices of which none were found they are borrowed from the
nearest relative. `sources` says which is which.
"""

from __future__ import annotations

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

_GB = 10**9

# pytorch/ao torchao/testing/training/roofline_utils.py: KERNEL_LAUNCH_OVERHEAD_SEC, a Triton kernel of one element on
# an H100; the same file has 0.92 of the peak bandwidth for pointwise kernels.
_LAUNCH_S = 2e-6
_BANDWIDTH = 0.92


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


def _borrowed(what: str) -> dict[str, str]:
    return {
        "achieved": what,
        "achieved_8bit": what,
        "achieved_bandwidth": what,
        "launch_s": "pytorch/ao roofline_utils.py, measured on an H100; taken to be the same here",
    }


_H100_FIGURES = {
    "achieved": "pytorch/ao roofline_utils.py: 0.78 with large inputs on an H100",
    "achieved_8bit": "pytorch/ao roofline_utils.py: 0.78 with large inputs on an H100",
    "achieved_bandwidth": "pytorch/ao roofline_utils.py: 0.92 for pointwise kernels on an H100",
    "launch_s": "pytorch/ao roofline_utils.py: 2 µs, a kernel of one element on an H100",
}
_AS_H100 = _borrowed("taken to be as on an H100 (pytorch/ao roofline_utils.py does the same)")

ROWS = (
    Hardware(
        name="a100",
        title="NVIDIA A100 SXM 80 GB",
        pairs=_LIKE,  # Ampere, compute capability 8.0: no FP8 kernels
        memory_bytes=80 * _GB,
        tflops=_rates(19.5, 19.5, 156, 312, 624),
        bandwidth_bytes_s=2.039e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=108,
        source="NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM); A100 Tensor Core GPU Architecture white paper",
        sources=_AS_H100,
        note="no 8-bit floating point; int8 is its only 8-bit format",
    ),
    Hardware(
        name="b200",
        title="NVIDIA B200",
        # tcgen05.mma kinds f16, i8 and f8f6f4: CUTLASS documentation, "Blackwell SM100 GEMMs". The
        # instruction takes E5M2×E5M2; the library that training calls does not, so the pair is left out here
        # too.
        pairs=_LIKE | _FP8,
        memory_bytes=180 * _GB,  # DGX B200 data sheet: 1,440 GB over 8 GPUs
        # NVIDIA Blackwell data sheet, HGX B200, a GPU: FP4 18, FP8 and INT8 9, FP16 4.5, TF32 2.2 PFLOPS with sparsity;
        # FP32 75, FP64 37 TFLOPS; 180 GB, 7.7 TB/s
        tflops=_rates(37, 75, 1100, 2250, 4500, "e4m3fn", "e5m2") | {"e2m1": 9000},
        bandwidth_bytes_s=7.7e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=148,
        # Blackwell takes any layout (TransformerEngine, cublaslt_gemm.cu, nvte_is_non_tn_fp8_gemm_supported)
        inner_layout=False,
        source="NVIDIA Blackwell data sheet (HGX B200); CUTLASS documentation, Blackwell SM100 GEMMs; cuBLAS",
        sources=_AS_H100,
    ),
    Hardware(
        name="h100",
        title="NVIDIA H100 SXM 80 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        memory_bytes=80 * _GB,
        # Data sheet, half of its figures with sparsity: 989, 1,979, 3,958
        tflops=_rates(67, 67, 494.7, 989.4, 1978.9, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=3.35e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=132,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM); cuBLAS documentation, cublasLtMatmul",
        sources=_H100_FIGURES,
    ),
    Hardware(
        name="h100-pcie",
        title="NVIDIA H100 PCIe 80 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        memory_bytes=80 * _GB,
        # Data sheet of 2022, half of its figures with sparsity: 756, 1,513, 3,026
        tflops=_rates(51, 51, 378, 756, 1513, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=2.0e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=114,
        source="NVIDIA H100 Tensor Core GPU data sheet (PCIe); cuBLAS documentation, cublasLtMatmul",
        sources=_AS_H100,
        note="its 350 W may hold long products below this",
    ),
    Hardware(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        memory_bytes=141 * _GB,
        tflops=_rates(67, 67, 494.7, 989.4, 1978.9, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=4.8e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=132,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM); cuBLAS documentation, cublasLtMatmul",
        sources=_AS_H100,
    ),
    Hardware(
        name="l40s",
        title="NVIDIA L40S",
        pairs=_LIKE | _FP8,  # Ada, compute capability 8.9
        memory_bytes=48 * _GB,
        tflops=_rates(1.43, 91.6, 183, 362.05, 733, "e4m3fn", "e5m2"),
        bandwidth_bytes_s=0.864e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=142,
        source="NVIDIA L40S data sheet; fp64 at 1/64 of fp32, Ada GPU Architecture white paper; cuBLAS documentation, "
        "cublasLtMatmul",
        sources=_AS_H100,
    ),
    Hardware(
        name="mi300x",
        title="AMD Instinct MI300X",
        pairs=_LIKE | _FP8_FNUZ,  # CDNA 3, gfx942
        memory_bytes=192 * _GB,
        tflops=_rates(163.4, 163.4, 653.7, 1307.4, 2614.9, "e4m3fnuz", "e5m2fnuz"),
        bandwidth_bytes_s=5.3e12,
        launch_s=_LAUNCH_S,
        achieved=0.54,
        achieved_8bit=0.51,
        achieved_bandwidth=_BANDWIDTH,
        units=304,
        source="AMD Instinct MI300X data sheet; hipBLASLt README and documentation, Data type support",
        sources=_AS_H100,
        note="its 8-bit floats are e4m3fnuz and e5m2fnuz, which are candidates only where they are named; e4m3fn and "
        "e5m2 are not multiplied",
    ),
    Hardware(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090",
        pairs=_LIKE | _FP8,  # Ada, compute capability 8.9
        memory_bytes=24 * _GB,
        # With float32 sums, which is half of what the card does with float16 sums: Ada white paper, appendix A (its
        # figures with sparsity are 330.3 for 16 bits and 660.6 for FP8); int8 is not halved
        tflops=_rates(1.29, 82.6, 82.6, 165.2, 330.3, "e4m3fn", "e5m2") | {"int8": 660.6},
        bandwidth_bytes_s=1.008e12,
        launch_s=_LAUNCH_S,
        achieved=0.78,
        achieved_8bit=0.78,
        achieved_bandwidth=_BANDWIDTH,
        units=128,
        source="NVIDIA Ada GPU Architecture white paper, appendix A; cuBLAS documentation, cublasLtMatmul",
        sources=_AS_H100,
    ),
)
