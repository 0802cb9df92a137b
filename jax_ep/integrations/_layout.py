"""How one array of another library's lies, as compared with the layer's."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

Array = Shaped[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of a block lies, as compared with the layer's array or arrays.

    Attributes:
      names: the layer's arrays. Of several, each has its share of the block's outputs.
      is_transposed: whether outputs come before inputs in the block; in the layer they come last.
      is_interleaved: whether the outputs of several take turns.
      is_padded: whether the block has room for weights of experts that compute nothing.
    """

    names: tuple[str, ...]
    is_transposed: bool = True
    is_interleaved: bool = False
    is_padded: bool = False

    def split(self, array: Array, num_experts: int) -> dict[str, Array]:
        """Returns the layer's arrays, by name."""
        array = array[:num_experts] if self.is_padded else array
        array = np.swapaxes(array, -1, -2) if self.is_transposed else array
        num_parts = len(self.names)
        if self.is_interleaved:
            parts = [array[..., part::num_parts] for part in range(num_parts)]
        else:
            parts = np.split(array, num_parts, axis=-1)
        return {name: part.copy() for name, part in zip(self.names, parts, strict=True)}

    def join(self, arrays: Mapping[str, Array], num_choices: int) -> Array:
        """Returns the block's array; ``num_choices`` are all that a router may choose."""
        parts = [arrays[name] for name in self.names]
        if self.is_interleaved:
            array = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        else:
            array = np.concatenate(parts, axis=-1)
        array = np.swapaxes(array, -1, -2) if self.is_transposed else array
        if self.is_padded:
            padding = np.zeros((num_choices - len(array), *array.shape[1:]), array.dtype)
            array = np.concatenate([array, padding])
        return array.copy()
