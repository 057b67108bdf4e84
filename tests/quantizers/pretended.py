"""A device that is not the CPU, pretended: tensors that say they lie elsewhere and refuse to meet one that does not.

Underneath they are the CPU's. What a test with them shows is that every tensor of a computation is on one device, that
nothing reaches for the memory of a tensor elsewhere, and that what goes to the disk was brought back first; a real GPU
would stop with the same mistakes. torch calls the device "meta", which needs no driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
_MOVES = {"aten::_to_copy", "aten::copy_"}
_PLAIN_RESULTS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}


class Far(torch.Tensor):
    """A tensor elsewhere; ``near`` is what it is underneath."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), storage_offset=0, dtype=near.dtype, device=ELSEWHERE
        )
        made.near = near
        return made

    def data_ptr(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.near.tolist()  # as torch does from any device

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor elsewhere to numpy: copy it to the host first")

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run(op, args, dict(kwargs or {}))


class Pretended(TorchDispatchMode):
    """While this is entered, tensors can be made elsewhere and copied to and from there. ``seen``: the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, op: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if any(isinstance(one, Far) for one in tensors) or kwargs.get("device") == ELSEWHERE:
            self.seen.add(op.name())
            return run(op, args, kwargs)
        return op(*args, **kwargs)


def run(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation of torch, on what the tensors are underneath."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    base = op.name().split(".")[0]
    near = [one for one in tensors if not isinstance(one, Far) and one.ndim]
    if base not in _MOVES and near and len(near) < len(tensors):
        raise AssertionError(f"{op.name()}: tensors on two devices")
    target = kwargs.get("device")
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    bare: Callable[[Any], Any] = lambda leaf: leaf.near if isinstance(leaf, Far) else leaf  # noqa: E731
    result = op(*tree_map(bare, args), **tree_map(bare, kwargs))
    far = target == ELSEWHERE or (target is None and any(isinstance(one, Far) for one in tensors))
    if not far or base in _PLAIN_RESULTS:
        return result
    known = {id(one.near): one for one in tensors if isinstance(one, Far)}

    def lift(leaf: Any) -> Any:
        """In-place operations give the tensor itself back, all others a new one."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Far(leaf)

    return tree_map(lift, result)
