"""What the GPU kernels need of Pallas that differs between JAX versions, or is not public."""

from __future__ import annotations

import inspect
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def interpreter() -> Any:
    """Returns the argument that makes a kernel run on the CPU, with threads, copies and barriers.

    `interpret=True` is another interpreter, which knows none of these; this one has no public name.
    """
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def compiler_params(**options: Any) -> Any:
    """Returns the compiler's options; what layout a value has in registers is inferred.

    The default lowering differs between versions, so it is always named.
    """
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.CompilerParams(lowering_semantics=semantics, approx_math=True, **options)


def transposed(ref: Any) -> Any:
    """Returns a view of a tile with its two axes swapped."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def load_unswizzled(ref: Any, layout: Any) -> Any:
    """Returns what a tile without a swizzle holds, bank conflicts and all.

    A plain load lets the compiler look for a layout without conflicts, which may take it minutes.
    """
    index = inspect.signature(plgpu.load).parameters.get("idx")
    is_index_wanted = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *[()] * is_index_wanted, layout=layout, optimized=False)
