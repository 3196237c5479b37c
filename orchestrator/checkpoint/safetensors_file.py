"""Tensors → a safetensors file, written through an ordinary file object and hashed on the way.

The library's own writer turns a full disk into a `SafetensorError` and reads nothing back; here it is the `OSError`
that it is, the SHA-256 costs no second pass, and the interpreter's lock is free while bytes are hashed and written.
Reading is the library's (`safetensors.torch.load_file`), which also proves the format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE_BYTES = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` (on the CPU) to `path`, durably; returns the file's SHA-256. Raises `OSError` as it comes."""
    ordered = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # keeps them aligned
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(content: memoryview) -> None:
            for start in range(0, len(content), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                digest.update(piece)
                while len(piece):
                    piece = piece[file.write(piece) :]

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            put(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return digest.hexdigest()
