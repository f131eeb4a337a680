"""What importing the adapter needs, loads, and says when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import agc_tensorflow


def python(
    code: str, base: Mapping[str, str] = os.environ, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**base, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )


def test_missing_tensorflow_names_the_extra():
    code = "import sys; sys.modules['tensorflow'] = None; import agc_tensorflow"
    result = python(code)
    assert result.returncode == 1
    assert "ImportError: agc_tensorflow needs TensorFlow and Keras 3 (" in result.stderr
    assert 'pip install "agc-sam[tensorflow]"' in result.stderr


def test_backend_of_the_configuration_file_is_refused(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "openvino"}')
    environment = {key: os.environ[key] for key in os.environ if key != "KERAS_BACKEND"}
    result = python("import agc_tensorflow", environment, KERAS_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "ImportError: agc_tensorflow needs" in result.stderr


def test_another_keras_backend_is_refused():
    result = python("import agc_tensorflow", KERAS_BACKEND="numpy")
    assert result.returncode == 1
    assert "its backend is 'numpy'; set the environment variable KERAS_BACKEND" in result.stderr


def test_no_other_framework_is_loaded():
    code = """
import sys, tensorflow, keras  # which may load jax where it is installed
before = set(sys.modules)
import agc_tensorflow
frameworks = {"torch", "jax", "agc_torch", "agc_jax", "agc_conformance"}
wrong = frameworks & (set(sys.modules) - before)
sys.exit(f"loaded {wrong}" if wrong else 0)
"""
    result = python(code, KERAS_BACKEND="tensorflow")
    assert result.returncode == 0, result.stderr


def test_public_names():
    assert agc_tensorflow.__all__ == [
        "AdaptiveGradClip",
        "CoupledSGD",
        "NFNet",
        "SamStats",
        "SharpnessAwareModel",
        "Stats",
        "Verification",
        "adaptive_clip_gradients",
        "from_neutral",
        "nfnet",
        "plan",
        "register_units",
        "sam_value_and_gradients",
        "sgd_nfnet",
        "to_neutral",
        "units",
        "verify_sam",
    ]
    assert all(hasattr(agc_tensorflow, name) for name in agc_tensorflow.__all__)
