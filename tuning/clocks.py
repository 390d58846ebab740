"""What the driver says of a GPU's clock while candidates are timed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# nvml.h: clock types and reasons for a clock below the one that was asked for.
_SM_CLOCK = 1
_REASONS: tuple[tuple[int, str], ...] = (
    (0x4, "power cap"),
    (0x8, "hardware slowdown"),
    (0x20, "software thermal slowdown"),
    (0x40, "hardware thermal slowdown"),
    (0x80, "power brake"),
)


@dataclass(frozen=True)
class Clock:
    """A moment's SM clock in MHz (0: unknown) and what held it back (empty: nothing)."""

    mhz: int = 0
    throttle: str = ""


class ClockReader:
    """Asks NVML, which comes with the driver; where it is missing, clocks are unknown.

    Args:
        uuid: of the device, as ``GPU-...`` or without the prefix.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml: ctypes.CDLL | None = None
        self._device = ctypes.c_void_p()
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2() == 0 and (
                library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(self._device)) == 0
            ):
                self._nvml = library
        except (OSError, AttributeError):
            pass

    def read(self) -> Clock:
        """The clock now."""
        if self._nvml is None:
            return Clock()
        mhz, reasons = ctypes.c_uint(), ctypes.c_ulonglong()
        try:
            if self._nvml.nvmlDeviceGetClockInfo(self._device, _SM_CLOCK, ctypes.byref(mhz)):
                return Clock()
            ask = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons
            failed = ask(self._device, ctypes.byref(reasons))
        except AttributeError:
            return Clock(int(mhz.value))
        if failed:
            return Clock(int(mhz.value))
        held = [text for bit, text in _REASONS if reasons.value & bit]
        return Clock(int(mhz.value), ", ".join(held))
