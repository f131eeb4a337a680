"""Files of weights, and the command that classifies photographs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from agc.cli import main
from agc.nfnet.images import evaluation_image
from agc.weights import convert, load, save
from tests.contract import Contract


class ConvertContract(Contract):
    """Files of models.

    Attributes
    ----------
    form : str
        What the framework's own files are called.
    backend : str
        What the framework is called by ``agc classify``.
    read : tuple of str
        Forms of files that are classified with.
    digits : float
        Relative error of probabilities.
    """

    form: str
    backend: str
    read: tuple[str, ...] = ("neutral",)
    digits = 1e-4

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {"form": self.read}

    def test_files_of_a_model(self, tmp_path):
        model = self.driver.seeded(dtype="float32", num_classes=3)
        other = self.driver.blank("tiny", 3)
        written = self.driver.adapter.to_neutral(model)
        save(tmp_path / "saved", model.options, written, self.form)
        options, found = load(tmp_path / "saved")
        assert options == model.options
        self.driver.adapter.from_neutral(other, found)
        read = self.driver.adapter.to_neutral(other)
        assert all(np.array_equal(read[name], value) for name, value in written.items())

    def test_classify(self, tmp_path, neutral, arrays, capsys, form):
        paths, images = [], load_sample_images().images
        for number, image in enumerate(images):
            paths.append(str(tmp_path / f"{number}.png"))
            Image.fromarray(image).save(paths[-1])
        convert(neutral, tmp_path / "weights", form)
        command = ["classify", *paths, "--weights", str(tmp_path / "weights")]
        assert main([*command, "--backend", self.backend, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["trained"] is True
        model = self.driver.seeded(dtype="float32")
        for found, image in zip(document["images"], images, strict=True):
            logits = self.driver.run(model, evaluation_image(image, 32)[None])[0].astype("float64")
            exact = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-exact)[:5]
            assert [row["index"] for row in found["top"]] == best.tolist()
            probabilities = [row["probability"] for row in found["top"]]
            assert probabilities == pytest.approx(exact[best], rel=self.digits)
