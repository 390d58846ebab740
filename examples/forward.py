"""Both gates and a carried state, on a GPU or a CPU; says which kernel served the call."""

import torch
from torch.nn.functional import logsigmoid

from glac import dispatch
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.problem import DType, Gate, Problem, Specialisation

B, T, H, K, V, R = 2, 1000, 4, 64, 128, 16
device = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


q, k, v = randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, V)
g = logsigmoid(randn(B, T, H, K)) / 16  # natural log of each step's decay, never positive

whole, _ = chunk_gla(q, k, v, g)
early, late = ([x[:, part] for x in (q, k, v, g)] for part in (slice(0, 600), slice(600, T)))
head, state = chunk_gla(*early, output_final_state=True)
tail, _ = chunk_gla(*late, initial_state=state)
gap = (torch.cat([head, tail], dim=1) - whole).float().abs().max()
print(f"in two parts or in one: at most {gap:.1e} apart, values up to {whole.abs().max():.1f}")

x, weight = randn(B, T, R), randn(H * K, R) / 4
o, _ = chunk_gla_lowrank(q, k, v, x, weight, bias=None, normalizer=16.0)
print(f"low-rank gate: output {tuple(o.shape)}, {o.dtype}, on {o.device}")

if device == "cuda":
    spec = Specialisation(K, V, DType.BF16, Gate.VECTOR, DType.BF16)
    served = dispatch.explain(Problem(spec, B, T, H))
    print(f"served by {served.provider} {served.config_id}: {served.reason}")
else:
    print("served by PyTorch: the tensors are on the CPU")
