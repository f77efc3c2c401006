"""Hashes of tensors: what data a number was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors' shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
