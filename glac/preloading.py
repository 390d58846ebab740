"""Load kernels before they are needed: for servers, and before a CUDA graph is captured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from glac import dispatch
from glac.errors import InputError, MissingEnvironmentError
from glac.plan import Kernel
from glac.problem import Bucket, Op, Problem, Specialisation
from glac.record import dataclass
from glac.settings import load_settings


@dataclass(frozen=True)
class Loaded:
    """What serves one op of one specialisation near one bucket from now on.

    Attributes:
        op: what is computed.
        spec: the specialisation.
        bucket: the rounded sizes.
        provider: ``pack``, ``build`` (compiled now) or ``torch`` (nothing was loaded).
        config_id: of the config.
        kernels: their names, in launch order.
        path: of the pack.
        reason: one line on why.
    """

    op: Op
    spec: Specialisation
    bucket: Bucket
    provider: str
    config_id: str
    kernels: tuple[str, ...]
    path: str
    reason: str


def preload(
    problems: Iterable[Problem] | None = None,
    *,
    device: torch.device | str | int | None = None,
    ops: Iterable[Op | str] = tuple(Op),
) -> list[Loaded]:
    """Resolve problems, verify and load their kernels, and put them on the device.

    Calls with problems like these then find everything in place: they read no file and load no
    code, not even at their first launch. Without a GPU-side effect it changes nothing that a call
    would not have changed itself.

    Args:
        problems: what will be called, as ``glac.problem.Problem``; lengths and batches matter only
            as rounded powers of two. ``None`` stands for every row of every pack that can serve
            this device, so that no later call meets an unloaded one.
        device: a CUDA device, by default the current one.
        ops: what will be called of each problem, ``forward`` and ``backward``.

    Returns:
        One entry for each op and problem, in the order asked for, duplicates left out.

    Raises:
        MissingEnvironmentError: PyTorch finds no CUDA GPU.
        InputError: the device is no CUDA device.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves one of ``problems``.
        DriverError: the process was forked from one that had kernels loaded.
    """
    index = _device_index(device)
    wanted = [Op(op) for op in ops]
    asked = _rows_here(index, wanted) if problems is None else _each(problems, wanted)
    seen: dict[tuple[Op, Specialisation, Bucket], Loaded] = {}
    with torch.cuda.device(index):
        for op, problem in asked:
            key = (op, problem.spec, problem.bucket)
            if key in seen:
                continue
            decision, plan = dispatch.resolve(problem, index, op)
            for kernel in plan.kernels.values() if plan else ():
                _load_now(kernel)
            seen[key] = Loaded(
                *key,
                decision.provider,
                decision.config_id,
                tuple(decision.kernels.values()),
                decision.path,
                decision.reason,
            )
    return list(seen.values())


def _device_index(device: torch.device | str | int | None) -> int:
    if not torch.cuda.is_available():
        raise MissingEnvironmentError(
            "PyTorch finds no CUDA GPU in this machine",
            hint="CPU tensors run through PyTorch and need no kernels",
        )
    if device is None:
        return torch.cuda.current_device()
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise InputError(f"device must be a CUDA device, got {found}")
    return torch.cuda.current_device() if found.index is None else found.index


def _each(problems: Iterable[Problem], ops: Iterable[Op]) -> Iterator[tuple[Op, Problem]]:
    ops = list(ops)
    for problem in problems:
        for op in ops:
            # A gate has passes of its own; any problem of few tokens may also be decoded.
            if op in problem.ops or op in problem.spec.gate.passes:
                yield op, problem


def _rows_here(index: int, ops: list[Op]) -> Iterator[tuple[Op, Problem]]:
    """A problem in the bucket of each row: what dispatch can choose is what it chooses there."""
    gpu, _ = dispatch.device_gpu(index)
    if gpu is None:
        return
    packs, _ = dispatch.installed_packs(load_settings(), gpu.arch)
    for pack in packs:
        for row in pack.rows:
            if row.op in ops:
                yield row.op, Problem(row.spec, 1 << row.bucket.bh, 1 << row.bucket.t, 1)


def _load_now(kernel: Kernel) -> None:
    load = getattr(kernel, "load_now", None)
    if load is not None:
        load()
