"""Reads safetensors folders that are already quantised, by the scheme their config.json names.

Host only: imports no jax.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import ZERO_STEPS, Index, StoredWeight, WeightFormat
from jaxserve.models.checkpoint.files import bounds_of
from jaxserve.models.checkpoint.quantization import Scheme, scheme_for
from jaxserve.models.checkpoint.safetensors import SafetensorsCheckpoint


class QuantizedCheckpoint:
    """An opened folder with a `quantization_config`. See `Checkpoint`.

    `names` are those of the model before it was quantised: the parts of a matrix are hidden behind
    `NAME.weight`, which `read` dequantises and `read_quantized` returns as it is stored. What is
    quantised is what the files hold so, not what the config's lists of exceptions say.
    """

    def __init__(self, source: SafetensorsCheckpoint) -> None:
        self._source = source
        self.config = source.config
        self.generation_config = source.generation_config
        self._scheme: Scheme = scheme_for(source.config["quantization_config"])
        self.format = self._scheme.format
        marker = "." + self._scheme.marker
        self._stems = {
            f"{name.removesuffix(marker)}.weight": name.removesuffix(marker)
            for name in source.names
            if name.endswith(marker)
        }
        parts = {f"{stem}.{part}" for stem in self._stems.values() for part in self._scheme.parts}
        self.names = (*self._stems, *(name for name in source.names if name not in parts))
        self.formats: dict[str, WeightFormat] = dict.fromkeys(self._stems, self.format)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; `read` must not be called after."""
        self._source.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor; of a quantised matrix, `[out, in]`."""
        if name in self._stems:
            return self._scheme.shape(self._source, self._stems[name])
        return self._source.shape(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns the tensor, or the part that `index` names; quantised matrices as float32."""
        if name not in self._stems:
            return self._source.read(name, index)
        bounds = bounds_of(index, self.shape(name))
        whole = dense(self.read_quantized(name), self.format.rows)
        return np.ascontiguousarray(whole[tuple(slice(*pair) for pair in bounds)])

    def read_quantized(self, name: str) -> StoredWeight:
        """Returns a quantised matrix; WeightError where its parts do not go together."""
        stem = self._stems[name]
        try:
            return self._scheme.load(self._source, stem)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error


def dense(weight: StoredWeight, rows: int) -> np.ndarray:  # [out, in] f32
    """Returns the numbers that a quantised weight stands for, columns in the model's order."""
    out_size, in_size = weight.data.shape
    scale = np.repeat(weight.scale, rows, axis=1)[:, :out_size] if rows > 1 else weight.scale
    groups = weight.data.astype(np.float32).reshape(out_size, len(scale), -1)
    if weight.zero is not None:
        zero = weight.zero.astype(np.float32) / ZERO_STEPS[weight.data.dtype.name]
        groups -= zero.T[:, :, None]
    values = (groups * scale.T[:, :, None]).reshape(out_size, in_size)
    if weight.order is None:
        return values
    restored = np.empty_like(values)
    restored[:, weight.order] = values
    return restored
