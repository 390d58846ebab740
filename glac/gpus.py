"""GPUs that glac knows, and how a device is matched to one of them."""

from __future__ import annotations

from glac.errors import ConfigError
from glac.record import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """One GPU model.

    Attributes:
        name: as typed after ``--gpu``.
        title: as the vendor writes it.
        capability: CUDA compute capability.
        sm_count: streaming multiprocessors.
        shared_per_block: bytes of shared memory one block may use.
        copy_bandwidth: achievable device-to-device copy, bytes per second, read plus written
            (h200 measured, a100, h100 and h100-pcie from measurements published for them, the rest
            86 % of the data sheet, as the a100 reaches).
        matrix_rate: achievable dense bf16 rate, FLOP/s.
    """

    name: str
    title: str
    capability: tuple[int, int]
    sm_count: int
    shared_per_block: int
    copy_bandwidth: float
    matrix_rate: float

    @property
    def arch(self) -> str:
        """Code target. Hopper's ``a`` features exist on capability 9.0 only.

        Code for 8.0 runs on every 8.x, so these share one target.
        """
        major, minor = self.capability
        if major == 8:
            return "sm_80"
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


# Shared-memory limits: CUDA programming guide, "technical specifications per compute capability".
_HOPPER_SHARED = 232448
_A100_SHARED = 166912
_SMALL_AMPERE_SHARED = 101376

GPUS: dict[str, GpuSpec] = {
    spec.name: spec
    for spec in (
        GpuSpec("a100", "A100 SXM4", (8, 0), 108, _A100_SHARED, 1.75e12, 260e12),
        GpuSpec("a30", "A30", (8, 0), 56, _A100_SHARED, 0.80e12, 137e12),
        GpuSpec("h100", "H100 SXM5", (9, 0), 132, _HOPPER_SHARED, 3.0e12, 750e12),
        GpuSpec("h100-pcie", "H100 PCIe", (9, 0), 114, _HOPPER_SHARED, 1.8e12, 500e12),
        GpuSpec("h200", "H200 SXM", (9, 0), 132, _HOPPER_SHARED, 4.2e12, 750e12),
        # Stands for all devices of capability 8.6, 8.7 and 8.9, which have as little or more.
        GpuSpec("rtx3090", "RTX 3090", (8, 6), 82, _SMALL_AMPERE_SHARED, 0.80e12, 59e12),
    )
}

# Whose tuned rows serve a GPU that has none of its own: same code, nearest memory system first.
RELATIVES: dict[str, tuple[str, ...]] = {
    "a100": ("a30",),
    "a30": ("a100",),
    "h100": ("h200", "h100-pcie"),
    "h100-pcie": ("h100", "h200"),
    "h200": ("h100", "h100-pcie"),
    # Their kernels may need more shared memory; dispatch then passes them over.
    "rtx3090": ("a100", "a30"),
}

ARCHS: dict[str, int] = {"sm_80": 80, "sm_90a": 90}
"""Code targets glac builds for, and the capability number the compiler wants."""


def gpu_by_name(name: str) -> GpuSpec:
    """The GPU called ``name``.

    Raises:
        ConfigError: if there is none; the hint lists the known names.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(
            f"unknown GPU {name!r}", hint=f"known GPUs are {', '.join(sorted(GPUS))}"
        ) from None


def match_gpu(capability: tuple[int, int], sm_count: int, device_name: str = "") -> GpuSpec | None:
    """The known GPU that a device is, or ``None``.

    H100 and H200 share capability and SM count: only their names tell them apart.
    """
    found = [
        spec
        for spec in GPUS.values()
        if spec.capability == tuple(capability) and spec.sm_count == sm_count
    ]
    if len(found) > 1:
        named = [s for s in found if s.name.split("-")[0] in device_name.lower()]
        found = named or found
    return found[0] if found else None
