"""Products of sorted rows with the matrix of each row's group: one contract, a file per backend."""

from pallas_kernels.grouped_matmul.api import Backend, device_refusal, grouped_matmul
from pallas_kernels.grouped_matmul.reference import entry_of, multiply_by_tiles

__all__ = ["Backend", "device_refusal", "entry_of", "grouped_matmul", "multiply_by_tiles"]
