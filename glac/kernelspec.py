"""One kernel to be compiled: template + specialisation + config + arch, with a name and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from glac.configs import KERNEL_CONFIGS, Config, KernelConfig, gate_kernels
from glac.errors import ConfigError
from glac.gpus import ARCHS
from glac.problem import Specialisation, strict_fields
from glac.record import dataclass
from glac.templates import TEMPLATES, kernel_specialisation


def _known_template(name: object) -> str:
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ConfigError(f"unknown template {name!r}", hint=f"templates: {', '.join(TEMPLATES)}")
    return name


@dataclass(frozen=True)
class KernelSpec:
    """Everything that decides a kernel's machine code, apart from the toolchain.

    Attributes:
        template: a key of ``glac.templates.TEMPLATES``.
        spec: the specialisation, reduced to what the template depends on.
        config: the template's config.
        arch: ``sm_80`` or ``sm_90a``.
    """

    template: str
    spec: Specialisation
    config: KernelConfig
    arch: str

    def __post_init__(self) -> None:
        _known_template(self.template)
        if self.arch not in ARCHS:
            raise ConfigError(f"unknown arch {self.arch!r}", hint=f"archs: {', '.join(ARCHS)}")
        kind = KERNEL_CONFIGS[self.template]
        if not isinstance(self.config, kind):
            raise ConfigError(
                f"{self.template} takes a {kind.__name__}, got a {type(self.config).__name__}"
            )
        object.__setattr__(self, "spec", kernel_specialisation(self.template, self.spec))

    def to_dict(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "spec": self.spec.to_dict(),
            "config": self.config.to_dict(),
            "arch": self.arch,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "kernel") -> KernelSpec:
        d = strict_fields(cls, data, where)
        template = _known_template(d["template"])
        config = KERNEL_CONFIGS[template].from_dict(d["config"], f"{where}.config")
        spec = Specialisation.from_dict(d["spec"], f"{where}.spec")
        return cls(template, spec, config, str(d["arch"]))

    @property
    def hash8(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Stable and readable, for example ``gla_fwd_k128_v128_vector_bf16_c32_...-1f3a9c02``."""
        arch = self.arch.replace("_", "")
        return f"{self.template}_{self.spec.slug}_{self.config.slug}_{arch}-{self.hash8}"


def config_kernels(spec: Specialisation, config: Config, arch: str) -> list[KernelSpec]:
    """The kernels of a config, in launch order but for those of a low-rank gate.

    The backward pass of a low-rank gate is that of a dense one between kernels of the gate.
    """
    inner = spec.in_pass(config.op)
    kernels = [KernelSpec(name, inner, cfg, arch) for name, cfg in config.kernels().items()]
    around = {} if inner == spec else gate_kernels(spec)
    return kernels + [KernelSpec(name, spec, cfg, arch) for name, cfg in around.items()]
