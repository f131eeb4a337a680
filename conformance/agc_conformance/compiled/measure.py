"""Compile programs, compare what they cost with what they may, and write records."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from agc.errors import MissingPackageError
from agc_conformance.compiled import hlo
from agc_conformance.compiled.programs import Program, gpu_programs, tpu_programs
from agc_conformance.records import Costs, ProgramRecord, Writer, make_header

__all__ = ["main", "measure"]

_PACKAGES: Final = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin jax-cuda12-pjrt"}


def main(arguments: list[str] | None = None) -> int:
    """Compile every program for a platform, write a file of records, and return the exit status.

    The file appears under its name only when it is complete.
    """
    parser = argparse.ArgumentParser(
        prog="python -m agc_conformance.compiled",
        description="Compile AGC's JAX programs for a TPU or GPU that need not be there.",
    )
    parser.add_argument("platform", choices=list(_PACKAGES))
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args(arguments)
    platform: str = options.platform
    try:
        programs = _programs(platform)
    except MissingPackageError as error:
        print(f"agc_conformance.compiled: {error}", file=sys.stderr)
        return 2
    header = make_header(
        "compiled",
        device=platform,
        device_name="ahead of time",
        versions=_versions(),
        command=f"python -m agc_conformance.compiled {platform}",
    )
    failed = 0
    with Writer(options.out, header) as file:
        for done, program in enumerate(programs, 1):
            print(f"[{done}/{len(programs)}] {program.id}", file=sys.stderr, flush=True)
            record = measure(program)
            file.write(record)
            failed += record["status"] == "failed"
            print(f"    {record['status']}: {record['detail']}", file=sys.stderr, flush=True)
    return int(failed > 0)


def measure(program: Program) -> ProgramRecord:
    """Compile a program and its peer, and say what they cost, or why the program failed."""
    record: ProgramRecord = {
        "type": "program",
        "id": program.id,
        "status": "failed",
        "target": program.target,
        "detail": "",
    }
    if program.minimum is not None:
        record["minimum_bytes"] = program.minimum
    try:
        costs = _costs(program, program.function, program.arguments)
        record["costs"] = costs
        if program.peer is not None:
            record["peer"] = program.peer.name
            record["peer_costs"] = _costs(program, program.peer.function, program.peer.arguments)
    except Exception as error:  # a failure of the compiler is a result
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {**record, "detail": lines[0]}
    faults = list(_faults(program, record))
    if faults:
        return {**record, "detail": "; ".join(faults)}
    return {**record, "status": "compiled"}


def _faults(program: Program, record: ProgramRecord) -> Iterator[str]:
    """Yield in which respects a program costs more than it may."""
    costs = record["costs"]
    times = costs["device_bytes"] / (program.minimum or math.inf)
    if times > program.most:
        yield f"moves {times:.3f} times the least in device memory, {program.most} at most"
    if costs["aliased_bytes"] < program.reused:
        yield f"reuses {costs['aliased_bytes']} donated bytes, not {program.reused}"
    for name, times in program.at_most_peer.items():
        mine, other = costs[name], record["peer_costs"][name]
        if mine > times * other:
            yield f"{name}: {mine}, more than {times:g} times {record['peer']}'s {other}"


def _costs(program: Program, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Costs:
    """Compile, and read the costs for one device."""
    import jax

    lowered = jax.jit(function, donate_argnums=program.donate).lower(*arguments)
    compiled = lowered.compile(compiler_options=dict(program.options))
    text = hlo.parse(compiled.as_text())
    collectives = text.collectives
    return {
        "device_bytes": text.device_bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "aliased_bytes": text.aliased_bytes,
        "kernels": text.kernels,
        "collectives": collectives.count,
        "collective_bytes": collectives.bytes,
    }


def _programs(platform: str) -> list[Program]:
    """Return the programs for a platform.

    Raises
    ------
    MissingPackageError
        If JAX, the adapter or the platform's compiler is not installed.
    """
    # libtpu neither asks a metadata server about this machine nor insists on being the only one;
    # the CUDA plug-in does not look for a driver.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        from jax.experimental import topologies

        import agc_jax  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f'programs need JAX ({error}); try: pip install "agc-sam[jax,conformance]"'
        ) from error

    def devices(target: str) -> Any:
        more = {} if platform == "tpu" else {"target_config": _H100, "topology": "1x1x1"}
        kind = "tpu" if platform == "tpu" else "cuda"
        try:
            return topologies.get_topology_desc(target, kind, **more).devices
        # A missing compiler and an unknown topology raise exceptions of several types.
        except Exception as error:
            raise MissingPackageError(
                f"no compiler for {target} ({str(error).splitlines()[0]}); "
                f"try: pip install {_PACKAGES[platform]}"
            ) from error

    return list(tpu_programs(devices) if platform == "tpu" else gpu_programs(devices))


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "optax", "flax", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


_H100: Final = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""Data-sheet numbers of an H100 SXM: XLA's ``GpuTargetConfigProto`` as text."""
