"""``glac build --emit c``: kernels and their launches as one C source and its header.

The source holds the machine code of a pack, opens the CUDA driver by itself and needs no CUDA
header, no CUDA library to link with and no Python. What launches a row follows the launchers of
Python launch by launch; the order of a kernel's arguments is the pack's own.
"""

from __future__ import annotations

from glac.emit_c.backward import KEEP_BYTES
from glac.emit_c.functions import function_names, left_out
from glac.emit_c.launches import MAX_TOKEN_STRIDE, MAX_TOKENS
from glac.emit_c.sources import c_sources, write_c

__all__ = [
    "KEEP_BYTES",
    "MAX_TOKENS",
    "MAX_TOKEN_STRIDE",
    "c_sources",
    "function_names",
    "left_out",
    "write_c",
]
