"""Tuned configurations: one YAML file for each GPU, written by ``glac tune``, read by the build.

The file is data that decides which machine code ships, so reading is strict: unknown, missing and
repeated keys, wrong types, illegal configs, and rows that contradict themselves are refused, each
with file, line and field.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from glac.atomic import write_text
from glac.configs import CONFIGS, Config, config_from_dict, why_illegal
from glac.errors import ConfigError
from glac.gpus import ARCHS, GPUS, gpu_by_name
from glac.kernelspec import config_kernels
from glac.problem import Bucket, Op, Problem, Specialisation

SCHEMA = 3
OLDEST_SCHEMA = 2
"""Files from here on are read, older ones knew the forward pass only. The newest is written.

3: rows say where they come from (``provenance``), and the file lists ``denied`` configs.
"""
_HEADER = "# Written by `glac tune`; a hand edit is checked as strictly as a new study.\n"
_HINT = "run `glac tune` again, or correct the line"
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_DEPTH = 16
_MAX_BYTES = 1 << 24
_MAX_SIZE = 2**31 - 1

Key = str | int
Lines = dict[tuple[Key, ...], int]
RowKey = tuple[Op, Specialisation, Bucket]


@dataclass(frozen=True)
class TunedKernel:
    """One compiled kernel of a row, as it was certified on the device.

    Attributes:
        name: ``KernelSpec.name``.
        registers: per thread.
        spill_bytes: stored to local memory because registers ran out.
        shared: dynamic shared memory, bytes.
        cubin_sha256: of the machine code that was checked and timed.
    """

    name: str
    registers: int
    spill_bytes: int
    shared: int
    cubin_sha256: str


@dataclass(frozen=True)
class TunedStats:
    """What was measured.

    Attributes:
        us: median device time of the whole pass, microseconds.
        default_us: the same of the config used without tuning.
        noise: relative spread of repeated timings.
        error: relative rms error against fp64.
        yardstick_error: that of the same-dtype PyTorch form.
        candidates: configs timed for this row.
        measured_on: title of the device, empty if never measured.
    """

    us: float
    default_us: float
    noise: float
    error: float
    yardstick_error: float
    candidates: int
    measured_on: str


@dataclass(frozen=True)
class TunedProvenance:
    """Where a row comes from, all as text. A file may hold rows of many studies.

    Attributes:
        code_path: arch of the code that was timed.
        driver: of the machine.
        torch: version there.
        glac: version that ran the study.
        commit: of the checkout, empty outside one.
        date: of the study.
    """

    code_path: str
    driver: str
    torch: str
    glac: str
    commit: str
    date: str


@dataclass(frozen=True)
class Evidence:
    """One config that failed on a device, and how."""

    config: str
    status: str
    reason: str


@dataclass(frozen=True)
class Denied:
    """A family of configs that must not be tried or used: their machine code failed its checks.

    Attributes:
        op: of the configs.
        spec: of the problem.
        match: for parts of a config, values of some of its fields; ``{"fwd": {"chunk": 64}}``.
        evidence: members that failed, a few of them.
        triton, ptxas, templates_sha256: what made that machine code; another toolchain or other
            templates make other code, and the entry then says nothing.
        measured_on: title of the device.
        date: of the study.
    """

    op: Op
    spec: Specialisation
    match: Mapping[str, Mapping[str, int | bool]]
    evidence: tuple[Evidence, ...]
    triton: str
    ptxas: str
    templates_sha256: str
    measured_on: str
    date: str

    @property
    def key(self) -> tuple[Op, Specialisation, str]:
        """What a file has one entry for."""
        parts = sorted((part, sorted(values.items())) for part, values in self.match.items())
        return self.op, self.spec, repr(parts)

    def applies(self, triton: str, ptxas: str, templates_sha256: str) -> bool:
        """Whether code of this toolchain and these templates is meant."""
        return (self.triton, self.ptxas, self.templates_sha256) == (
            triton,
            ptxas,
            templates_sha256,
        )

    def matches(self, spec: Specialisation, config: Config) -> bool:
        """Whether a config is of the family."""
        if config.op is not self.op or spec.in_pass(self.op) != self.spec.in_pass(self.op):
            return False
        parts = config.to_dict()
        return all(
            isinstance(parts.get(part), dict)
            and all(parts[part].get(name) == value for name, value in values.items())
            for part, values in self.match.items()
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op.value,
            "spec": self.spec.to_dict(),
            "match": {part: dict(values) for part, values in self.match.items()},
            "evidence": [asdict(item) for item in self.evidence],
            "triton": self.triton,
            "ptxas": self.ptxas,
            "templates_sha256": self.templates_sha256,
            "measured_on": self.measured_on,
            "date": self.date,
        }


@dataclass(frozen=True)
class TunedRow:
    """The best config found for one op of a problem, which then serves the problem's bucket.

    ``provenance`` is that of the file's header where it is ``None``; rows that differ in nothing
    else are equal.
    """

    problem: Problem
    config: Config
    stats: TunedStats
    kernels: tuple[TunedKernel, ...]
    provenance: TunedProvenance | None = field(default=None, compare=False)

    @property
    def op(self) -> Op:
        return self.config.op

    @property
    def spec(self) -> Specialisation:
        return self.problem.spec

    @property
    def bucket(self) -> Bucket:
        return self.problem.bucket

    @property
    def key(self) -> RowKey:
        """What a file has one row for."""
        return self.op, self.spec, self.bucket

    def to_dict(self) -> dict[str, Any]:
        """The row as the file holds it."""
        return {
            "op": self.op.value,
            "spec": self.spec.to_dict(),
            "shape": {"B": self.problem.B, "T": self.problem.T, "H": self.problem.H},
            "bucket": self.bucket.to_dict(),
            "config": self.config.to_dict(),
            "stats": asdict(self.stats),
            "kernels": [asdict(kernel) for kernel in self.kernels],
        }


@dataclass(frozen=True)
class TunedEnvironment:
    """Where a study ran, all as text. ``commit`` is empty outside a checkout.

    ``templates_sha256`` has the hash of the kernel sources for each op that has rows.
    """

    driver: str
    torch: str
    triton: str
    ptxas: str
    glac: str
    commit: str
    templates_sha256: Mapping[Op, str]
    date: str


@dataclass(frozen=True)
class TunedFile:
    """All rows of one GPU.

    Attributes:
        gpu: a key of ``glac.gpus.GPUS``.
        measured_on: title of the device the study ran on, empty if never measured.
        code_path: arch of the code that was timed, empty if never measured.
        environment: toolchain, driver, commit.
        rows: one for each op, specialisation and bucket.
        denied: configs that failed their checks.
    """

    gpu: str
    measured_on: str
    code_path: str
    environment: TunedEnvironment
    rows: tuple[TunedRow, ...]
    denied: tuple[Denied, ...] = ()

    @property
    def provenance(self) -> TunedProvenance:
        """Of rows that have none of their own."""
        e = self.environment
        return TunedProvenance(self.code_path, e.driver, e.torch, e.glac, e.commit, e.date)

    def row_provenance(self, row: TunedRow) -> TunedProvenance:
        """Where a row of this file comes from."""
        return row.provenance or self.provenance

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, rows in a stable order."""
        rows = _sorted(self.rows)
        hashes = self.environment.templates_sha256
        return {
            "schema": SCHEMA,
            "gpu": self.gpu,
            "measured_on": self.measured_on,
            "code_path": self.code_path,
            "environment": {
                **asdict(self.environment),
                "templates_sha256": {op.value: sha for op, sha in hashes.items()},
            },
            "rows": [
                {**row.to_dict(), "provenance": asdict(self.row_provenance(row))} for row in rows
            ],
            "denied": [
                item.to_dict() for item in sorted(self.denied, key=lambda d: (d.op.order, d.key))
            ],
        }


def _sorted(rows: Collection[TunedRow]) -> list[TunedRow]:
    return sorted(rows, key=lambda row: (row.op.order, row.spec, row.bucket))


# PyYAML may be built without libyaml.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _field(path: tuple[Key, ...]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.lstrip(".") or "file"


class _Document:
    """A parsed file: plain values, and the line of each."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.lines: Lines = {(): 1}
        if len(text) > _MAX_BYTES:
            raise self.fail((), f"is larger than {_MAX_BYTES} bytes")
        try:
            self._scan(text)
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
                self.data = None if node is None else self._plain(loader, node, ())
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise self._error(line, "not YAML", str(error.problem or error.context)) from None
        except yaml.YAMLError as error:
            # Characters YAML forbids; libyaml gives no line for them.
            raise self._error(1, "not YAML", str(error).splitlines()[0]) from None

    def _error(self, line: int, field: str, reason: str, hint: str = _HINT) -> ConfigError:
        return ConfigError(f"{self.where}:{line}: {field}: {reason}", hint=hint)

    def fail(self, path: tuple[Key, ...], reason: str, hint: str = _HINT) -> ConfigError:
        """An error about the value at ``path``, or about the nearest one around it."""
        known = path
        while known not in self.lines:
            known = known[:-1]
        return self._error(self.lines[known], _field(path), reason, hint)

    def _scan(self, text: str) -> None:
        """Refuse what composing cannot survive or a data file does not need."""
        depth = 0
        # Events come one by one; libyaml's composer recurses in C and would crash the process.
        for event in yaml.parse(text, Loader=_Loader):
            mark = event.start_mark
            line = mark.line + 1 if mark else 1
            if getattr(event, "anchor", None) is not None:
                raise self._error(line, "file", "anchors and aliases are not used here")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise self._error(line, "file", f"nested deeper than {_MAX_DEPTH}")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1

    def _plain(self, loader: Any, node: yaml.Node, path: tuple[Key, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if key_node.tag != "tag:yaml.org,2002:str":
                    raise self._error(line, _field(path), "keys must be plain text")
                key = str(key_node.value)
                inner = (*path, key)
                if key in mapping:
                    raise self._error(
                        line, _field(inner), f"is given twice, first on line {self.lines[inner]}"
                    )
                self.lines[inner] = line
                mapping[key] = self._plain(loader, value_node, inner)
            return mapping
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [
                self._plain(loader, child, (*path, index))
                for index, child in enumerate(node.value)
            ]
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(path, f"{node.tag} is not used here")
        try:
            return loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # such as a date of month 13
            raise self.fail(path, f"{node.value[:80]!r} is no valid value ({error})") from None

    # Typed access.

    def mapping(
        self, value: object, keys: tuple[str, ...], path: tuple[Key, ...], whole: bool = True
    ) -> Any:
        """A mapping with these keys: all of them, or if not ``whole`` some."""
        if not isinstance(value, dict):
            raise self.fail(path, f"wanted a mapping, got {_shown(value)}")
        for key in value:
            if key not in keys:
                raise self.fail(
                    (*path, key), "unknown key", hint=f"the keys are {', '.join(keys)}"
                )
        missing = [key for key in keys if key not in value]
        if missing and whole:
            raise self.fail(path, f"missing keys: {', '.join(missing)}")
        return value

    def items(self, value: object, path: tuple[Key, ...]) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(path, f"wanted a list, got {_shown(value)}")
        return value

    def text(self, value: object, path: tuple[Key, ...]) -> str:
        if not isinstance(value, str):
            raise self.fail(path, f"wanted a text, got {_shown(value)}", hint="put it in quotes")
        return value

    def integer(self, value: object, path: tuple[Key, ...], low: int = 0) -> int:
        if type(value) is not int or not low <= value <= _MAX_SIZE:
            raise self.fail(path, f"wanted an integer in {low}..{_MAX_SIZE}, got {_shown(value)}")
        return value

    def number(self, value: object, path: tuple[Key, ...]) -> float:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_SIZE:
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value) or value < 0:
            raise self.fail(path, f"wanted a number >= 0, got {_shown(value)}")
        return value


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more digits than Python prints
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _kernel(doc: _Document, value: object, path: tuple[Key, ...]) -> TunedKernel:
    data = doc.mapping(value, _names(TunedKernel), path)
    sha = doc.text(data["cubin_sha256"], (*path, "cubin_sha256"))
    if not _HEX64.fullmatch(sha):
        raise doc.fail((*path, "cubin_sha256"), f"wanted 64 hex digits, got {_shown(sha)}")
    return TunedKernel(
        name=doc.text(data["name"], (*path, "name")),
        registers=doc.integer(data["registers"], (*path, "registers")),
        spill_bytes=doc.integer(data["spill_bytes"], (*path, "spill_bytes")),
        shared=doc.integer(data["shared"], (*path, "shared")),
        cubin_sha256=sha,
    )


def _stats(doc: _Document, value: object, path: tuple[Key, ...]) -> TunedStats:
    data = doc.mapping(value, _names(TunedStats), path)

    def number(key: str) -> float:
        return doc.number(data[key], (*path, key))

    return TunedStats(
        us=number("us"),
        default_us=number("default_us"),
        noise=number("noise"),
        error=number("error"),
        yardstick_error=number("yardstick_error"),
        candidates=doc.integer(data["candidates"], (*path, "candidates")),
        measured_on=doc.text(data["measured_on"], (*path, "measured_on")),
    )


def _op(doc: _Document, value: object, path: tuple[Key, ...]) -> Op:
    ops = [op.value for op in Op]
    if value not in ops:
        raise doc.fail((*path, "op"), f"wanted {' or '.join(ops)}, got {_shown(value)}")
    return Op(value)


def _parsed(
    doc: _Document,
    parse: Callable[[Any, str], Any],
    data: Any,
    path: tuple[Key, ...],
    key: str,
) -> Any:
    try:
        return parse(data[key], key)
    except ConfigError as error:
        # The message begins with what it is about: `config.fwd: chunk must be ...`.
        about, _, reason = error.message.partition(": ")
        inner = (*path, *about.split("."))
        raise doc.fail(inner, reason or error.message, error.hint or _HINT) from None


def _texts(doc: _Document, data: Any, names: Collection[str], path: tuple[Key, ...]) -> Any:
    return {name: doc.text(data[name], (*path, name)) for name in names}


def _denied(doc: _Document, value: object, path: tuple[Key, ...]) -> Denied:
    data = doc.mapping(value, _names(Denied), path)
    op = _op(doc, data["op"], path)
    spec: Specialisation = _parsed(doc, Specialisation.from_dict, data, path, "spec")
    parts = dict.fromkeys(part for kind in CONFIGS[op] for part in kind.PARTS.values())
    match: dict[str, dict[str, int | bool]] = {}
    where = (*path, "match")
    for part, fields_ in doc.mapping(data["match"], tuple(parts), where, whole=False).items():
        if not isinstance(fields_, dict) or not fields_:
            raise doc.fail((*where, part), f"wanted fields and values, got {_shown(fields_)}")
        for name, chosen in fields_.items():
            if not isinstance(chosen, (bool, int)):
                raise doc.fail(
                    (*where, part, name), f"wanted a number or truth value, got {_shown(chosen)}"
                )
        match[part] = dict(fields_)
    if not match:
        raise doc.fail(where, "wanted at least one part: nothing would deny every config")
    evidence = []
    for index, item in enumerate(doc.items(data["evidence"], (*path, "evidence"))):
        inner = (*path, "evidence", index)
        fields_ = doc.mapping(item, _names(Evidence), inner)
        evidence.append(Evidence(**_texts(doc, fields_, _names(Evidence), inner)))
    if not evidence:
        raise doc.fail((*path, "evidence"), "wanted at least one config that failed, got none")
    names = ("triton", "ptxas", "templates_sha256", "measured_on", "date")
    return Denied(op, spec, match, tuple(evidence), **_texts(doc, data, names, path))


def _row(
    doc: _Document, value: object, path: tuple[Key, ...], gpu_name: str, schema: int
) -> TunedRow:
    keys: tuple[str, ...] = ("op", "spec", "shape", "bucket", "config", "stats", "kernels")
    if schema >= 3:
        keys = (*keys, "provenance")
    data = doc.mapping(value, keys, path)
    gpu = GPUS[gpu_name]
    op = _op(doc, data["op"], path)
    spec: Specialisation = _parsed(doc, Specialisation.from_dict, data, path, "spec")
    bucket: Bucket = _parsed(doc, Bucket.from_dict, data, path, "bucket")
    config: Config = _parsed(doc, functools.partial(config_from_dict, op), data, path, "config")
    shape = doc.mapping(data["shape"], ("B", "T", "H"), (*path, "shape"))
    problem = Problem(
        spec, **{key: doc.integer(shape[key], (*path, "shape", key), low=1) for key in shape}
    )
    if bucket != problem.bucket:
        raise doc.fail(
            (*path, "bucket"),
            f"wanted {problem.bucket.to_dict()}, which follows from the shape, "
            f"got {bucket.to_dict()}",
        )
    reason = why_illegal(spec, config, gpu)
    if reason:
        raise doc.fail((*path, "config"), f"illegal on {gpu.name}: {reason}")
    listed = doc.items(data["kernels"], (*path, "kernels"))
    kernels = tuple(
        _kernel(doc, item, (*path, "kernels", index)) for index, item in enumerate(listed)
    )
    wanted = [kernel.name for kernel in config_kernels(spec, config, gpu.arch)]
    got = [kernel.name for kernel in kernels]
    if got != wanted:
        raise doc.fail(
            (*path, "kernels"),
            f"spec and config ask for {', '.join(wanted)}; got {', '.join(got) or 'none'}",
        )
    stats = _stats(doc, data["stats"], (*path, "stats"))
    provenance = None
    if schema >= 3:
        names, inner = _names(TunedProvenance), (*path, "provenance")
        fields_ = doc.mapping(data["provenance"], names, inner)
        provenance = TunedProvenance(**_texts(doc, fields_, names, inner))
        if provenance.code_path not in ("", *ARCHS):
            raise doc.fail(
                (*inner, "code_path"),
                f"wanted one of {', '.join(ARCHS)}, got {provenance.code_path!r}",
            )
    return TunedRow(problem, config, stats, kernels, provenance)


def _environment(doc: _Document, value: object, ops: Collection[Op]) -> TunedEnvironment:
    names = _names(TunedEnvironment)
    data = doc.mapping(value, names, ("environment",))
    path: tuple[Key, ...] = ("environment", "templates_sha256")
    with_rows = sorted(ops, key=lambda op: op.order)
    hashes = doc.mapping(data["templates_sha256"], tuple(op.value for op in with_rows), path)
    texts = {
        name: doc.text(data[name], ("environment", name))
        for name in names
        if name != "templates_sha256"
    }
    return TunedEnvironment(
        **texts,
        templates_sha256={op: doc.text(hashes[op], (*path, op.value)) for op in with_rows},
    )


def parse_tuned(text: str, where: str) -> TunedFile:
    """Read and check the text of a tuned file.

    Args:
        text: YAML.
        where: file name for messages.

    Raises:
        ConfigError: ``where:line: field: reason``, with a hint.
    """
    doc = _Document(text, where)
    head = doc.data if isinstance(doc.data, Mapping) else {}
    schema = head.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise doc.fail(
            ("schema",),
            f"version {_shown(schema)} is newer than this glac reads ({SCHEMA})",
            hint="upgrade glac",
        )
    if type(schema) is int and schema < OLDEST_SCHEMA:
        raise doc.fail(
            ("schema",),
            f"version {_shown(schema)} is older than this glac reads ({OLDEST_SCHEMA})",
            hint="move the file away and run `glac tune` again",
        )
    keys = ("schema", *_names(TunedFile))
    if schema == 2:
        keys = tuple(key for key in keys if key != "denied")
    data = doc.mapping(doc.data, keys, ())
    if type(schema) is not int:
        raise doc.fail(("schema",), f"wanted {SCHEMA}, got {_shown(schema)}")
    gpu = doc.text(data["gpu"], ("gpu",))
    if gpu not in GPUS:
        raise doc.fail(
            ("gpu",), f"unknown GPU {_shown(gpu)}", hint=f"known GPUs are {', '.join(GPUS)}"
        )
    code_path = doc.text(data["code_path"], ("code_path",))
    if code_path and code_path not in ARCHS:
        raise doc.fail(("code_path",), f"wanted one of {', '.join(ARCHS)}, got {code_path!r}")
    rows: list[TunedRow] = []
    first: dict[RowKey, int] = {}
    for index, item in enumerate(doc.items(data["rows"], ("rows",))):
        row = _row(doc, item, ("rows", index), gpu, schema)
        other = first.setdefault(row.key, index)
        if other != index:
            raise doc.fail(
                ("rows", index),
                f"same op, spec and bucket as rows[{other}] on line {doc.lines['rows', other]}",
            )
        rows.append(row)
    environment = _environment(doc, data["environment"], {row.op for row in rows})
    denied = []
    for index, item in enumerate(doc.items(data.get("denied", []), ("denied",))):
        entry = _denied(doc, item, ("denied", index))
        denied.append(entry)
        for number, row in enumerate(rows):
            sha = environment.templates_sha256[row.op]
            same = entry.applies(environment.triton, environment.ptxas, sha)
            if same and entry.matches(row.spec, row.config):
                raise doc.fail(
                    ("rows", number, "config"),
                    f"is denied by denied[{index}] on line {doc.lines['denied', index]}",
                )
    file = TunedFile(
        gpu=gpu,
        measured_on=doc.text(data["measured_on"], ("measured_on",)),
        code_path=code_path,
        environment=environment,
        rows=tuple(rows),
        denied=tuple(denied),
    )
    # Rows of an older schema come from the study that the header describes.
    return replace(
        file, rows=tuple(replace(row, provenance=file.row_provenance(row)) for row in rows)
    )


def load_tuned(path: Path | str) -> TunedFile:
    """Read and check a tuned file.

    Raises:
        ConfigError: the file cannot be read, or ``file:line: field: reason``.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: file: not UTF-8 ({error})", hint=_HINT) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error})",
            hint="`glac tune --gpu NAME` writes tuned files",
        ) from None
    return parse_tuned(text, str(path))


def tuned_text(file: TunedFile) -> str:
    """``file`` as YAML: one line for a config, a shape, a kernel."""
    body: str = yaml.dump(
        file.to_dict(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=99
    )
    return _HEADER + body


def dump_tuned(file: TunedFile, path: Path | str) -> None:
    """Write ``file`` to ``path``, all of it or nothing; folders are made.

    Raises:
        ConfigError: the content breaks a rule that ``load_tuned`` checks, or ``path`` cannot be
            written; nothing was written.
    """
    text = tuned_text(file)
    parse_tuned(text, str(path))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None


def _kept(old: TunedFile, new: TunedFile) -> list[TunedRow]:
    """Rows of ``old`` that ``new`` has none for."""
    taken = {row.key for row in new.rows}
    return [row for row in old.rows if row.key not in taken]


def merge_tuned(old: TunedFile, new: TunedFile) -> tuple[TunedFile, int, int]:
    """``new`` plus the rows of ``old`` for other ops, specialisations and buckets.

    The header is that of ``new``; ``header_conflicts`` says what it gets wrong.

    Returns:
        The merged file, the number of rows of ``old`` that were kept and that were replaced.

    Raises:
        ConfigError: the files are for different GPUs.
    """
    if old.gpu != new.gpu:
        raise ConfigError(
            f"rows for {old.gpu} cannot join rows for {new.gpu}", hint="one file is for one GPU"
        )
    kept = [
        # A row that names no device means the one in the header, which may be another now.
        replace(
            row,
            stats=replace(row.stats, measured_on=row.stats.measured_on or old.measured_on),
            provenance=old.row_provenance(row),
        )
        for row in _kept(old, new)
    ]
    hashes = {row.op: old.environment.templates_sha256[row.op] for row in kept}
    hashes.update(new.environment.templates_sha256)
    environment = replace(new.environment, templates_sha256=hashes)
    merged = replace(
        new, environment=environment, rows=(*new.rows, *kept), denied=_merge_denied(old, new)
    )
    return merged, len(kept), len(old.rows) - len(kept)


def _merge_denied(old: TunedFile, new: TunedFile) -> tuple[Denied, ...]:
    """Entries of both; those of ``old`` only where the newer toolchain makes the same code."""
    known = {entry.key for entry in new.denied}
    tools = new.environment
    kept = [
        entry
        for entry in old.denied
        if entry.key not in known
        and entry.applies(
            tools.triton,
            tools.ptxas,
            tools.templates_sha256.get(entry.op, entry.templates_sha256),
        )
    ]
    return (*new.denied, *kept)


def header_conflicts(old: TunedFile, new: TunedFile) -> list[str]:
    """What ``merge_tuned(old, new)`` would say wrongly of the rows that it keeps of ``old``.

    A file has one header, whose toolchain and templates certify every row. The build takes other
    machine code than the certified one for an error if they match, so they must be true.
    """
    kept = _kept(old, new)
    if not kept:
        return []
    then, now = old.environment, new.environment
    facts = [
        ("triton", then.triton, now.triton),
        ("ptxas", then.ptxas, now.ptxas),
        ("code path", old.code_path, new.code_path),
    ]
    for op in sorted({row.op for row in kept}, key=lambda op: op.order):
        sha = then.templates_sha256[op]
        other = now.templates_sha256.get(op, sha)
        facts.append((f"{op.value} templates", sha, other))
    if not all(row.stats.measured_on for row in kept) and not old.measured_on:
        facts.append(("measured on", "", new.measured_on))
    certified = {kernel.name: kernel.cubin_sha256 for row in new.rows for kernel in row.kernels}
    for name, sha in {k.name: k.cubin_sha256 for row in kept for k in row.kernels}.items():
        facts.append((f"SHA-256 of {name}", sha, certified.get(name, sha)))
    return [f"{what} {_short(a)} against {_short(b)}" for what, a, b in facts if a != b]


def _short(value: str) -> str:
    """A hash by its first digits, as text is shown to people; nothing as a word."""
    return value[:12] if _HEX64.fullmatch(value) else value or "unknown"


@dataclass(frozen=True)
class RowChange:
    """Two rows for one op, specialisation and bucket that are not the same.

    Attributes:
        old: the row of the first file.
        new: that of the second.
        fields: what differs: ``shape``, ``config``, ``kernels``, or the name of a measurement.
    """

    old: TunedRow
    new: TunedRow
    fields: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """New time by old time; ``None`` if the old row has no time."""
        return self.new.stats.us / self.old.stats.us if self.old.stats.us else None


@dataclass(frozen=True)
class TunedDiff:
    """How two tuned files differ; false if they do not.

    Attributes:
        header: old and new value of each field of the header that differs.
        removed: rows of the first file that the second has none for.
        added: rows of the second file that the first has none for.
        changed: rows of both that are not the same.
        same: how many rows are.
    """

    header: Mapping[str, tuple[str, str]]
    removed: tuple[TunedRow, ...]
    added: tuple[TunedRow, ...]
    changed: tuple[RowChange, ...]
    same: int

    def __bool__(self) -> bool:
        return bool(self.header or self.removed or self.added or self.changed)

    def to_dict(self) -> dict[str, Any]:
        def row(item: TunedRow) -> dict[str, Any]:
            return {**item.to_dict(), "config_id": item.config.slug}

        return {
            "header": {key: {"old": a, "new": b} for key, (a, b) in self.header.items()},
            "removed": [row(item) for item in self.removed],
            "added": [row(item) for item in self.added],
            "changed": [
                {
                    "fields": list(change.fields),
                    "ratio": change.ratio,
                    "old": row(change.old),
                    "new": row(change.new),
                }
                for change in self.changed
            ],
            "same": self.same,
        }


def _header(file: TunedFile) -> dict[str, str]:
    """Everything but the rows, flat."""
    environment = {
        field: getattr(file.environment, field)
        for field in _names(TunedEnvironment)
        if field != "templates_sha256"
    }
    hashes = file.environment.templates_sha256
    return {
        "gpu": file.gpu,
        "measured_on": file.measured_on,
        "code_path": file.code_path,
        **environment,
        **{f"templates_sha256.{op.value}": sha for op, sha in hashes.items()},
    }


def _changes(old: TunedRow, new: TunedRow) -> tuple[str, ...]:
    then, now = old.to_dict(), new.to_dict()
    fields = [name for name in ("shape", "config", "kernels") if then[name] != now[name]]
    stats = [name for name in then["stats"] if then["stats"][name] != now["stats"][name]]
    return (*fields, *stats)


def diff_tuned(old: TunedFile, new: TunedFile) -> TunedDiff:
    """Compare two tuned files field by field; the order of their rows does not count."""
    before, after = _header(old), _header(new)
    pairs = {key: (before.get(key, ""), after.get(key, "")) for key in {**before, **after}}
    theirs = {row.key: row for row in new.rows}
    ours = {row.key for row in old.rows}
    both = [(row, theirs[row.key]) for row in _sorted(old.rows) if row.key in theirs]
    changed = [RowChange(a, b, _changes(a, b)) for a, b in both if a != b]
    return TunedDiff(
        header={key: (a, b) for key, (a, b) in pairs.items() if a != b},
        removed=tuple(_sorted(_kept(old, new))),
        added=tuple(row for row in _sorted(new.rows) if row.key not in ours),
        changed=tuple(changed),
        same=len(both) - len(changed),
    )


def user_files(gpu_name: str, folders: Collection[Path] | None = None) -> list[TunedFile]:
    """The user's own tuned files for a GPU, in the order in which they count.

    Args:
        gpu_name: of the GPU.
        folders: with files such as ``h100.yaml``; those of ``GLAC_CONFIG_PATH`` if None.

    Raises:
        ConfigError: the GPU is unknown, or a file is broken or for another GPU.
    """
    from glac.settings import load_settings

    name = gpu_by_name(gpu_name).name
    found = []
    for folder in load_settings().config_path if folders is None else folders:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            continue
        file = load_tuned(path)
        if file.gpu != name:
            raise ConfigError(
                f"{path}: gpu: wanted {name}, got {file.gpu}", hint="rename the file"
            )
        found.append(file)
    return found


def available(gpu_name: str) -> list[TunedFile]:
    """Tuned files for a GPU: the user's own, then the one that came with glac.

    A row of an earlier file hides rows of later ones for the same op, specialisation and bucket.

    Raises:
        ConfigError: the GPU is unknown, or a file is broken.
    """
    file = shipped(gpu_name)
    return [*user_files(gpu_name), *([file] if file is not None else [])]


def effective_rows(files: Collection[TunedFile]) -> list[tuple[TunedFile, TunedRow]]:
    """The rows that count, each with its file: of several for one key the first file's."""
    chosen: dict[RowKey, tuple[TunedFile, TunedRow]] = {}
    for file in files:
        for row in file.rows:
            chosen.setdefault(row.key, (file, row))
    return list(chosen.values())


@functools.cache
def shipped(gpu_name: str) -> TunedFile | None:
    """The tuned file that came with glac for a GPU, or ``None`` if there is none.

    Raises:
        ConfigError: the GPU is unknown, or the file is broken.
    """
    name = gpu_by_name(gpu_name).name
    resource = importlib.resources.files("glac.tuned_configs") / f"{name}.yaml"
    if not resource.is_file():
        return None
    where = f"tuned_configs/{name}.yaml"
    file = parse_tuned(resource.read_text(encoding="utf-8"), where)
    if file.gpu != name:
        raise ConfigError(f"{where}: gpu: wanted {name}, got {file.gpu}", hint=_HINT)
    return file


def shipped_names() -> list[str]:
    """GPUs that a tuned file came for, in alphabetical order."""
    names = [
        item.name.removesuffix(".yaml")
        for item in importlib.resources.files("glac.tuned_configs").iterdir()
        if item.name.endswith(".yaml")
    ]
    return sorted(name for name in names if name in GPUS)
