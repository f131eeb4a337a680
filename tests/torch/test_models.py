"""NFNets through the adapter's own backend: gradients and clipping; the suite's main job asks for the rest."""

import json
import subprocess
import sys


def test_gradients_and_clipping(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [
        "conformance",
        "run",
        "--backend",
        "torch",
        "--select",
        "NFNET-[24]",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "agc.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    results = [record for record in records if record["type"] == "result"]
    assert {record["status"] for record in results} == {"passed"}
    assert {record["dtype"] for record in results} == {"float32", "float64"}
    assert len(results) == 10
