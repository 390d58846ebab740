"""glac: ahead-of-time compiled, autotuned Triton kernels for gated linear attention.

Importing this package loads neither PyTorch nor Triton and touches no device; the operations live
in ``glac.attention``. ``glac.preload`` loads kernels before they are needed, and ``glac.stats``
counts what served so far.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from glac.dispatch import stats as stats
    from glac.preloading import preload as preload

_LATER = {"preload": "glac.preloading", "stats": "glac.dispatch"}
"""What needs PyTorch, and where it is: imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
