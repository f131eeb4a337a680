"""Programs for TPU: what is recorded of them, here compiled for the CPU, which is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from agc.errors import MissingPackageError
from agc_conformance import tpu
from agc_conformance.records import read_results

PLACE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
ARRAY = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=PLACE)


def small(_: Any) -> list[tpu.Program]:
    def double(x: Any) -> Any:
        return 2 * x

    def broken(x: Any) -> Any:
        raise ValueError("no such thing\nat all")

    return [
        tpu.Program("double", double, (ARRAY,), 2 * 4 * 64 * 32, peer=(lambda x: x + x, (ARRAY,))),
        tpu.Program("broken", broken, (ARRAY,), 1),
    ]


def test_programs_cover_the_adapter() -> None:
    """Every program is traced, one of each kind is compiled."""
    found = {program.id: program for program in tpu.programs(jax.devices("cpu")[:4])}
    assert len(found) == 12
    for program in found.values():
        jax.eval_shape(program.function, *program.arguments)
        assert program.minimum > 0
    record = tpu._record(found["clip dense float32"], "cpu")
    assert record["status"] == "compiled"
    assert record["minimum_bytes"] == 3 * 4 * (1024 * 4096 + 4096)
    assert "times the least; optax" in record["detail"]
    whole, split = (
        found["clip NFNet-F0 float32"],
        found["clip and telemetry, units split over 4 NFNet-F0 float32"],
    )
    assert whole.minimum == 3 * 4 * 71_489_284
    assert split.minimum < 0.26 * whole.minimum


def test_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tpu, "programs", small)
    monkeypatch.setattr(tpu, "_devices", lambda topology: [topology])
    out = tmp_path / "tpu.json"
    assert tpu.main(["--out", str(out), "--topology", "v5e:4x4"]) == 1
    good, bad = read_results(out).tpu
    assert (good["id"], good["status"], good["topology"]) == ("double", "compiled", "v5e:4x4")
    assert good["bytes_accessed"] == good["minimum_bytes"]
    assert good["detail"] == "1.00 times the least; optax 1.00 times"
    assert (bad["status"], bad["detail"], bad["bytes_accessed"]) == (
        "failed",
        "no such thing",
        None,
    )
    assert "[2/2] broken" in capsys.readouterr().err


def test_without_libtpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        MissingPackageError, match=r"no TPU compiler for the topology .* pip install libtpu"
    ):
        tpu.compile_programs()
    assert tpu.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "pip install libtpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
