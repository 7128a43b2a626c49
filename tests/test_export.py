"""export.py: the files in their real runtimes, of which each is skipped where it is missing."""

import hashlib
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_main

import export
from data import load_dataset
from metrics import evaluate
from train import train
from utils import InputError
from weights import load_model

INSTALLED = [
    kind for kind, names in export.LIBRARIES.items() if all(map(importlib.util.find_spec, names))
]
FORMATS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind not in INSTALLED, reason="not installed"))
    for kind in export.LIBRARIES
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A short training's network in every format that is installed: its model file, and the folder.

    So little trained, int8 may cost it an image or two.
    """
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(replace(TINY, max_steps_per_epoch=0))
        patch.setattr(export, "CALIBRATION_IMAGES", 200)
        if INSTALLED:
            formats = tuple(INSTALLED)
            export.export(Path("checkpoints"), format=formats, out=Path("app"), max_drop=1)
    return folder / "checkpoints" / "tiny" / "model.safetensors", folder / "app"


def open_file(kind, folder):
    content = Path(folder, export.file_name("tiny", kind)).read_bytes()
    return (export.open_onnx if kind.startswith("onnx") else export.open_pte)(content, 1), content


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_classifies_as_the_network_does(kind, exported):
    path, folder = exported
    model, _ = load_model(path)
    data = load_dataset("digits")
    expected = evaluate(model, data.test.images, data.normalize)
    classifier, _ = open_file(kind, folder)
    logits = classifier(data.test.images / 255)
    assert logits.shape == expected.shape
    if kind.endswith("int8"):
        assert (logits.argmax(1) == expected.argmax(1)).double().mean() > 0.98
    else:
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_int8_is_a_third_of_the_size_or_less(kind, exported):
    _, content = open_file(kind, exported[1])
    parameters = sum(t.numel() for t in load_model(exported[0])[0].parameters())
    if kind.endswith("int8"):
        assert len(content) < 1.5 * parameters
    else:
        assert 4 * parameters < len(content) < 5 * parameters


@pytest.mark.parametrize("kind", [one for one in FORMATS if one.values[0].startswith("onnx")])
def test_onnx_explains_itself_and_takes_any_batch(kind, exported):
    import onnxruntime

    path, folder = exported
    classifier, content = open_file(kind, folder)
    session = onnxruntime.InferenceSession(content)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape[1:], image.type) == ("image", [3, 32, 32], "tensor(float)")
    assert (logits.name, logits.shape[1:]) == ("logits", [10])
    assert [len(classifier(torch.rand(n, 3, 32, 32))) for n in (1, 7)] == [1, 7]
    told = session.get_modelmeta().custom_metadata_map
    _, info = load_model(path)
    assert json.loads(told["class_names"]) == info["class_names"]
    assert json.loads(told["temperature"]) == info["temperature"]
    assert told["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif("onnx-int8" not in INSTALLED, reason="not installed")
def test_onnx_is_the_same_each_time_and_tells_nothing_of_this_machine(exported):
    path, folder = exported
    model, info = load_model(path)
    network = export.Normalized(model, info["mean"], info["std"]).eval()
    told = {"class_names": "[]"}
    with export.quiet():
        first, second = export.to_onnx(network, told), export.to_onnx(network, told)
    assert first == second
    for kind in ("onnx", "onnx-int8"):
        _, content = open_file(kind, folder)
        assert not re.search(rb"\.py\b|site-packages|/home|/root|/tmp", content)
        assert str(ROOT).encode() not in content


@pytest.mark.skipif("onnx-int8" not in INSTALLED, reason="not installed")
def test_int8_weights_of_onnx_leave_room_for_sums_of_16_bits(exported):
    """Else CPUs with AVX2 and without VNNI saturate, and half of the answers are wrong."""
    import onnx
    from onnx import numpy_helper

    _, content = open_file("onnx-int8", exported[1])
    initializers = onnx.load_from_string(content).graph.initializer
    weights = [numpy_helper.to_array(one) for one in initializers]
    weights = [one for one in weights if one.dtype == "int8" and one.ndim > 1]
    assert len(weights) > 5
    assert max(abs(one.astype(int)).max() for one in weights) <= 64


@pytest.mark.skipif(not INSTALLED, reason="nothing is installed")
def test_what_loses_too_much_is_refused_and_the_rest_is_written(exported, monkeypatch, capsys):
    """An exporter that forgets the normalization, which costs the digits their accuracy."""
    path, _ = exported
    kind, make = INSTALLED[0], export.make

    def forgetful(kind, network, calibration, described):
        broken = export.Normalized(network.network, [5.0] * 3, [1.0] * 3).eval()
        return make(kind, broken if kind == INSTALLED[0] else network, calibration, described)

    monkeypatch.setattr(export, "make", forgetful)
    line = (path, "--format", *INSTALLED[:2], "--out", "app")
    assert run_main(export.main, *line, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: max_drop: {kind} loses ")
    assert "not written" in err
    assert [one.name for one in Path("app").iterdir()] == ["tiny-int8.onnx"]
    assert out.count("file: ") == 1


@pytest.mark.skipif(not INSTALLED, reason="nothing is installed")
def test_float_format_of_other_logits_is_refused_whatever_its_accuracy(exported, monkeypatch):
    path, _ = exported
    make, kind = export.make, INSTALLED[0]

    class Doubled(export.Normalized):
        def forward(self, images):
            return 2 * super().forward(images)

    def doubling(kind, network, calibration, described):
        doubled = Doubled(network.network, network.mean.flatten(), network.std.flatten())
        return make(kind, doubled.eval(), calibration, described)

    monkeypatch.setattr(export, "make", doubling)
    with pytest.raises(InputError, match=f"{kind} differs by"):
        export.export(path, format=(kind,), out=Path("app"))
    assert not Path("app").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--format", "tflite"], "format"),
        (["--limit", "-1"], "limit: -1 must be an integer of at least 0"),
        (["--max-drop", "nan"], "max_drop: nan must be a number from 0 to 100"),
        (["--out", "taken"], "out: taken is a file; name a folder"),
    ],
)
def test_bad_options_are_one_line(args, words, exported, monkeypatch, capsys):
    Path("taken").touch()
    monkeypatch.setattr(export, "check_libraries", list)
    assert run_main(export.main, exported[0], *args, monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("missing", "asked", "found"),
    [
        ({"onnxscript"}, ("onnx",), "onnxscript"),
        ({"onnxscript"}, (), ["pte", "pte-int8"]),
        ({"torchao"}, (), ["onnx", "onnx-int8", "pte"]),
        ({"torchao"}, ("pte",), ["pte"]),
        ({"onnx", "executorch"}, (), "executorch, onnx"),
    ],
)
def test_missing_library_is_a_line_that_names_it_or_its_formats_are_left_out(
    missing, asked, found, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    if isinstance(found, list):
        assert export.check_libraries(asked) == found
    else:
        with pytest.raises(InputError) as error:
            export.check_libraries(asked)
        remedy = "not installed; run `pip install -r requirements-export.txt`"
        assert str(error.value) == f"format: {found}: {remedy}"
