"""States as vectors: a tensor [N, ...], or a tuple of them, as one [N, D] of float32 or wider, and sums of such."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]
S = TypeVar("S", bound=State)  # one of them, throughout


class Layout(Generic[S]):
    """How a tensor [N, ...], or a tuple of them, lies in one vector [N, D] of float32 or wider."""

    def __init__(self, z0: S):
        self.single = isinstance(z0, Tensor)
        parts = (z0,) if isinstance(z0, Tensor) else z0
        if not isinstance(parts, tuple | list) or not parts or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"z0 is {type(z0).__name__}; it must be a tensor or a tuple of tensors")
        for part in parts:
            if not part.is_floating_point():
                raise TypeError(f"z0 holds {part.dtype}; it must be floating point")
            if part.ndim == 0 or part.shape[0] != parts[0].shape[0]:
                raise ValueError(f"z0 holds {_shapes(parts)}; every part needs the same leading number of samples")
        self.shapes = [part.shape[1:] for part in parts]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.dtypes = [part.dtype for part in parts]
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)

    def pack(self, z: S) -> Tensor:
        """Returns [N, D]."""
        parts = (z,) if isinstance(z, Tensor) else z
        flat = [part.reshape(part.shape[0], size).to(self.dtype) for part, size in zip(parts, self.sizes)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unpack(self, vector: Tensor) -> S:
        """Returns the tensor, or the tuple of tensors, in the dtypes of z0."""
        flat = vector.split(self.sizes, 1)
        rows = vector.shape[0]
        parts: Any = tuple(
            part.reshape(rows, *shape).to(dtype) for part, shape, dtype in zip(flat, self.shapes, self.dtypes)
        )
        return parts[0] if self.single else parts

    def lift(self, f: Callable[[S], S]) -> Callable[[Tensor], Tensor]:
        """Returns f as a map of vectors; it raises ValueError if f changes z, or returns what is not like z."""

        def lifted(vector: Tensor) -> Tensor:
            counted = not torch.compiler.is_compiling() and not vector.is_inference()  # the compiler knows neither
            version = vector._version if counted else 0
            image = f(self.unpack(vector))
            if counted and vector._version != version:
                raise ValueError("f changed its argument in place; it must return new tensors: relu(z), not relu_(z)")
            parts = image if isinstance(image, tuple | list) else [image]
            expected = [(vector.shape[0], *shape) for shape in self.shapes]
            if [getattr(part, "shape", None) for part in parts] != expected:
                raise ValueError(f"f returned {_shapes(parts)} for z of {expected}; it must keep the shape of z")
            if isinstance(image, Tensor) != self.single:
                kinds = ("a tuple", "a tensor") if self.single else ("a tensor", "a tuple")
                raise ValueError(f"f returned {kinds[0]} of {_shapes(parts)} where z is {kinds[1]}; it must be like z")
            for part in parts:
                if not part.is_floating_point():
                    raise ValueError(f"f returned {part.dtype}; it must be floating point")
            found = self.pack(image)
            # The loop does not copy a lone sample (`_chosen`), and f may fill the same tensor at its next call.
            shared = len(self.sizes) == 1 and len(vector) == 1 and not torch.is_grad_enabled()
            return found.clone() if shared else found

        return lifted


def dots(rows: Tensor, vector: Tensor) -> Tensor:
    """Returns [N, m], the inner products of the rows [N, m, D] with a vector [N, D], never in TF32."""
    return torch.stack([(row * vector).sum(1) for row in rows.unbind(1)], 1)


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Returns [N, D], the sum of the rows [N, m, D] with weights [N, m], never in TF32."""
    total = weights[:, :1] * rows[:, 0]
    for k in range(1, rows.shape[1]):
        total = torch.addcmul(total, weights[:, k : k + 1], rows[:, k])
    return total


def write(buffer: Tensor, slot: int, value: Tensor) -> Tensor:
    """Returns the buffer [N, m, ...] with `value` [N, ...] in a slot: the same memory, or a copy if it is recorded."""
    buffer = buffer.clone() if torch.is_grad_enabled() else buffer
    buffer[:, slot] = value
    return buffer


def _shapes(parts: Sequence) -> str:
    return ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
