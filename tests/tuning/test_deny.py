"""Deny-lists: from failures to families, into the YAML, and out of the next study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glac.configs import ChunkKernelConfig, Config, ForwardConfig
from glac.errors import ConfigError
from glac.problem import Op
from glac.tuned import (
    Denied,
    Evidence,
    dump_tuned,
    load_tuned,
    merge_tuned,
    parse_tuned,
    tuned_text,
)
from glac.tuning.deny import denied_families, why_denied
from glac.tuning.evaluate import ERROR, HUNG, ILLEGAL, OUT_OF_MEMORY, WRONG, Outcome
from tests.helpers_packs import VECTOR, WHOLE, tuned_file

TOOLS = {"triton": "3.7.1", "ptxas": "12.9.86", "templates_sha256": "a" * 64}
WHEN = {"measured_on": "Some GPU", "date": "2026-01-02"}


def config(chunk: int, warps: int = 4, stages: int = 1) -> ForwardConfig:
    return ForwardConfig(ChunkKernelConfig(chunk, 16, warps, stages))


def families(outcomes: dict[Config, Outcome]) -> list[Denied]:
    return denied_families(VECTOR, outcomes, **TOOLS, **WHEN)


OK = Outcome("ok", us=1.0)


def test_a_tile_whose_every_member_fails_is_a_family() -> None:
    found = families(
        {
            config(16, stages=1): OK,
            config(64, stages=1): Outcome(ILLEGAL, reason="illegal memory access"),
            config(64, stages=2): Outcome(WRONG, reason="error 0.4"),
            config(32, stages=1): OK,
            config(32, stages=2): Outcome(HUNG, reason="no answer in 60 s"),
        }
    )
    assert [entry.match for entry in found] == [
        {"fwd": {"chunk": 64, "block_v": 16, "num_warps": 4}},
        {"fwd": {"chunk": 32, "block_v": 16, "num_warps": 4, "num_stages": 2, "tma": False}},
    ]
    assert [e.status for e in found[0].evidence] == [ILLEGAL, WRONG]
    assert found[0].matches(VECTOR, config(64, stages=4))
    assert not found[1].matches(VECTOR, config(32, stages=1))
    assert not found[0].matches(replace(VECTOR, K=32), config(64))


def test_what_is_the_machines_fault_denies_nothing() -> None:
    outcomes: dict[Config, Outcome] = {
        config(16): Outcome(OUT_OF_MEMORY, reason="3 times"),
        config(32): Outcome(ERROR, reason="cannot load"),
    }
    assert families(outcomes) == []


def with_denied() -> tuple[Denied, str]:
    file = tuned_file()
    entry = Denied(
        Op.FORWARD,
        VECTOR,
        {"fwd": {"chunk": 64}},
        (Evidence("c64_bv16_w4_s1", ILLEGAL, "illegal memory access"),),
        file.environment.triton,
        file.environment.ptxas,
        file.environment.templates_sha256[Op.FORWARD],
        "Some GPU",
        "2026-01-02",
    )
    return entry, tuned_text(replace(file, denied=(entry,)))


def test_the_list_travels_through_the_file(tmp_path: Path) -> None:
    entry, text = with_denied()
    file = parse_tuned(text, "x.yaml")
    assert file.denied == (entry,)
    path = tmp_path / "h100.yaml"
    dump_tuned(file, path)
    assert load_tuned(path).denied == (entry,)
    reason = why_denied(
        VECTOR, config(64), [file], entry.triton, entry.ptxas, {Op.FORWARD: entry.templates_sha256}
    )
    assert reason is not None
    assert "deny-list of h100.yaml" in reason
    other = {Op.FORWARD: "b" * 64}
    assert why_denied(VECTOR, config(64), [file], entry.triton, entry.ptxas, other) is None
    assert why_denied(VECTOR, config(16), [file], entry.triton, entry.ptxas, other) is None


def test_merging_keeps_entries_of_the_same_code() -> None:
    entry, text = with_denied()
    old, new = parse_tuned(text, "x.yaml"), tuned_file()
    assert merge_tuned(old, new)[0].denied == (entry,)
    newer = replace(new, environment=replace(new.environment, ptxas="13.0.1"))
    assert merge_tuned(old, newer)[0].denied == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{chunk: 64}", "{}", "match.fwd: wanted fields"),
        ("fwd: {chunk: 64}", "states: {chunk: 64}", "match.states: unknown key"),
        ("{chunk: 64}", "{chunk: wide}", "match.fwd.chunk: wanted a number"),
        ("status: illegal-access, ", "", "evidence[0]: missing keys: status"),
        ("measured_on: Some GPU\n  date: '2026-01-02'\n", "", "missing keys"),
    ],
)
def test_a_broken_entry_is_refused_with_its_line(old: str, new: str, message: str) -> None:
    _, text = with_denied()
    head, found, tail = text.rpartition(old)
    assert found
    with pytest.raises(ConfigError) as caught:
        parse_tuned(head + new + tail, "x.yaml")
    assert caught.value.message.startswith("x.yaml:")
    assert "denied[0]" in caught.value.message
    assert message in caught.value.message


def test_a_row_that_is_denied_is_refused() -> None:
    entry, _ = with_denied()
    assert isinstance(WHOLE, ForwardConfig)
    file = tuned_file()
    whole = replace(entry, match={"fwd": {"chunk": WHOLE.fwd.chunk}})
    with pytest.raises(ConfigError, match=r"rows\[\d\]\.config: is denied by denied\[0\]"):
        parse_tuned(tuned_text(replace(file, denied=(whole,))), "x.yaml")
