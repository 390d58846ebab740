"""Eager PyTorch forms of gated linear attention (arXiv 2312.06635), on any device.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

``recurrent_gla`` is the definition, ``chunk_gla`` the fast exact form and the fallback where no
kernel fits, ``chunk_gla_backward`` its gradients without autograd, ``lowrank_gate`` the layer's
gate, ``lowrank_gate_backward`` its gradients, ``decode_gla`` a few tokens against stored
states, the ``yardstick_`` functions runs in kernel precision that set error budgets, and
``relative_rms`` the error measure. Nothing here needs more than torch.
"""

from glac.reference.backward import (
    Gradients,
    chunk_gla_backward,
    yardstick_chunk_gla_backward,
)
from glac.reference.chunked import chunk_gla
from glac.reference.decode import decode_gla
from glac.reference.error import relative_rms
from glac.reference.gate import lowrank_gate, lowrank_gate_backward
from glac.reference.recurrent import recurrent_gla
from glac.reference.scalar import yardstick_scalar_gla, yardstick_scalar_gla_backward
from glac.reference.yardstick import yardstick_chunk_gla

__all__ = [
    "Gradients",
    "chunk_gla",
    "chunk_gla_backward",
    "decode_gla",
    "lowrank_gate",
    "lowrank_gate_backward",
    "recurrent_gla",
    "relative_rms",
    "yardstick_chunk_gla",
    "yardstick_chunk_gla_backward",
    "yardstick_scalar_gla",
    "yardstick_scalar_gla_backward",
]
