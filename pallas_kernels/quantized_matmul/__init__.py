"""Products with weights quantised by groups of columns: one contract, one file per backend."""

from pallas_kernels.quantized_matmul.api import Backend, device_refusal, quantized_matmul, refusal

__all__ = ["Backend", "device_refusal", "quantized_matmul", "refusal"]
