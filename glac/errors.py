"""Every error glac raises on purpose.

Each class carries a ``hint`` (what to do next) and the process exit code that the command
line uses for it. User mistakes are ``GlacError`` subclasses that also derive from the builtin a
caller would expect (``ValueError``, ``TypeError``), so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class GlacError(Exception):
    """Base class. ``str(error)`` is the message, ``error.hint`` the next step (may be empty)."""

    exit_code = 1
    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(GlacError, ValueError):
    """A tensor or scalar argument of a public operation has the wrong rank, shape, or value."""

    code = "input"


class InputTypeError(GlacError, TypeError):
    """An argument has the wrong type, dtype or device."""

    code = "input-type"


class ConfigError(GlacError, ValueError):
    """A kernel config or tuned YAML file is malformed or illegal for its problem."""

    code = "config"


class PackError(GlacError):
    """A kernel pack is broken, foreign, or does not fit this device. Nothing of it was loaded."""

    code = "pack"


class KernelNotFoundError(GlacError):
    """No ahead-of-time kernel serves the problem and building one is forbidden or failed."""

    code = "kernel-not-found"


class CompileError(GlacError):
    """The toolchain could not compile a kernel."""

    code = "compile"


class DriverError(GlacError):
    """A CUDA driver call failed."""

    code = "driver"


class StudyError(GlacError):
    """A tuning study cannot be started, resumed or exported."""

    code = "study"


class NotDifferentiableError(GlacError, NotImplementedError):
    """A gradient was asked of an operation that has none."""

    code = "not-differentiable"


class MissingEnvironmentError(GlacError):
    """Something outside glac is missing: a GPU, Triton, Optuna, an assembler."""

    exit_code = 3
    code = "environment"
