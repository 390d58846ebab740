"""From a KernelSpec to what the Triton compiler wants. Imports Triton, needs no GPU."""

from __future__ import annotations

import functools
import importlib
import os
import threading
from typing import Any

from glac.errors import MissingEnvironmentError
from glac.kernelspec import KernelSpec
from glac.templates import TEMPLATES, active_args, constants, pointer_type, unused_args


def import_triton() -> Any:
    """Triton, set up so that cubins hold no source paths and are the same from every folder.

    Raises:
        MissingEnvironmentError: if Triton is not installed.
    """
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise MissingEnvironmentError(
            f"Triton is needed to compile kernels and cannot be imported ({error})",
            hint="pip install 'glac[build]'; kernels from packs and the PyTorch path work without",
        ) from None


def kernel_function(template: str) -> Any:
    """The Triton function of a template."""
    import_triton()
    module = importlib.import_module(f"glac.kernel_templates.{TEMPLATES[template].name}")
    return getattr(module, TEMPLATES[template].name)


_front_end = threading.Lock()


@functools.cache
def _source_class() -> Any:
    """Triton's source of one kernel, parsed by one thread at a time.

    The front end parses Python, and parsers of two threads disturb each other in CPython 3.11
    (``SystemError: AST constructor recursion depth mismatch``). The passes behind it and the
    assembler, where most of the time goes, run side by side.
    """
    triton_class: Any = importlib.import_module("triton.compiler").ASTSource

    class Source(triton_class):  # type: ignore[misc]
        def hash(self) -> Any:
            with _front_end:
                return super().hash()

        def make_ir(self, *args: Any, **kwargs: Any) -> Any:
            with _front_end:
                return super().make_ir(*args, **kwargs)

    return Source


def ast_source(kernel: KernelSpec) -> Any:
    """The specialised source: argument types, constants and alignment facts bound."""
    import_triton()
    fn = kernel_function(kernel.template)
    consts = constants(kernel.template, kernel.spec, kernel.config)
    unused = unused_args(kernel.template, kernel.config)
    types = {
        a.name: pointer_type(a.kind, kernel.spec) if a.is_pointer else a.kind
        for a in active_args(kernel.template, kernel.spec, unused)
    }
    names = list(fn.arg_names)
    # Without the divisibility facts there is no asynchronous copy at all.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*")
    }
    return _source_class()(
        fn=fn,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={n: consts[n] for n in names if n in consts},
        attrs=aligned,
    )
