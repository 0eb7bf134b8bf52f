"""A text head: one matrix in a safetensors file, a row for each class.

It is some megabytes, and looked at whole while a run is planned: no worker has to find out that it is broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ray_merge.errors import AdapterError
from ray_merge.spec import FLOAT_DTYPES, TensorEntry
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import ObjectInfo, Stores


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFile:
    """A text head: one matrix in a safetensors file.

    Args:
        url: the folder that holds it.
        info: the file.
        entry: the matrix, (C, D).
        logit_scale: what cosines are multiplied by; it decides how far entropies can fall.
    """

    url: str
    info: ObjectInfo
    entry: TensorEntry
    logit_scale: float


def head_file(place: str, path: str, logit_scale: float) -> HeadFile:
    """The matrix of a text head.

    Args:
        place: the recipe's, for messages.
        path: of the file.
        logit_scale: the recipe's.

    Raises:
        AdapterError: there is none, or it holds NaN or Inf.
    """
    folder, _, name = path.rpartition("/")
    store = Stores().open(folder or ".")
    info = store.info(name)
    if info is None:
        raise AdapterError(
            f"{place}.head: there is no {path}; give a safetensors file with one (classes, width) matrix"
        )
    tensors = read_header(store, name).tensors.values()
    matrices = [one for one in tensors if len(one.shape) == 2 and one.dtype in FLOAT_DTYPES.values()]
    if len(matrices) != 1 or matrices[0].shape[0] < 2:
        shapes = ", ".join(f"{one.name} {one.shape}" for one in matrices) or "none"
        raise AdapterError(
            f"{place}.head: {path} holds the matrices {shapes}; expected one of (classes, width) with two classes or "
            "more"
        )
    if not _is_finite(store.url, info, matrices[0]):
        raise AdapterError(
            f"{place}.head: {path}: {matrices[0].name} holds NaN or Inf, expected finite numbers; make the text head "
            "again"
        )
    return HeadFile(url=store.url, info=info, entry=matrices[0], logit_scale=logit_scale)


@lru_cache(maxsize=1024)  # a sweep asks for every one of its merges
def _is_finite(url: str, info: ObjectInfo, entry: TensorEntry) -> bool:
    import torch

    name = next(name for name, code in FLOAT_DTYPES.items() if code == entry.dtype)
    data = bytearray(Stores().open(url).read(info.path, entry.start, entry.end))
    return not data or bool(torch.isfinite(torch.frombuffer(data, dtype=getattr(torch, name))).all())
