"""What other forms of the operation cost beside the plain one: gates, batches, heads, decoding.

    GLAC_PACK_PATH=... python benchmarks/forms.py [-o results.json] [--fla]

Each line compares two ways to the same or comparable results on the same tensors: device time of
both, replayed as CUDA graphs with a cold L2 cache as in ``glac bench``, and their ratio.

    gates     scalar gates against the vector gate and, with --fla, against fla's operations
    packed    16 sequences of random lengths in one batch against as many tokens in equal ones
    grouped   heads that share keys, or keys, values and gates, against repeating those
    decoding  a state update beside the time of ``state.mul_()``, which moves the same bytes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from glac import bench
from glac.attention import (
    chunk_gla,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    recurrent_gla,
)

Call = Callable[..., Tensor]
LAYERS = 8
"""Decoding: state updates in one graph, each on states of its own, so that L2 helps none."""


class Runner:
    """Times calls and collects rows."""

    def __init__(self) -> None:
        self.harness = bench.cuda_harness()
        self.rows: list[dict[str, Any]] = []
        self.generator = torch.Generator("cuda").manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cuda").to(dtype)

    def gate(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device="cuda")
        return (torch.nn.functional.logsigmoid(values) / 16).to(dtype)

    def time(self, call: Call, tensors: tuple[Tensor, ...], training: bool) -> tuple[float, str]:
        """Device time of a call, or of a call and its gradients, in microseconds."""
        if not training:

            def forward() -> Mapping[str, Tensor]:
                return {"o": call(*tensors)}

            with torch.no_grad():
                return self.harness.device_us(forward)
        leaves = [t.detach().requires_grad_() for t in tensors]
        do = torch.randn_like(call(*leaves))

        def both() -> Mapping[str, Tensor]:
            o = call(*leaves)
            grads = torch.autograd.grad(o, leaves, do)
            return {"o": o.detach(), **{str(i): g for i, g in enumerate(grads)}}

        return self.harness.device_us(both)

    def compare(
        self,
        form: str,
        case: str,
        way: tuple[str, Call, tuple[Tensor, ...]],
        other: tuple[str, Call, tuple[Tensor, ...]],
        around: Callable[[], Any] | None = None,
    ) -> None:
        """A row each for the forward pass and for training: ``way`` beside ``other``."""
        for training in (False, True):
            us, note = self.time(way[1], way[2], training)
            try:
                if around is not None:
                    with around(), torch.enable_grad():  # its first call, which tunes
                        leaves = [t.detach().requires_grad_(training) for t in other[2]]
                        o = other[1](*leaves)
                        if training:
                            torch.autograd.grad(o, leaves, torch.randn_like(o))
                beside, more = self.time(other[1], other[2], training)
            except Exception as error:
                beside, more = None, f"{type(error).__name__}: {error}"[:200]
            self.add(
                form,
                f"{case}, {'training' if training else 'forward'}",
                (way[0], us),
                (other[0], beside),
                "; ".join(x for x in (note, more) if x),
            )

    def add(
        self,
        form: str,
        case: str,
        way: tuple[str, float],
        other: tuple[str, float | None],
        note: str = "",
    ) -> None:
        us, beside = way[1], other[1]
        row = {
            "form": form,
            "case": case,
            "what": way[0],
            "us": round(us, 1),
            "beside": other[0],
            "beside_us": None if beside is None else round(beside, 1),
            "ratio": None if beside is None else round(beside / us, 3),
            "note": note,
        }
        self.rows.append(row)
        print(
            f"{form:9} {case:44} {way[0]:22} {us:8.1f}   {other[0]:26} "
            f"{'-' if beside is None else format(beside, '8.1f')}   {row['ratio']}   {note}",
            flush=True,
        )


def gates(run: Runner, fla: bool) -> None:
    B, T, H, K, V = 16, 2048, 8, 128, 128
    q, k, v = run.draw(B, T, H, K), run.draw(B, T, H, K), run.draw(B, T, H, V)
    vector, scalar = run.gate(B, T, H, K), run.gate(B, T, H)
    dense: tuple[str, Call, tuple[Tensor, ...]]
    dense = ("chunk_gla", lambda *x: chunk_gla(*x)[0], (q, k, v, vector))
    ways: dict[str, tuple[str, Call, tuple[Tensor, ...]]] = {
        "scalar": ("chunk_simple_gla", lambda *x: chunk_simple_gla(*x)[0], (q, k, v, scalar)),
        "head": ("chunk_retention", lambda *x: chunk_retention(*x)[0], (q, k, v)),
        "none": ("chunk_linear_attn", lambda *x: chunk_linear_attn(*x)[0], (q, k, v)),
    }
    for kind, way in ways.items():
        run.compare("gates", f"{kind} {B},{T},{H},{K},{V}", way, dense)
    if fla:
        for kind, room in (("scalar", "simple_gla"), ("head", "retention")):
            name = ways[kind][0]
            theirs = bench._import_fla(room, name)
            other = (f"fla {name}", lambda *x, f=theirs: f(*x)[0], ways[kind][2])
            run.compare("gates", kind, ways[kind], other, bench.quick_autotune)


def boundaries(tokens: int, sequences: int, kind: str) -> Tensor:
    """``[sequences + 1]`` in int32: lengths uniform to twice the mean, or between random cuts."""
    generator = torch.Generator().manual_seed(1)
    if kind == "uniform":
        weights = torch.rand(sequences, generator=generator)
        ends = (weights.cumsum(0) / weights.sum() * tokens).round().int()
    else:
        cuts = torch.randperm(tokens - 1, generator=generator)[: sequences - 1] + 1
        ends = torch.cat((cuts.sort()[0], torch.tensor([tokens]))).int()
    return torch.cat((torch.zeros(1, dtype=torch.int32), ends)).cuda()


def packed(run: Runner) -> None:
    tokens, sequences, width = 32768, 16, 128
    for heads in (8, 32):
        shape = (1, tokens, heads, width)
        x = (run.draw(*shape), run.draw(*shape), run.draw(*shape), run.gate(*shape))
        s = (*x[:3], run.gate(1, tokens, heads))
        batch = (sequences, tokens // sequences)
        for name, call, t in (("vector", chunk_gla, x), ("scalar", chunk_simple_gla, s)):
            equal = tuple(each.view(*batch, *each.shape[2:]) for each in t)
            for kind in ("uniform", "cuts"):
                cu = boundaries(tokens, sequences, kind)
                run.compare(
                    "packed",
                    f"{name} gate, {heads} heads, {kind}",
                    ("packed", lambda *t, f=call, cu=cu: f(*t, cu_seqlens=cu)[0], t),
                    ("equal lengths", lambda *t, f=call: f(*t)[0], equal),
                )


def grouped(run: Runner) -> None:
    B, T, many, few, D = 4, 2048, 32, 8, 128
    wide, narrow = (B, T, many, D), (B, T, few, D)
    q, k, v, g = run.draw(*wide), run.draw(*narrow), run.draw(*wide), run.gate(*wide)

    def again(t: Tensor) -> Tensor:
        return t.repeat_interleave(many // few, 2)

    run.compare(
        "grouped",
        f"{many} heads of q, v, g on {few} keys",
        ("chunk_gla", lambda *x: chunk_gla(*x)[0], (q, k, v, g)),
        ("k repeated", lambda q, k, v, g: chunk_gla(q, again(k), v, g)[0], (q, k, v, g)),
    )
    v, g = run.draw(*narrow), run.gate(*narrow)
    run.compare(
        "grouped",
        f"{many} query heads on {few} states",
        ("chunk_gla", lambda *x: chunk_gla(*x)[0], (q, k, v, g)),
        (
            "k, v, g repeated",
            lambda q, k, v, g: chunk_gla(q, again(k), again(v), again(g))[0],
            (q, k, v, g),
        ),
    )


def decoding(run: Runner) -> None:
    B, H, K, V = 32, 16, 128, 128
    q, k, v, g = (
        run.draw(B, 1, H, K),
        run.draw(B, 1, H, K),
        run.draw(B, 1, H, V),
        run.gate(B, 1, H, K),
    )
    scalar = run.gate(B, 1, H)
    for dtype in (torch.float32, torch.bfloat16):
        states = [run.draw(B, H, K, V, dtype=dtype) for _ in range(LAYERS)]
        size = states[0].numel() * states[0].element_size()
        small = sum(2 * t.numel() for t in (q, k, v, g, v))
        floor = (2 * size + small) / run.harness.copy_bandwidth * 1e6
        name = str(dtype).removeprefix("torch.")

        def multiplied(states: list[Tensor] = states) -> Mapping[str, Tensor]:
            for state in states:
                state.mul_(0.999)
            return {}

        beside = run.harness.device_us(multiplied)[0] / LAYERS
        for kind, gate in (("vector", g), ("scalar", scalar)):

            def updated(
                states: list[Tensor] = states, gate: Tensor = gate
            ) -> Mapping[str, Tensor]:
                for state in states:
                    o, _ = recurrent_gla(q, k, v, gate, initial_state=state, inplace=True)
                return {"o": o}

            with torch.no_grad():
                us, note = run.harness.device_us(updated)
            note = f"{us / LAYERS / floor:.2f} x floor of {floor:.1f}" + (
                f"; {note}" if note else ""
            )
            run.add(
                "decoding",
                f"{B},1,{H},{K},{V} {name} states, {kind} gate",
                ("recurrent_gla", us / LAYERS),
                ("state.mul_()", beside),
                note,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="what the other forms cost beside the plain one")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--fla", action="store_true", help="flash-linear-attention beside it")
    parser.add_argument("--only", action="append", help="one of the forms, repeatable")
    options = parser.parse_args()
    run = Runner()
    forms: dict[str, Callable[[], None]] = {
        "gates": lambda: gates(run, options.fla),
        "packed": lambda: packed(run),
        "grouped": lambda: grouped(run),
        "decoding": lambda: decoding(run),
    }
    for name, form in forms.items():
        if options.only is None or name in options.only:
            form()
    if options.out:
        env = bench.environment(run.harness)
        document = {"schema": 1, "env": env, "rows": run.rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
