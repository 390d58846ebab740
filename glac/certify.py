"""Sign tuned rows again after a change to templates that left their machine code as it was.

What certifies a row is the hash of each kernel that was checked and timed. The hash of the
templates in a file's header only spares readers a compilation to see that nothing changed; where
it has changed, compiling tells whether the rows have.
"""

from __future__ import annotations

from dataclasses import replace

from glac.compile import compile_many, toolchain
from glac.errors import ConfigError, GlacError
from glac.gpus import GPUS
from glac.kernelspec import config_kernels
from glac.record import dataclass
from glac.templates import templates_sha256
from glac.tuned import TunedFile, TunedRow


@dataclass(frozen=True)
class Certified:
    """A file that is signed for the templates of today.

    Attributes:
        file: with their hashes in its header.
        ops: what was signed anew, and the number of rows of each; the others needed nothing.
        kernels: how many were compiled and found to be what was measured.
    """

    file: TunedFile
    ops: dict[str, int]
    kernels: int


def certify(file: TunedFile, jobs: int | None = None) -> Certified:
    """Compile every row of the ops whose templates changed and compare with what was measured.

    Args:
        file: to be signed.
        jobs: kernels compiled at a time, all CPUs if None.

    Raises:
        ConfigError: a kernel does not compile or differs, or another toolchain made the rows.
    """
    tools, env = toolchain(), file.environment
    if (tools.triton, tools.ptxas) != (env.triton, env.ptxas):
        raise ConfigError(
            f"{file.gpu}: measured with Triton {env.triton} and ptxas {env.ptxas}, "
            f"here are {tools.triton} and {tools.ptxas}",
            hint="install the toolchain of the file, or tune again",
        )
    now = templates_sha256(env.templates_sha256)
    ops = [op for op, sha in now.items() if sha != env.templates_sha256[op]]
    rows = [row for row in file.rows if row.op in ops]
    wanted = {
        kernel: row
        for row in rows
        for kernel in config_kernels(row.spec, row.config, GPUS[file.gpu].arch)
    }
    measured = {kernel.name: kernel.cubin_sha256 for row in rows for kernel in row.kernels}
    changed: dict[str, TunedRow] = {}
    for kernel, built in compile_many(wanted, jobs).items():
        if isinstance(built, GlacError) or built.sha256 != measured[kernel.name]:
            changed[kernel.name] = wanted[kernel]
    if changed:
        name, row = sorted(changed.items())[0]
        raise ConfigError(
            f"{file.gpu}: {len(changed)} of {len(wanted)} kernels are not what was measured, "
            f"the first {name} ({row.op.value} of {row.problem})",
            hint=f"tune these again: glac tune --gpu {file.gpu}",
        )
    environment = replace(env, templates_sha256=now)
    counts = {op.value: sum(row.op is op for row in rows) for op in ops}
    return Certified(replace(file, environment=environment), counts, len(wanted))
