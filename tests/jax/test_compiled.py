"""Programs compiled ahead of time: what is recorded of them, here for the CPU, which is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from agc.errors import MissingPackageError
from agc_conformance.compiled import measure
from agc_conformance.compiled.programs import Peer, Program, gpu_programs, tpu_programs
from agc_conformance.records import read_results

PLACE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
ARRAY = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=PLACE)
LEAST = 2 * 4 * 64 * 32


def double(x: Any) -> Any:
    return 2 * x


def twice(x: Any) -> Any:
    return jax.lax.optimization_barrier(x + x).sum(0), x


def broken(x: Any) -> Any:
    raise ValueError("no such thing\nat all")


def small(_: Any) -> Iterator[Program]:
    peer = Peer("peer", double, (ARRAY,))
    yield Program("double", "v5e:4x4", double, (ARRAY,), LEAST, 1.02, peer=peer)
    yield Program("greedy", "v5e:4x4", double, (ARRAY,), LEAST // 2, 1.5)
    yield Program("reusing", "v5e:4x4", double, (ARRAY,), donate=(0,), reused=LEAST // 2)
    yield Program("copying", "v5e:4x4", double, (ARRAY,), reused=LEAST // 2)
    yield Program(
        "slow", "v5e:4x4", twice, (ARRAY,), LEAST, 9.0, peer=peer, at_most_peer={"kernels": 1.0}
    )
    yield Program("broken", "v5e:4x4", broken, (ARRAY,), 1, 1.0)


def test_programs_are_traced() -> None:
    """Of those of whole models one of each platform."""
    devices = jax.devices("cpu")[:4]
    for all_programs, count in ((tpu_programs, 15), (gpu_programs, 6)):
        programs = {program.id: program for program in all_programs(lambda _: devices)}
        assert len(programs) == count
        whole = {name for name in programs if "NFNet-F0" in name or "GPT-2" in name}
        for name in programs.keys() - whole | {"clip NFNet-F0 float32"}:
            jax.eval_shape(programs[name].function, *programs[name].arguments)
            if (peer := programs[name].peer) is not None:
                jax.eval_shape(peer.function, *peer.arguments)
        assert programs["clip NFNet-F0 float32"].minimum == 3 * 4 * 71_489_284


def test_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "_programs", lambda platform: list(small(platform)))
    out = tmp_path / "tpu.json"
    assert measure.main(["tpu", "--out", str(out)]) == 1
    records = {record["id"]: record for record in read_results(out).programs}
    good = records["double"]
    assert (good["status"], good["target"], good["detail"]) == ("compiled", "v5e:4x4", "")
    assert good["costs"] == {
        "device_bytes": LEAST,
        "temporary_bytes": 0,
        "aliased_bytes": 0,
        "kernels": 1,
        "collectives": 0,
        "collective_bytes": 0,
    }
    assert (good["peer"], good["peer_costs"]) == ("peer", good["costs"])
    faults = {name: record["detail"] for name, record in records.items()}
    assert faults["greedy"] == "moves 2.000 times the least in device memory, 1.5 at most"
    assert faults["slow"].endswith(", more than 1 times peer's 1")
    assert records["reusing"]["costs"]["aliased_bytes"] == LEAST // 2
    assert faults["copying"] == f"reuses 0 donated bytes, not {LEAST // 2}"
    assert faults["broken"] == "no such thing"
    assert {name for name, record in records.items() if record["status"] == "failed"} == {
        *("greedy", "copying", "slow", "broken")
    }
    assert "costs" not in records["broken"]
    assert "[6/6] broken" in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_without_the_compiler(
    platform: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingPackageError, match=r"no compiler for .* pip install "):
        measure._programs(platform)
    assert measure.main([platform, "--out", str(tmp_path / "x.json")]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
