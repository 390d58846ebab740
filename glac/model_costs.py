"""What a whole GLA model needs on a GPU: parameters, memory, and time bounds.

A layer is that of the GLA transformer (arXiv 2312.06635): projections to queries, keys and values,
a low-rank forget gate, an output gate, a norm per head, the output projection, and a SwiGLU
feed-forward block, each half behind a norm. Counts follow from that and from what glac's
operation saves (its inputs). Every bound is of the form max(bytes / copy bandwidth, FLOPs /
matrix rate), added up over parts that cannot overlap; a real step takes longer.

Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from glac.configs import BackwardConfig, ChunksBackwardConfig
from glac.errors import ConfigError
from glac.gpus import GpuSpec
from glac.lowrank_backward import gate_bytes
from glac.problem import DType, Gate, Op, Problem, Specialisation
from glac.roofline import (
    Chart,
    ChartPoint,
    Roofline,
    chosen_config,
    kept_states_bytes,
    roofline,
    useful_flops,
)

LENGTHS = (1024, 4096, 16384, 65536, 131072)
"""Context lengths at which decoding is compared with softmax attention."""

_WORD = DType.BF16.itemsize  # weights, activations and gradients are bf16
_SINGLE = DType.FP32.itemsize
_LARGEST = 2**31
_ADAM_BYTES = 3 * _SINGLE  # master weight and two moments of each parameter


@dataclass(frozen=True)
class ModelConfig:
    """A GLA model and how it is run.

    Attributes:
        layers: of the model.
        hidden: width of the residual stream.
        heads: of each layer.
        expand_k: all heads' key channels over ``hidden``.
        expand_v: all heads' value channels over ``hidden``.
        ffn: inner width of the feed-forward block; 0 takes 8/3 hidden, rounded up to 256.
        vocab: tokens that the embedding knows.
        gate_rank: of the low-rank forget gate.
        tied: whether embedding and output head are one matrix.
        tokens: of one sequence in training.
        batch: sequences of one training step on this GPU.
        sequences: that are decoded together.
        checkpoint: whether training keeps only the input of each layer and runs it again.
    """

    layers: int
    hidden: int
    heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    ffn: int = 0
    vocab: int = 32000
    gate_rank: int = 16
    tied: bool = False
    tokens: int = 2048
    batch: int = 8
    sequences: int = 32
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, str(field.type), getattr(self, field.name))
        for name in ("expand_k", "expand_v"):
            width = getattr(self, name) * self.hidden / self.heads
            if width != int(width) or width < 1:
                raise ConfigError(
                    f"{name} * hidden / heads must be a whole number of channels, got {width:g}"
                )

    @staticmethod
    def _check(name: str, kind: str, value: Any) -> None:
        if kind == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, got {value!r}")
        elif kind == "float":
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
            if not 0 < value <= _LARGEST:
                raise ConfigError(f"{name} must be above 0 and at most 2^31, got {value!r}")
        else:
            low = 0 if name == "ffn" else 1
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
            if not low <= value <= _LARGEST:
                raise ConfigError(f"{name} must be in {low}..2^31, got {value}")

    @property
    def K(self) -> int:
        """Key channels of a head."""
        return int(self.expand_k * self.hidden / self.heads)

    @property
    def V(self) -> int:
        """Value channels of a head."""
        return int(self.expand_v * self.hidden / self.heads)

    @property
    def inner(self) -> int:
        """Width of the feed-forward block."""
        return self.ffn or 256 * math.ceil(8 * self.hidden / 3 / 256)

    def problem(self) -> Problem:
        """What one layer asks of glac in training.

        Raises:
            ConfigError: heads of a size that no kernel serves.
        """
        spec = Specialisation(
            self.K, self.V, DType.BF16, Gate.LOWRANK, DType.BF16, rank=self.gate_rank
        )
        return Problem(spec, self.batch, self.tokens, self.heads)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


PRESETS: dict[str, ModelConfig] = {
    "gla-340m": ModelConfig(layers=24, hidden=1024, heads=4),
    "gla-1.3b": ModelConfig(layers=24, hidden=2048, heads=4),
}
"""The two sizes of the paper, untied, with its vocabulary of 32000."""


# ---- from text ----


def _value(name: str, text: str) -> Any:
    """A value of a config as it is typed; what it should be is checked by the config."""
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(lowered)
        except ValueError:
            continue
    raise ConfigError(f"{name} must be a number, true or false, got {text!r}")


def _known(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = [field.name for field in fields(ModelConfig)]
    unknown = sorted(set(map(str, data)) - set(names))
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}", hint=f"the keys are {names}")
    return dict(data)


def _from_file(path: Path) -> dict[str, Any]:
    import yaml  # a JSON file is YAML too

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error})",
            hint=f"give a file, key=value pairs, or one of {', '.join(PRESETS)}",
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: neither YAML nor JSON ({reason})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: wanted a mapping, got {type(data).__name__}")
    return _known(data, str(path))


def parse_model(text: str) -> ModelConfig:
    """A model from what is typed after ``--model``.

    That is a preset's name, a YAML or JSON file, or pairs such as ``layers=24,hidden=2048``. Pairs
    may follow a preset or a file and then change it.

    Raises:
        ConfigError: an unknown preset or key, an unreadable file, a value that cannot be.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    values: dict[str, Any] = {}
    if "=" in first:
        rest = [first, *rest]
    elif first.lower() in PRESETS:
        values = PRESETS[first.lower()].to_dict()
    else:
        values = _from_file(Path(first))
    for part in rest:
        name, found, value = part.partition("=")
        if not found:
            raise ConfigError(
                f"--model: {part!r} is no key=value pair",
                hint="for example gla-1.3b,tokens=8192,batch=4",
            )
        values.update(_known({name.strip(): _value(name.strip(), value)}, "--model"))
    missing = [name for name in ("layers", "hidden", "heads") if name not in values]
    if missing:
        raise ConfigError(
            f"--model: missing {', '.join(missing)}",
            hint=f"give them, or start from one of {', '.join(PRESETS)}",
        )
    return ModelConfig(**values)


# ---- counts ----


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by what they belong to, all layers together."""
    d, rank = model.hidden, model.gate_rank
    keys, values = model.heads * model.K, model.heads * model.V
    layer = {
        "queries, keys, values": d * (2 * keys + values),
        "forget gate": d * rank + rank * keys + keys,
        "output gate and projection": 2 * d * values,
        "feed-forward": 3 * d * model.inner,
        "norms": 2 * d + model.V,
    }
    counts = {name: model.layers * count for name, count in layer.items()}
    counts["norms"] += d
    counts["embedding"] = model.vocab * d
    counts["head"] = 0 if model.tied else model.vocab * d
    return counts


def activation_bytes(model: ModelConfig) -> dict[str, int]:
    """What one layer keeps of the forward pass for the backward pass, in bf16.

    The operation keeps its inputs and nothing else: no cumulative gates, scores or states.
    """
    tokens = model.batch * model.tokens
    keys, values = model.heads * model.K, model.heads * model.V
    channels = {
        "inputs of norms": 2 * model.hidden,
        "inputs of projections": 2 * model.hidden,
        "queries, keys, values, gate": 2 * keys + values + model.gate_rank,
        "output, its gate, their product": 3 * values,
        "feed-forward": 3 * model.inner,
    }
    return {name: count * tokens * _WORD for name, count in channels.items()}


@dataclass(frozen=True)
class Part:
    """A part of a step, and its bound.

    Attributes:
        name: what it is.
        flops: of matrix products.
        bytes: that must move.
        gpu: where.
    """

    name: str
    flops: int
    bytes: int
    gpu: GpuSpec

    @property
    def memory_us(self) -> float:
        return self.bytes / self.gpu.copy_bandwidth * 1e6

    @property
    def compute_us(self) -> float:
        return self.flops / self.gpu.matrix_rate * 1e6

    @property
    def us(self) -> float:
        return max(self.memory_us, self.compute_us)

    @property
    def bound_by(self) -> str:
        return "memory" if self.memory_us >= self.compute_us else "compute"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "flops": self.flops,
            "bytes": self.bytes,
            "memory_us": self.memory_us,
            "compute_us": self.compute_us,
            "us": self.us,
            "bound_by": self.bound_by,
        }


def _linear(tokens: int, inputs: int, outputs: int) -> tuple[int, int]:
    """FLOPs and bytes of one of the three products of a linear layer: forward, dx, dweight."""
    flops = 2 * tokens * inputs * outputs
    return flops, _WORD * (tokens * (inputs + outputs) + inputs * outputs)


def training_parts(model: ModelConfig, gpu: GpuSpec) -> tuple[Part, ...]:
    """The parts of one training step on one GPU.

    Projections of one input count as one product. Norms, gates and residuals are taken as fused
    with each other: each tensor is read or written once for each pass.
    """
    d, n, L = model.hidden, model.batch * model.tokens, model.layers
    keys, values, inner = model.heads * model.K, model.heads * model.V, model.inner
    runs = 4 if model.checkpoint else 3  # products of a linear layer
    problem = model.problem()
    forward, backward = (
        (useful_flops(problem, op), problem.bytes(op)) for op in (Op.FORWARD, Op.BACKWARD)
    )
    again = 2 if model.checkpoint else 1

    def linear(*shapes: tuple[int, int]) -> tuple[int, int]:
        found = [_linear(n, *shape) for shape in shapes]
        return sum(f for f, _ in found), sum(b for _, b in found)

    mixing = linear((d, 2 * keys + 2 * values + model.gate_rank), (values, d))
    block = linear((d, 2 * inner), (inner, d))
    head = linear((d, model.vocab))
    # Norm with residual: two in, two out, twice a layer. Gated norm, SwiGLU: two in, one out.
    light = n * (8 * d + 3 * values + 3 * inner)
    light_backward = n * (8 * d + 5 * values + 5 * inner)
    counts = parameters(model)
    return tuple(
        Part(name, flops, moved, gpu)
        for name, flops, moved in (
            ("projections", L * runs * mixing[0], L * runs * mixing[1]),
            (
                "gated linear attention",
                L * (again * forward[0] + backward[0]),
                L * (again * forward[1] + backward[1]),
            ),
            ("feed-forward", L * runs * block[0], L * runs * block[1]),
            ("norms, gates, residuals", 0, L * _WORD * (again * light + light_backward)),
            # The loss reads the logits and writes their gradient; tokens are looked up and
            # their gradients added.
            (
                "embedding, head, loss",
                3 * head[0],
                3 * head[1] + _WORD * n * (2 * model.vocab + 4 * d),
            ),
            # Reads gradient, master weight and moments; writes these and the weight.
            ("optimizer", 0, sum(counts.values()) * (2 * _WORD + 2 * _ADAM_BYTES)),
        )
    )


# ---- decoding ----


@dataclass(frozen=True)
class DecodeStep:
    """One token for each of several sequences.

    Attributes:
        mixer: ``gla``, or ``attention`` for softmax attention in a model of the same size.
        length: tokens before; 0 for GLA, to which they do not matter.
        sequences: that are decoded together.
        kept_bytes: state or cache of one sequence.
        bytes: that the step moves: weights once, and each sequence's state or cache.
        flops: of the step.
        gpu: where.
    """

    mixer: str
    length: int
    sequences: int
    kept_bytes: int
    bytes: int
    flops: int
    gpu: GpuSpec

    @property
    def us(self) -> float:
        part = Part(self.mixer, self.flops, self.bytes, self.gpu)
        return part.us

    @property
    def tokens_per_second(self) -> float:
        return self.sequences / self.us * 1e6

    def to_dict(self) -> dict[str, Any]:
        data = {key: value for key, value in vars(self).items() if key != "gpu"}
        return {
            **data,
            "bytes_per_token": self.bytes / self.sequences,
            "us": self.us,
            "tokens_per_second": self.tokens_per_second,
        }


def state_bytes(model: ModelConfig) -> int:
    """States of one sequence in all layers, in fp32."""
    return model.layers * replace(model.problem(), B=1).state_bytes


def cache_bytes_per_token(model: ModelConfig) -> int:
    """Keys and values that softmax attention of the same width keeps of one token, in bf16."""
    return 2 * model.layers * model.hidden * _WORD


def decode_steps(
    model: ModelConfig, gpu: GpuSpec, lengths: Sequence[int] = LENGTHS
) -> tuple[DecodeStep, ...]:
    """A step of GLA, and one of softmax attention after each of ``lengths`` tokens.

    Activations are left out: beside weights and states they are small.

    Raises:
        ConfigError: a length below 1.
    """
    if any(length < 1 for length in lengths):
        raise ConfigError(f"a length must be at least 1, got {min(lengths)}")
    n = model.sequences
    counts = parameters(model)
    # The embedding is looked up; tied, it is the head's matrix too.
    used = sum(counts.values()) - (0 if model.tied else counts["embedding"])
    weights = used * _WORD + n * model.hidden * _WORD
    state, cached = state_bytes(model), cache_bytes_per_token(model)
    # Read and written: decayed, updated by a product of key and value, read out by the query.
    elements = state // _SINGLE
    steps = [
        DecodeStep("gla", 0, n, state, weights + 2 * n * state, n * (2 * used + 4 * elements), gpu)
    ]
    for length in lengths:
        flops = n * (2 * used + 4 * model.layers * model.hidden * length)
        moved = weights + n * (length + 1) * cached
        steps.append(DecodeStep("attention", length, n, length * cached, moved, flops, gpu))
    return tuple(steps)


# ---- together ----


@dataclass(frozen=True)
class ModelCosts:
    """What a model needs on a GPU.

    Attributes:
        model: what.
        gpu: where.
        parameters: by what they belong to.
        memory: bytes of a training step, by what takes them.
        state: bytes of one sequence's states in decoding.
        training: parts of a step.
        decoding: a step of GLA, then of softmax attention at several lengths.
        layer: costs of glac's operation in one layer, forward and backward, with its kernels.
    """

    model: ModelConfig
    gpu: GpuSpec
    parameters: Mapping[str, int]
    memory: Mapping[str, int]
    state: int
    training: tuple[Part, ...]
    decoding: tuple[DecodeStep, ...]
    layer: Roofline

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def training_us(self) -> float:
        """Of a step at least."""
        return sum(part.us for part in self.training)

    @property
    def tokens_per_second(self) -> float:
        """In training at most."""
        return self.model.batch * self.model.tokens / self.training_us * 1e6

    @property
    def equal_length(self) -> float:
        """Tokens whose softmax cache is as large as GLA's states."""
        return self.state / cache_bytes_per_token(self.model)

    def to_dict(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "model": {
                **self.model.to_dict(),
                "ffn": self.model.inner,
                "K": self.model.K,
                "V": self.model.V,
            },
            "parameters": {**self.parameters, "total": self.parameter_count},
            "memory_bytes": {**self.memory, "total": self.memory_bytes},
            "training": {
                "parts": [part.to_dict() for part in self.training],
                "us": self.training_us,
                "tokens_per_second": self.tokens_per_second,
            },
            "decoding": {
                "state_bytes": self.state,
                "cache_bytes_per_token": cache_bytes_per_token(self.model),
                "equal_length": self.equal_length,
                "steps": [step.to_dict() for step in self.decoding],
            },
            "layer": self.layer.to_dict(),
        }


def model_costs(model: ModelConfig, gpu: GpuSpec, lengths: Sequence[int] = LENGTHS) -> ModelCosts:
    """Parameters, memory and time bounds of a model on one GPU.

    Args:
        model: what.
        gpu: where.
        lengths: contexts at which softmax attention is compared.

    Raises:
        ConfigError: heads of a size that no kernel serves, or a length below 1.
    """
    problem = model.problem()
    counts = parameters(model)
    total = sum(counts.values())
    tokens = model.batch * model.tokens
    layer = activation_bytes(model)
    kept = model.layers * (tokens * model.hidden * _WORD) if model.checkpoint else 0
    backward = chosen_config(problem, gpu, Op.BACKWARD)
    kinds = BackwardConfig | ChunksBackwardConfig
    states = kept_states_bytes(problem, backward) if isinstance(backward, kinds) else 0
    memory = {
        "weights": total * _WORD,
        "gradients": total * _WORD,
        "optimizer": total * _ADAM_BYTES,
        **(
            {"activations, inputs of layers": kept, "activations, one layer": sum(layer.values())}
            if model.checkpoint
            else {f"activations, {name}": model.layers * count for name, count in layer.items()}
        ),
        # The last norm's input and output; logits and their gradient.
        "activations, head": _WORD * tokens * (2 * model.hidden + 2 * model.vocab),
        "chunk states, one layer": states,
        "gate and its gradient, one layer": gate_bytes(problem),
    }
    return ModelCosts(
        model=model,
        gpu=gpu,
        parameters=counts,
        memory=memory,
        state=state_bytes(model),
        training=training_parts(model, gpu),
        decoding=decode_steps(model, gpu, lengths),
        layer=roofline(problem, gpu, "training"),
    )


def chart(costs: ModelCosts) -> Chart:
    """The roofline chart of a model's parts: how far each is from being bound by the other."""
    gpu, model = costs.gpu, costs.model

    def point(label: str, flops: int, moved: int) -> ChartPoint:
        intensity = flops / moved
        return ChartPoint(label, intensity, min(gpu.matrix_rate, intensity * gpu.copy_bandwidth))

    points = [
        point(f"training: {part.name}", part.flops, part.bytes)
        for part in costs.training
        if part.flops
    ]
    points += [
        point(
            f"decoding {step.sequences} sequences: {step.mixer}"
            + (f" after {step.length}" if step.length else ""),
            step.flops,
            step.bytes,
        )
        for step in costs.decoding
    ]
    return Chart(
        title=f"{model.layers} layers of width {model.hidden}, {model.heads} heads of "
        f"{model.K} x {model.V}, on {gpu.title}",
        subtitle=f"{gpu.copy_bandwidth / 1e12:.2f} TB/s of copies, {gpu.matrix_rate / 1e12:.0f} "
        f"TFLOP/s of bf16 products; training {model.batch} x {model.tokens} tokens",
        bandwidth=gpu.copy_bandwidth,
        rate=gpu.matrix_rate,
        points=tuple(points),
    )
