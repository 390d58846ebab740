"""Train on a long document in segments, the state carried from one to the next.

Untruncated: the carried state keeps its history, and the gradients are those of one pass.
Truncated: it is detached, so that a segment's memory is free before the next one starts.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from glac.attention import chunk_gla

B, T, H, K, V, SEGMENT = 1, 1024, 4, 64, 64, 256


def inputs(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randn(B, T, H, size, generator=generator, device=device, dtype=dtype)

    g = logsigmoid(draw(K)) / 16
    return [t.requires_grad_() for t in (draw(K), draw(K), draw(V), g.detach())]


def loss(leaves: list[Tensor], start: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss of one segment, and the state after it."""
    q, k, v, g = (t[:, start : start + SEGMENT] for t in leaves)
    o, after = chunk_gla(q, k, v, g, initial_state=state, output_final_state=True)
    assert after is not None
    return o.float().square().sum(), after


def gradients(leaves: list[Tensor], *, truncate: bool) -> list[Tensor]:
    state: Tensor | None = None
    losses = []
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    for start in range(0, T, SEGMENT):
        part, state = loss(leaves, start, state)
        losses.append(part)
        if truncate:
            grads = [a + b for a, b in zip(grads, torch.autograd.grad(part, leaves), strict=True)]
            state = state.detach()
    return grads if truncate else list(torch.autograd.grad(torch.stack(losses).sum(), leaves))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    leaves = inputs(device, dtype)
    o, _ = chunk_gla(*leaves)
    one_pass = torch.autograd.grad(o.float().square().sum(), leaves)
    for truncate in (False, True):
        print("truncated" if truncate else "untruncated", "distance from one pass:")
        found = gradients(leaves, truncate=truncate)
        for name, grad, whole in zip("qkvg", found, one_pass, strict=True):
            distance = (grad.float() - whole.float()).norm() / whole.float().norm()
            print(f"  d{name} {float(distance):.1e}")


if __name__ == "__main__":
    main()
