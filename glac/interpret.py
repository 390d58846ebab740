"""Run kernels in Triton's interpreter, on CPU tensors: how they are checked without a GPU.

Set ``TRITON_INTERPRET=1`` before anything imports Triton, in a process of its own. Only fp32 and
fp16 inputs: the interpreter's bf16 arithmetic is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glac.errors import MissingEnvironmentError
from glac.generate import kernel_function
from glac.kernelspec import KernelSpec, config_kernels
from glac.plan import AnyConfig, Plan
from glac.problem import Problem
from glac.templates import active_args, constants, unused_args


class InterpretedKernel:
    """A kernel that runs in Python, program by program."""

    def __init__(self, kernel: KernelSpec) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise MissingEnvironmentError(
                "TRITON_INTERPRET=1 must be set before Triton is imported",
                hint="run in a fresh process: TRITON_INTERPRET=1 python ...",
            )
        self._fn = kernel_function(kernel.template)
        unused = unused_args(kernel.template, kernel.config)
        active = active_args(kernel.template, kernel.spec, unused)
        self._names = [a.name for a in active]
        self._constants = constants(kernel.template, kernel.spec, kernel.config)
        if "INTERPRETED" in self._constants:
            self._constants["INTERPRETED"] = True  # inline assembly has no interpreter

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        absent = torch.empty(1)
        values = [absent if t is None else t for t in tensors]
        arguments = dict(zip(self._names, [*values, *scalars], strict=True))
        self._fn[(grid,)](**arguments, **self._constants)


def interpreted_plan(problem: Problem, config: AnyConfig) -> Plan[AnyConfig]:
    """A plan whose kernels run in the interpreter."""
    kernels = config_kernels(problem.spec, config, "sm_90a")
    return Plan(problem, config, {k.template: InterpretedKernel(k) for k in kernels})
