"""Whether a pack and a device go together, asked before the driver sees a byte of machine code."""

from __future__ import annotations

from collections.abc import Iterable

from glac.errors import PackError
from glac.gpus import GPUS, GpuSpec
from glac.pack import Pack, PackedKernel
from glac.record import dataclass

# Oldest driver branch for each version of CUDA (release notes of the CUDA toolkit).
_BRANCHES: tuple[tuple[tuple[int, int], int], ...] = (
    ((11, 0), 450),
    ((11, 1), 455),
    ((11, 2), 460),
    ((11, 4), 470),
    ((11, 5), 495),
    ((11, 6), 510),
    ((11, 7), 515),
    ((11, 8), 520),
    ((12, 0), 525),
    ((12, 1), 530),
    ((12, 2), 535),
    ((12, 3), 545),
    ((12, 4), 550),
    ((12, 5), 555),
    ((12, 6), 560),
    ((12, 8), 570),
    ((12, 9), 575),
    ((13, 0), 580),
    ((13, 1), 590),
)


def driver_branch(version: tuple[int, int]) -> int:
    """The driver branch, such as 575, that came with a version of CUDA, such as ``(12, 9)``.

    A version that is not listed counts as the newest one before it; 0 if there is none.
    """
    return max((branch for known, branch in _BRANCHES if known <= version), default=0)


def oldest_cuda(branch: int) -> tuple[int, int]:
    """The oldest version of CUDA whose drivers are of ``branch`` or newer."""
    return next(version for version, known in _BRANCHES if known >= branch)


@dataclass(frozen=True)
class Device:
    """What a device lets run.

    Attributes:
        name: for messages.
        capability: CUDA compute capability.
        shared_per_block: bytes of shared memory one block may use.
        cuda: version of CUDA that the driver is for.
    """

    name: str
    capability: tuple[int, int]
    shared_per_block: int
    cuda: tuple[int, int]


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code of ``arch`` runs on a device: of its own major version, not older.

    The ``a`` of ``sm_90a`` ties code to exactly one capability.
    """
    digits = arch.removeprefix("sm_").removesuffix("a")
    major, minor = int(digits[:-1]), int(digits[-1])
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def check_fit(pack: Pack, names: Iterable[str], device: Device) -> None:
    """Refuse kernels of ``pack`` that ``device`` cannot run.

    Args:
        pack: read and checked.
        names: of the kernels that are to be loaded.
        device: where.

    Raises:
        PackError: arch, driver or shared memory do not fit; names what is wanted and what is
            there.
    """
    if not runs_on(pack.arch, device.capability):
        have = ".".join(map(str, device.capability))
        raise PackError(
            f"{pack.path}: arch: its code is for {pack.arch}, {device.name} has capability {have}",
            hint=f"build for this GPU: glac build --gpu {' or '.join(sorted(GPUS))}",
        )
    branch = driver_branch(device.cuda)
    if branch < pack.driver_floor:
        version = ".".join(map(str, device.cuda))
        raise PackError(
            f"{pack.path}: driver_floor: its code needs driver {pack.driver_floor} or newer, the "
            f"installed one is for CUDA {version}, of branch {branch}",
            hint=f"install driver {pack.driver_floor} or newer, or build the pack with an older "
            "assembler",
        )
    for name in names:
        shared = pack.kernels[name].shared
        if shared > device.shared_per_block:
            raise PackError(
                f"{pack.path}: kernels[{name!r}].shared: needs {shared} bytes of shared memory in "
                f"a block, {device.name} has {device.shared_per_block}",
                hint="use a pack with rows for a GPU with as little: glac build --gpu rtx3090",
            )


def row_fits(kernels: Iterable[PackedKernel], gpu: GpuSpec) -> bool:
    """Whether all of a row's kernels have enough shared memory on ``gpu``."""
    return all(kernel.shared <= gpu.shared_per_block for kernel in kernels)
