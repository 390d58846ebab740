"""Write cases for serve.c: inputs, and what the kernels of a pack make of them in Python.

    GLAC_PACK_PATH=build/packs python examples/c/make_case.py build/cases [--gate scalar]

``prefill`` is a call on many tokens; ``decode`` is one on the token behind them, which updates
their final state in place. Needs the GPU that the pack is for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glac import dispatch
from glac.attention import (
    chunk_gla,
    chunk_gla_lowrank,
    chunk_simple_gla,
    recurrent_gla,
    recurrent_gla_lowrank,
)
from glac.configs import ScalarForwardConfig
from glac.emit_c import function_names
from glac.kernelspec import config_kernels
from glac.pack import read_pack
from glac.problem import Op, Problem
from glac.scalar import ScalarInputs
from glac.scalar import check as check_scalar_gate
from glac.scalar_segments import segment_length
from glac.validate import check_lowrank, check_vector


def write(folder: Path, numbers: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """One case; tensors as they lie in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} {value!r}".replace("'", "") for key, value in numbers.items()]
    (folder / "case.txt").write_text("\n".join(lines) + "\n")
    for old in folder.glob("*.bin"):
        old.unlink()
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).cpu().numpy()
        (folder / f"{name}.bin").write_bytes(raw.tobytes())


def served_by(problem: Problem, op: Op) -> dict[str, object]:
    """The C function with the kernels that Python runs, and the segments it cuts sequences into.

    Its row was made for a problem of some size; for others dispatch finds other segments.
    """
    decision = dispatch.explain(problem, op=op)
    if decision.provider != "pack":
        raise SystemExit(f"no pack serves {problem}: {decision.reason}")
    if isinstance(decision.config, ScalarForwardConfig):
        gpu = dispatch.device_gpu(0)[0]
        assert gpu is not None
        if segment_length(problem, decision.config, gpu.sm_count):
            raise SystemExit(f"Python cuts the sequences of {problem}, C walks them whole")
    pack = read_pack(Path(decision.path))
    for (spec, config), name in function_names(pack).items():
        kernels = {item.template: item.name for item in config_kernels(spec, config, pack.arch)}
        if kernels == decision.kernels:
            return {"row": name, "segment": getattr(decision.config, "segment", 0) or -1}
    raise SystemExit(f"what serves {problem} has no function in C: {decision.config_id}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gate", choices=("vector", "lowrank", "scalar"), default="vector")
    parser.add_argument(
        "--sizes", type=int, nargs=5, default=(2, 1000, 8, 128, 128), metavar=tuple("BTHKV")
    )
    options = parser.parse_args()
    B, T, H, K, V = options.sizes
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    state = None
    w, bias = draw(H * K, 16) / 4, draw(H * K)
    call: Any
    for name, tokens in (("prefill", T), ("decode", 1)):
        prefill = name == "prefill"
        q, k, v = draw(B, tokens, H, K), draw(B, tokens, H, K), draw(B, tokens, H, V)
        if options.gate == "lowrank":
            x = draw(B, tokens, 16)
            problem = check_lowrank(q, k, v, x, w, bias, state)
            call = chunk_gla_lowrank if prefill else recurrent_gla_lowrank
            gate = {"x": x, "w": w, "bias": bias}
        elif options.gate == "scalar":
            g = torch.nn.functional.logsigmoid(draw(B, tokens, H)) / 16
            problem = check_scalar_gate(ScalarInputs(q, k, v, g, state)).problem
            call = chunk_simple_gla if prefill else recurrent_gla
            gate = {"g": g}
        else:
            g = torch.nn.functional.logsigmoid(draw(B, tokens, H, K)) / 16
            problem = check_vector(q, k, v, g, state)
            call = chunk_gla if prefill else recurrent_gla
            gate = {"g": g}
        op = problem.spec.gate.passes[0] if prefill else Op.DECODE
        if prefill:
            o, state = call(q, k, v, *gate.values(), output_final_state=True)
        else:  # on the state that the other case ends with, and that is in a file by now
            o, state = call(q, k, v, *gate.values(), initial_state=state, inplace=True)
        numbers = {**served_by(problem, op), "B": B, "T": tokens, "H": H, "scale": K**-0.5}
        numbers.update(inv_normalizer=1 / 16.0, clamp=float("-inf"))
        tensors = {"q": q, "k": k, "v": v, "o": o, "ht": state, **gate}
        write(options.out / name, numbers, tensors)
        print(f"{options.out / name}: {problem}, {numbers['row']}")


if __name__ == "__main__":
    main()
