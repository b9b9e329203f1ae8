"""What jax 0.10.2, the last for Python 3.11, needs; delete it with the support of that version."""

from __future__ import annotations

import jax


def accept_packed_arguments(compiled: jax.stages.Compiled) -> jax.stages.Compiled:
    """Returns a program that takes int4 arrays, which before jax 0.11 it refuses by mistake.

    There an array says that its numbers lie unpacked, a program that it wants them packed, and
    both mean the same buffer.
    """
    executable = getattr(compiled, "_executable", None)
    layouts = getattr(executable, "_xla_in_layouts", None)
    if jax.__version_info__ < (0, 11) and executable is not None and layouts is not None:
        executable._xla_in_layouts = [
            None if getattr(layout, "sub_byte_element_size_in_bits", 0) else layout
            for layout in layouts
        ]
    return compiled
