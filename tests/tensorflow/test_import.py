"""What importing the adapter needs and loads, and what it offers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.contract.package import PackageContract
from tests.tensorflow.driver import TensorFlowDriver


class TestPackage(PackageContract):
    driver = TensorFlowDriver()
    needed = ("tensorflow", "keras")


@pytest.mark.parametrize("where", ["environment", "file"])
def test_another_keras_backend_is_refused(tmp_path, where):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "numpy"}
    message = "its backend is 'numpy'; set the environment variable KERAS_BACKEND"
    if where == "file":
        (tmp_path / "keras.json").write_text('{"backend": "openvino"}')
        del environment["KERAS_BACKEND"]
        environment["KERAS_HOME"] = str(tmp_path)
        message = "ImportError: agc_tensorflow needs"
    command = [sys.executable, "-c", "import agc_tensorflow"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert message in done.stderr
