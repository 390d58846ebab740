"""Both gates, a carried state, and which kernel served the call. Runs on a GPU or a CPU."""

import torch

from glac import dispatch
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.problem import DType, Gate, Problem, Specialisation
from glac.testing import make_inputs

device = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, K, V = 2, 1000, 4, 64, 128

a = make_inputs(B, T, H, K, V, dtype=torch.bfloat16, device=device)
whole, _ = chunk_gla(a.q, a.k, a.v, a.g)
first = [x[:, :600] for x in (a.q, a.k, a.v, a.g)]
rest = [x[:, 600:] for x in (a.q, a.k, a.v, a.g)]
head, state = chunk_gla(*first, output_final_state=True)
tail, _ = chunk_gla(*rest, initial_state=state)
difference = (torch.cat([head, tail], dim=1) - whole).float().abs().max()
print(f"in two parts or in one: at most {difference:.1e} apart, values up to {whole.abs().max():.1f}")

b = make_inputs(B, T, H, K, V, dtype=torch.bfloat16, device=device, gate="lowrank", rank=16)
o, _ = chunk_gla_lowrank(b.q, b.k, b.v, b.x, b.weight, b.bias, normalizer=16.0)
print(f"low-rank gate: output {tuple(o.shape)} in {o.dtype} on {o.device}")

if device == "cuda":
    spec = Specialisation(K, V, DType.BF16, Gate.VECTOR, DType.BF16)
    served = dispatch.explain(Problem(spec, B, T, H))
    print(f"served by {served.provider} {served.config_id}: {served.reason}")
else:
    print("served by PyTorch: the tensors are on the CPU")
