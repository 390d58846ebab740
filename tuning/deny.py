"""Families of configs whose machine code failed its checks, from a study's outcomes.

A family is one tile of one kernel: the config's part without its pipeline depth and copies, which
seldom decide whether the compiler gets it right. It is denied if several of its members failed and
none worked. A failure that is in no such family is denied by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from glac.configs import Config
from glac.problem import Op, Specialisation
from glac.tuned import Denied, Evidence, TunedFile
from glac.tuning.evaluate import BROKEN, Outcome

_TILE = ("chunk", "block_k", "block_v", "num_warps", "dv", "keep", "lead", "stops", "product_ends")
_FEWEST = 2
_EVIDENCE = 5

_Family = tuple[str, tuple[tuple[str, int | bool], ...]]


def _families(config: Config) -> list[_Family]:
    """The tiles of a config, each with the part it is in."""
    found = []
    for part, values in config.to_dict().items():
        if isinstance(values, dict):
            tile = tuple((name, values[name]) for name in _TILE if name in values)
            if tile:
                found.append((part, tile))
    return found


def _whole(config: Config) -> dict[str, dict[str, int | bool]]:
    return {
        part: dict(values) for part, values in config.to_dict().items() if isinstance(values, dict)
    }


def denied_families(
    spec: Specialisation,
    outcomes: Mapping[Config, Outcome],
    *,
    triton: str,
    ptxas: str,
    templates_sha256: str,
    measured_on: str,
    date: str,
) -> list[Denied]:
    """What a study of one op of a problem says must not be used.

    Args:
        spec: of the problem.
        outcomes: of its candidates.
        triton, ptxas, templates_sha256: what made their machine code.
        measured_on: title of the device.
        date: of the study.
    """
    broken = {c: o for c, o in outcomes.items() if o.status in BROKEN}
    working = {family for c, o in outcomes.items() if o.ok for family in _families(c)}
    members: dict[_Family, list[Config]] = {}
    for config in broken:
        for family in _families(config):
            if family not in working:
                members.setdefault(family, []).append(config)
    found: list[Denied] = []
    covered: set[Config] = set()

    def add(match: Mapping[str, Mapping[str, int | bool]], configs: Sequence[Config]) -> None:
        evidence = tuple(
            Evidence(c.slug, broken[c].status, broken[c].reason or broken[c].status)
            for c in sorted(configs, key=lambda c: c.slug)[:_EVIDENCE]
        )
        op: Op = configs[0].op
        tools = (triton, ptxas, templates_sha256, measured_on, date)
        found.append(Denied(op, spec, match, evidence, *tools))

    # The largest first, so that one failure is not listed once for each part of its config.
    for (part, tile), configs in sorted(members.items(), key=lambda m: (-len(m[1]), m[0])):
        fresh = [config for config in configs if config not in covered]
        if len(configs) >= _FEWEST and fresh:
            add({part: dict(tile)}, configs)
            covered.update(configs)
    for config in broken:
        if config not in covered:
            add(_whole(config), [config])
    return found


def why_denied(
    spec: Specialisation,
    config: Config,
    files: Iterable[TunedFile],
    triton: str,
    ptxas: str,
    templates_sha256: Mapping[Op, str],
) -> str | None:
    """Why a config is on the deny-list of one of ``files``, or ``None``."""
    for file in files:
        for entry in file.denied:
            sha = templates_sha256.get(entry.op, "")
            if entry.applies(triton, ptxas, sha) and entry.matches(spec, config):
                first = entry.evidence[0]
                return (
                    f"on the deny-list of {file.gpu}.yaml: {first.config} was {first.status} "
                    f"on {entry.measured_on}"
                )
    return None
