"""Write cases for prefill.c: inputs, and what the kernels of a pack make of them in Python.

    GLAC_PACK_PATH=build/packs python examples/c/make_case.py build/cases [--lowrank]

``prefill`` is a call on many tokens, ``next_token`` goes on with its final state. Needs the GPU
that the pack is for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from glac import dispatch
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.emit_c import function_names
from glac.pack import read_pack
from glac.validate import check_lowrank, check_vector


def write(folder: Path, numbers: dict[str, object], tensors: dict[str, Tensor | None]) -> None:
    """One case; tensors as they lie in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} {value!r}".replace("'", "") for key, value in numbers.items()]
    (folder / "case.txt").write_text("\n".join(lines) + "\n")
    for name, tensor in tensors.items():
        path = folder / f"{name}.bin"
        path.unlink(missing_ok=True)
        if tensor is not None:
            raw = tensor.contiguous().view(torch.uint8).cpu().numpy()
            path.write_bytes(raw.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lowrank", action="store_true", help="with the gate in the kernel")
    parser.add_argument(
        "--sizes", type=int, nargs=5, default=(2, 1000, 8, 128, 128), metavar=tuple("BTHKV")
    )
    options = parser.parse_args()
    B, T, H, K, V = options.sizes
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    state = None
    for name, tokens in (("prefill", T), ("next_token", 1)):
        q, k, v = draw(B, tokens, H, K), draw(B, tokens, H, K), draw(B, tokens, H, V)
        given = {"initial_state": state, "output_final_state": True}
        if options.lowrank:
            x, w, bias = draw(B, tokens, 16), draw(H * K, 16) / 4, draw(H * K)
            problem = check_lowrank(q, k, v, x, w, bias, state)
            o, final = chunk_gla_lowrank(q, k, v, x, w, bias, **given)
            gate: dict[str, Tensor | None] = {"x": x, "w": w, "bias": bias, "g": None}
        else:
            g = torch.nn.functional.logsigmoid(draw(B, tokens, H, K)) / 16
            problem = check_vector(q, k, v, g, state)
            o, final = chunk_gla(q, k, v, g, **given)
            gate = {"g": g, "x": None, "w": None, "bias": None}
        decision = dispatch.explain(problem)
        if decision.provider != "pack":
            raise SystemExit(f"no pack serves {problem}: {decision.reason}")
        names = function_names(read_pack(decision.path))
        row = next(n for (s, c), n in names.items() if (s, c) == (problem.spec, decision.config))
        numbers = {"row": row, "B": B, "T": tokens, "H": H, "scale": K**-0.5}
        numbers.update(inv_normalizer=1 / 16.0, clamp=float("-inf"))
        tensors = {"q": q, "k": k, "v": v, "h0": state, "o": o, "ht": final, **gate}
        write(options.out / name, numbers, tensors)
        state = final
        print(f"{options.out / name}: {problem}, {row}")


if __name__ == "__main__":
    main()
