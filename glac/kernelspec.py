"""One kernel to be compiled: template + specialisation + config + arch, with a name and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glac.configs import ChunkKernelConfig, CombineKernelConfig, ForwardConfig, KernelConfig
from glac.errors import ConfigError
from glac.gpus import ARCHS
from glac.problem import Specialisation, strict_fields
from glac.templates import TEMPLATES, kernel_specialisation


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
        if self.template not in TEMPLATES:
            raise ConfigError(
                f"unknown template {self.template!r}", hint=f"templates: {', '.join(TEMPLATES)}"
            )
        if self.arch not in ARCHS:
            raise ConfigError(f"unknown arch {self.arch!r}", hint=f"archs: {', '.join(ARCHS)}")
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
        kind = CombineKernelConfig if d["template"] == "gla_fwd_combine" else ChunkKernelConfig
        config: KernelConfig = kind.from_dict(d["config"], f"{where}.config")
        spec = Specialisation.from_dict(d["spec"], f"{where}.spec")
        return cls(str(d["template"]), spec, config, str(d["arch"]))

    @property
    def hash8(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Stable and readable, for example ``gla_fwd_k128_v128_vector_bf16_c32_...-1f3a9c02``."""
        arch = self.arch.replace("_", "")
        return f"{self.template}_{self.spec.slug}_{self.config.slug}_{arch}-{self.hash8}"


def forward_kernels(spec: Specialisation, config: ForwardConfig, arch: str) -> list[KernelSpec]:
    """The kernels of a forward config, in launch order."""
    return [KernelSpec(name, spec, cfg, arch) for name, cfg in config.kernels().items()]
