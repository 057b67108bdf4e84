"""A checkpoint's tensors as torch sees them: views of the mapped files without a copy, or copies on a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator

import torch

from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.safetensors_file import Bytes

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_PIECE_BYTES = 16 * 2**20
CPU = torch.device("cpu")


class Source:
    """Reads the tensors of a ``Checkpoint``, and hands them out on ``device``."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        self.checkpoint = checkpoint
        self.device = device

    def weight(self, name: str) -> torch.Tensor:
        """A tensor on the device; on a CPU a read-only view: never write to it. Call ``release`` when done."""
        return self.on_host(name).to(self.device)

    def on_host(self, name: str) -> torch.Tensor:
        """A read-only view in the host's memory, wherever the device is."""
        info = self.checkpoint.tensors[name]
        return _view(self.checkpoint.bytes_of(name), DTYPES[info.dtype]).view(info.shape)

    def release(self, name: str) -> None:
        self.checkpoint.release(name)

    def pieces(self, name: str) -> Iterator[Bytes]:
        """A tensor's bytes in copies of bounded size. ArtifactError for NaN or infinity in it."""
        dtype = DTYPES[self.checkpoint.tensors[name].dtype]
        whole = self.checkpoint.bytes_of(name)
        for start in range(0, whole.nbytes, _PIECE_BYTES):
            piece = whole[start : start + _PIECE_BYTES].copy()
            low, high = torch.aminmax(_view(piece, dtype))
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise self.not_finite(name)
            yield piece
        self.release(name)

    def not_finite(self, name: str) -> ArtifactError:
        file = self.checkpoint.tensors[name].file
        return ArtifactError(
            f"{file}: {name} holds NaN or infinity, so this model is damaged or was never sound",
            hint="Download or copy the model again.",
        )

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache while we compute. Only a hint."""
        for info in (self.checkpoint.tensors[name] for name in names):
            descriptor = os.open(info.file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _view(data: Bytes, dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors and says so
        return torch.from_numpy(data).view(dtype)


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor as flat uint8; without a copy where that is the host's memory already."""
    flat: Bytes = tensor.reshape(-1).view(torch.uint8).cpu().numpy()
    return flat
