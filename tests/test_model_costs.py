"""Parameters, memory and time bounds of whole models, by hand; models as they are typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from click.testing import CliRunner

from glac import dispatch
from glac.cli import cli
from glac.configs import BackwardConfig, default_config
from glac.errors import ConfigError
from glac.gpus import GPUS
from glac.model_costs import (
    PRESETS,
    ModelConfig,
    activation_bytes,
    cache_bytes_per_token,
    chart,
    decode_steps,
    model_costs,
    parameters,
    parse_model,
    state_bytes,
    training_parts,
)
from glac.problem import Op
from glac.roofline import kept_states_bytes

H100 = GPUS["h100"]
LARGE = PRESETS["gla-1.3b"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the packs of the user who runs it."""
    monkeypatch.setenv("GLAC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GLAC_PACK_PATH", raising=False)
    dispatch.clear()


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.integers(1, 8))
    return ModelConfig(
        layers=draw(st.integers(1, 48)),
        hidden=heads * draw(st.sampled_from((64, 128, 256, 512))),
        heads=heads,
        ffn=draw(st.integers(0, 8192)),
        vocab=draw(st.integers(1, 200_000)),
        tied=draw(st.booleans()),
        tokens=draw(st.integers(1, 16384)),
        batch=draw(st.integers(1, 16)),
        sequences=draw(st.integers(1, 256)),
        checkpoint=draw(st.booleans()),
    )


# ---- by hand ----


def test_parameters_by_hand() -> None:
    d = 2048
    assert (LARGE.K, LARGE.V, LARGE.inner) == (256, 512, 5632)
    assert parameters(LARGE) == {
        "queries, keys, values": 24 * d * (1024 + 1024 + d),
        "forget gate": 24 * (d * 16 + 16 * 1024 + 1024),
        "output gate and projection": 24 * 2 * d * d,
        "feed-forward": 24 * 3 * d * 5632,
        "norms": 24 * (2 * d + 512) + d,
        "embedding": 32000 * d,
        "head": 32000 * d,
    }
    assert 1.3e9 < sum(parameters(LARGE).values()) < 1.4e9
    small = sum(parameters(replace(PRESETS["gla-340m"], tied=True)).values())
    assert 3.3e8 < small < 3.5e8


def test_states_and_cache_by_hand() -> None:
    assert state_bytes(LARGE) == 24 * 4 * 256 * 512 * 4
    assert cache_bytes_per_token(LARGE) == 24 * 2 * 2048 * 2
    costs = model_costs(LARGE, H100)
    assert costs.equal_length == 256.0


def test_memory_by_hand() -> None:
    model = replace(LARGE, batch=2, tokens=1024)
    costs = model_costs(model, H100)
    count, tokens = costs.parameter_count, 2 * 1024
    memory = dict(costs.memory)
    assert memory.pop("weights") == memory.pop("gradients") == 2 * count
    assert memory.pop("optimizer") == 12 * count
    head = memory.pop("activations, head")
    assert head == 2 * tokens * (2 * 2048 + 2 * 32000)
    states = memory.pop("chunk states, one layer")
    # 8 heads of 256 x 512 in bf16 are 2 MiB a chunk: of 32 or 64 chunks, 80 MiB at most is free.
    assert states % (4 * 2 * 256 * 512) == 0
    assert 0 < states < 2**30
    # 4 heads of 256 channels: gate and gradient; 8 tiles' parts of dx, 16 blocks' of dw and db.
    gate = memory.pop("gate and its gradient, one layer")
    assert gate == 2 * 2 * tokens * 1024 + 4 * (8 * tokens * 16 + 16 * 1024 * 17)
    channels = 2 * 2048 + 2 * 2048 + (2 * 1024 + 2048 + 16) + 3 * 2048 + 3 * 5632
    assert sum(memory.values()) == 24 * 2 * tokens * channels
    assert sum(activation_bytes(model).values()) == 2 * tokens * channels


def test_kept_states_by_hand() -> None:
    problem = replace(LARGE, batch=8, tokens=2048).problem()
    config = default_config(Op.BACKWARD, problem.spec, H100, problem.bucket)
    assert isinstance(config, BackwardConfig)
    assert config.grads.chunk == 32
    # 64 chunks of 8 MiB: three windows of 22, and the states between windows in fp32.
    assert kept_states_bytes(problem, config) == 22 * 2**23 + 3 * 2**24


def test_training_by_hand() -> None:
    model = ModelConfig(layers=2, hidden=256, heads=2, ffn=512, vocab=1000, tokens=64, batch=4)
    n, d, keys, values = 256, 256, 128, 256
    parts = {part.name: part for part in training_parts(model, H100)}
    shapes = [(d, 2 * keys + 2 * values + 16), (values, d)]
    assert parts["projections"].flops == 2 * 3 * sum(2 * n * i * o for i, o in shapes)
    assert parts["projections"].bytes == 2 * 3 * sum(2 * (n * (i + o) + i * o) for i, o in shapes)
    assert parts["feed-forward"].flops == 2 * 3 * 2 * n * 3 * d * 512
    problem = model.problem()
    moved = problem.bytes(Op.FORWARD) + problem.bytes(Op.BACKWARD)
    assert parts["gated linear attention"].bytes == 2 * moved
    light = (8 * d + 3 * values + 3 * 512) + (8 * d + 5 * values + 5 * 512)
    assert parts["norms, gates, residuals"].bytes == 2 * 2 * n * light
    assert parts["optimizer"].bytes == 28 * sum(parameters(model).values())
    assert parts["embedding, head, loss"].flops == 3 * 2 * n * d * 1000


def test_checkpoints_trade_memory_for_a_forward_pass() -> None:
    plain, again = model_costs(LARGE, H100), model_costs(replace(LARGE, checkpoint=True), H100)
    assert again.memory_bytes < plain.memory_bytes / 1.5
    ratios = {
        new.name: new.flops / old.flops
        for old, new in zip(plain.training, again.training, strict=True)
        if old.flops
    }
    assert ratios["projections"] == ratios["feed-forward"] == pytest.approx(4 / 3)
    assert ratios["embedding, head, loss"] == 1.0
    assert again.training_us > plain.training_us


def test_decoding_by_hand() -> None:
    gla, first, *_, last = decode_steps(replace(LARGE, sequences=1), H100, (1024, 2048, 131072))
    used = sum(parameters(LARGE).values()) - 32000 * 2048
    weights = 2 * used + 2 * 2048
    assert gla.bytes == weights + 2 * state_bytes(LARGE)
    assert gla.flops == 2 * used + 4 * 24 * 4 * 256 * 512
    assert first.bytes == weights + 1025 * 24 * 2 * 2048 * 2
    assert last.kept_bytes == 131072 * 24 * 2 * 2048 * 2
    assert gla.us == pytest.approx(gla.bytes / 3.0e12 * 1e6)
    assert gla.us < first.us < last.us


# ---- properties ----


@hypothesis.given(models())
@hypothesis.settings(deadline=None)
def test_costs_add_up_and_are_numbers(model: ModelConfig) -> None:
    costs = model_costs(model, H100, (1, 1000))
    data = costs.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["memory_bytes"]["total"] == sum(costs.memory.values())
    assert data["parameters"]["total"] == sum(parameters(model).values())
    assert costs.training_us == pytest.approx(sum(part.us for part in costs.training))
    assert all(part.us == max(part.memory_us, part.compute_us) for part in costs.training)
    more = model_costs(replace(model, batch=2 * model.batch), H100, (1,))
    assert more.training_us > costs.training_us
    assert more.memory["weights"] == costs.memory["weights"]
    longer = decode_steps(model, H100, (1000, 2000))
    assert longer[2].bytes - longer[1].bytes == 1000 * model.sequences * cache_bytes_per_token(
        model
    )


def test_the_chart_has_the_parts_that_multiply() -> None:
    data = chart(model_costs(LARGE, H100, (1024,)))
    labels = [point.label for point in data.points]
    assert labels[0] == "training: projections"
    assert labels[-1] == "decoding 32 sequences: attention after 1024"
    assert "training: optimizer" not in labels
    assert all(point.bound <= data.rate for point in data.points)


# ---- as it is typed ----


def test_presets_pairs_and_files(tmp_path: Path) -> None:
    assert parse_model("gla-1.3b") == LARGE
    assert parse_model("GLA-1.3B, tokens=8192, batch=4") == replace(LARGE, tokens=8192, batch=4)
    typed = parse_model("layers=24,hidden=2048,heads=4,expand_k=0.5,expand_v=1,ffn=5632,tied=true")
    assert typed == replace(LARGE, ffn=5632, tied=True)
    for name, text in (
        ("model.yaml", "layers: 24\nhidden: 2048\nheads: 4\ncheckpoint: true\n"),
        ("model.json", '{"layers": 24, "hidden": 2048, "heads": 4, "checkpoint": true}'),
    ):
        (tmp_path / name).write_text(text)
        assert parse_model(str(tmp_path / name)) == replace(LARGE, checkpoint=True)
        changed = parse_model(f"{tmp_path / name},checkpoint=false")
        assert changed == LARGE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("no-such-model", "cannot be read"),
        ("layers=24", "missing hidden, heads"),
        ("gla-1.3b,8192", "no key=value pair"),
        ("gla-1.3b,tokenz=1", "unknown keys"),
        ("gla-1.3b,tokens=many", "tokens must be a number"),
        ("gla-1.3b,tokens=1.5", "tokens must be an integer"),
        ("gla-1.3b,tokens=0", r"tokens must be in 1\.\."),
        ("gla-1.3b,tokens=true", "tokens must be an integer"),
        ("gla-1.3b,tied=1", "tied must be true or false"),
        ("gla-1.3b,expand_k=nan", "expand_k must be above 0"),
        ("gla-1.3b,expand_k=-1", "expand_k must be above 0"),
        ("gla-1.3b,heads=3", "whole number of channels"),
        ("gla-1.3b,heads=99999999999", "heads must be in"),
    ],
)
def test_models_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model(text)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "layers: 24\nwidth: 5\n"])
def test_files_that_are_no_models(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"model\.yaml"):
        parse_model(str(path))


def test_heads_too_large_for_any_kernel() -> None:
    with pytest.raises(ConfigError, match=r"K must be in 1\.\.\d+, got 1024"):
        model_costs(parse_model("gla-1.3b,heads=1"), H100)
    with pytest.raises(ConfigError, match="rank must be one of"):
        model_costs(parse_model("gla-1.3b,gate_rank=5"), H100)
    with pytest.raises(ConfigError, match="length must be at least 1"):
        model_costs(LARGE, H100, (0,))


def test_the_command(tmp_path: Path) -> None:
    words = ["roofline", "--model", "gla-340m,batch=1", "--length", "4096", "--gpu", "h200"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    for text in ("24 layers of width 1024", "feed-forward", "optimizer", "Decoding", "4096"):
        assert text in done.stdout
    data = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["data"]
    assert data["model"]["ffn"] == 2816
    assert [step["length"] for step in data["decoding"]["steps"]] == [0, 4096]
    pytest.importorskip("matplotlib")
    picture = tmp_path / "m.svg"
    assert CliRunner().invoke(cli, [*words, "-o", str(picture)]).exit_code == 0
    assert "<svg" in picture.read_text()
