"""export.py: the files in their real runtimes, each skipped where its runtime is missing."""

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main
from PIL import Image
from torch.nn import functional as F

import export
import predict
from config import Config
from data import Normalize, Split, load_dataset, make_dataset
from engine.checkpoint import load_model, save_model
from engine.evaluate import classify, evaluate
from engine.pictures import read_picture
from utils import InputError

INSTALLED = [
    kind
    for kind, names in export.LIBRARIES.items()
    if kind != "page" and all(map(importlib.util.find_spec, names))
]
needs_onnx = pytest.mark.skipif("onnx-int8" not in INSTALLED, reason="not installed")
needs_pte = pytest.mark.skipif("pte-int8" not in INSTALLED, reason="not installed")
LOSS = 1  # point: so briefly trained, a network in int8 may lose an image or two


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory):
    """The demo's checkpoint, the folder of its page and ONNX files, verdicts and output."""
    folder, output = tmp_path_factory.mktemp("app") / "my page", io.StringIO()
    path = calibrated(demo, tmp_path_factory.mktemp("network"))
    formats = ("onnx", "onnx-int8", "page")
    with contextlib.redirect_stdout(output):
        verdicts = export.export(path, format=formats, out=folder, max_drop=LOSS, examples=3)
    return path, folder, verdicts, output.getvalue()


def calibrated(demo, folder):
    """A copy of the demo's checkpoint in `folder`, with a temperature."""
    model, info = load_model(demo[0] / "model.safetensors")
    del info["architecture"]
    path = folder / "demo.safetensors"
    save_model(path, model, info | {"temperature": 2.0})
    return path


def open_file(kind, folder):
    content = Path(folder, export.file_name("demo", kind)).read_bytes()
    return (export.open_onnx if kind.startswith("onnx") else export.open_pte)(content, 1), content


@needs_onnx
@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_onnx_classifies_as_the_network_does(kind, exported):
    check_classes(kind, *exported[:2])


@needs_pte
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pte", "pte-int8"])
def test_pte_classifies_as_the_network_does(kind, demo):
    path = calibrated(demo, Path())
    export.export(path, format=(kind,), out=Path("app"), max_drop=LOSS)
    check_classes(kind, path, "app")
    check_pte_metadata(path, Path("app", export.file_name("demo", kind)))


def check_pte_metadata(path, file):
    """A program's methods without inputs return what the metadata of an ONNX file holds."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    methods = program.method_names - {"forward"}
    facts = {name: program.load_method(name).execute([])[0] for name in methods}
    _, info = load_model(path)
    assert json.loads(facts.pop("class_names")) == info["class_names"]
    assert json.loads(facts.pop("temperature")) == info["temperature"]
    assert facts.pop("checkpoint_sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not facts


def check_classes(kind, path, folder):
    model, _ = load_model(path)
    data = load_dataset(Config(dataset="digits"))
    expected = classify(model, data.test.images, data.normalize)
    classifier, content = open_file(kind, folder)
    logits = classifier(data.test.images / 255)
    parameters = sum(t.numel() for t in model.parameters())
    if kind.endswith("int8"):
        assert (logits.argmax(1) == expected.argmax(1)).double().mean() > 0.98
        assert len(content) < 1.5 * parameters
    else:
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
        assert 4 * parameters < len(content) < 5 * parameters


@needs_onnx
@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_onnx_describes_itself_and_takes_any_batch(kind, exported):
    import onnxruntime

    path, folder, *_ = exported
    classifier, content = open_file(kind, folder)
    session = onnxruntime.InferenceSession(content)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape[1:], image.type) == ("image", [3, 32, 32], "tensor(float)")
    assert (logits.name, logits.shape[1:]) == ("logits", [10])
    assert [len(classifier(torch.rand(n, 3, 32, 32))) for n in (1, 7)] == [1, 7]
    metadata = session.get_modelmeta().custom_metadata_map
    _, info = load_model(path)
    assert json.loads(metadata["class_names"]) == info["class_names"]
    assert json.loads(metadata["temperature"]) == info["temperature"]
    assert metadata["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@needs_onnx
def test_onnx_is_reproducible_and_holds_no_path_of_this_machine(exported, capsys):
    path, folder, *_ = exported
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        export.export(path, format=("onnx",), out=Path("again"), limit=20)
        assert torch.get_num_threads() == 2  # a notebook trains on
    finally:
        torch.set_num_threads(number)
    assert "on 20 test images" in capsys.readouterr().out
    assert Path("again/demo.onnx").read_bytes() == (folder / "demo.onnx").read_bytes()
    for kind in ("onnx", "onnx-int8"):
        _, content = open_file(kind, folder)
        assert not re.search(rb"\.py\b|site-packages|/home|/root|/tmp", content)
        assert str(ROOT).encode() not in content


@needs_onnx
def test_page_is_a_whole_folder_with_the_facts_and_examples_of_the_network(exported):
    path, folder, verdicts, output = exported
    assert output.endswith(f"next: python -m http.server -d '{folder.as_posix()}'\n")
    assert "examples: whoever opens the page gets these test pictures" in output
    page = {"index.html", "network.json", "network.onnx", "offline.js"}
    assert {one.name for one in folder.iterdir()} == page | {"demo.onnx", "demo-int8.onnx"}
    assert (folder / "network.onnx").read_bytes() == (folder / "demo-int8.onnx").read_bytes()
    for name in ("index.html", "offline.js"):
        assert (folder / name).read_bytes() == (ROOT / "web" / name).read_bytes()
    facts = json.loads((folder / "network.json").read_text())
    _, info = load_model(path)
    assert facts["class_names"] == info["class_names"]
    assert facts["temperature"] == info["temperature"]
    assert facts["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha384((folder / "network.onnx").read_bytes()).digest()
    assert facts["integrity"] == f"sha384-{base64.b64encode(digest).decode()}"
    test = load_dataset(Config(dataset="digits")).test
    assert (facts["accuracy"], facts["test_images"]) == (verdicts[-1].accuracy, len(test))
    assert [one["class_name"] for one in facts["examples"]] == ["0", "1", "2"]
    _, content = facts["examples"][2]["image"].split("data:image/png;base64,")
    found = read_picture(io.BytesIO(base64.b64decode(content)))
    assert torch.equal(found, test.images[test.labels == 2][0])


@needs_onnx
def test_python_without_pytorch_answers_as_classify_does(exported, capsys):
    """The example of docs/mobile.md, on a turned photo, with the network in float32."""
    path, folder, *_ = exported
    (code,) = re.findall(
        r"```python\n([^`]*InferenceSession[^`]*)```", (ROOT / "docs/mobile.md").read_text("utf-8")
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (70, 101, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg", exif=exif)
    assert "checkpoints/tiny-int8.onnx" in code
    exec(code.replace("checkpoints/tiny-int8.onnx", (folder / "demo.onnx").as_posix()), {})
    (expected,) = predict.classify(["photo.jpg"], path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(expected)[:3]
    found = [float(percentage.removesuffix("%")) for _, percentage in lines]
    assert found == pytest.approx([100 * one for one in expected.values()][:3], abs=0.1)


@pytest.mark.parametrize(("accuracy", "refused"), [(94.9, False), (94.5, True), (95.5, False)])
def test_a_format_that_loses_accuracy_is_refused(accuracy, refused):
    eager = export.Verdict("PyTorch", 0, 95.0, 100.0, 0.0, 1.0, None)
    verdict = eager._replace(name="onnx-int8", accuracy=accuracy)
    assert bool(export.why_refused(verdict, eager, 0.2, 10_000, 1.0)) == refused


@pytest.mark.parametrize(
    ("images", "number", "refused"),
    [(1, 40, False), (2, 40, True), (1, 4, False), (20, 10_000, False), (21, 10_000, True)],
)
def test_one_image_of_few_is_no_loss(images, number, refused):
    assert export.loses_too_much(100 * images / number, 0.2, number) == refused


def test_calibration_takes_a_folder_with_a_class_of_one_training_image():
    images = torch.zeros(520, 3, 32, 32, dtype=torch.uint8)
    split = Split(images, torch.tensor([1] + [0] * 519))
    folder = make_dataset("folder", split, facts=("ab", (0.5,) * 3, (0.5,) * 3))
    assert len(export.choose_calibration(folder)) == export.CALIBRATION_IMAGES


@pytest.fixture
def same_threads():
    """Timing sets PyTorch's number of threads."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("same_threads")
@pytest.mark.parametrize("part", ["make", "open_onnx"])
def test_exporter_or_runtime_of_another_version_is_one_line(part, demo, monkeypatch, capsys):
    def fail(*_):
        raise NotImplementedError("Unsupported model IR version\nand a long story")

    monkeypatch.setattr(export, "make", lambda *_: b"")
    monkeypatch.setattr(export, part, fail)
    monkeypatch.setattr(export, "check_libraries", list)
    line = ("export", str(demo[0]), "--format", "onnx", "--limit", "20")
    assert run_main(*line, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: format: onnx failed (Unsupported model IR version); install")
    assert not Path("export").exists()


@pytest.mark.usefixtures("same_threads")
def test_network_is_exported_with_its_normalization_and_calibrated_on_training_images(
    demo, monkeypatch
):
    """Without the libraries: the network stands for the file that would be made of it."""
    made = []
    monkeypatch.setattr(export, "make", lambda *args: made.append(args) or b"")
    monkeypatch.setattr(export, "open_onnx", lambda content, threads: made[-1][1])
    monkeypatch.setattr(export, "latency", lambda *_: 0.0)
    monkeypatch.setattr(export, "check_libraries", list)
    model, info = load_model(demo[0] / "model.safetensors")
    del info["architecture"]
    mean, std = [0.9, 0.1, 0.2], [9.0, 1.0, 0.05]
    save_model("other.safetensors", model, info | {"mean": mean, "std": std})
    path, normalize = Path("other.safetensors"), Normalize(mean, std)
    verdicts = export.export(path, format=("onnx-int8",), out=Path("app"))
    ((_, network, calibration, _),) = made
    data = load_dataset(Config(dataset="digits"))
    images = data.test.images[:9] / 255
    torch.testing.assert_close(network(images), model(normalize(images)))
    train, test, used = (
        {image.numpy().tobytes() for image in pixels}
        for pixels in (data.train.images / 255, data.test.images / 255, calibration)
    )
    assert len(calibration) == export.CALIBRATION_IMAGES
    assert used <= train
    assert not used & (test - train)
    accuracy = evaluate(model, data.test, normalize).accuracy
    assert [one.accuracy for one in verdicts] == pytest.approx([accuracy] * 2)
    assert [one.agreement for one in verdicts] == [100, 100]


@needs_onnx
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("small", "checkpoints/small-int8.onnx"),
        ("tiny", "checkpoints/tiny-int8.onnx"),
        ("fast", "web/network.onnx"),
    ],
)
def test_released_int8_is_made_from_the_weights_beside_it(name, file):
    import onnxruntime

    path, content = ROOT / "checkpoints" / f"{name}.safetensors", (ROOT / file).read_bytes()
    metadata = onnxruntime.InferenceSession(content).get_modelmeta().custom_metadata_map
    assert metadata["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    model, info = load_model(path)
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(20, 3, 8, 8, generator=generator), (32, 32), mode="bilinear")
    with torch.inference_mode():
        expected = model(Normalize(info["mean"], info["std"])(images))
    difference = export.open_onnx(content, 1)(images) - expected
    assert difference.std() < 0.15 * expected.std()


@needs_onnx
def test_int8_weights_of_onnx_leave_room_for_sums_of_16_bits(exported):
    """Otherwise CPUs with AVX2 and without VNNI saturate, and half of the answers are wrong."""
    import onnx
    from onnx import numpy_helper

    _, content = open_file("onnx-int8", exported[1])
    initializers = onnx.load_from_string(content).graph.initializer
    weights = [numpy_helper.to_array(one) for one in initializers]
    weights = [one for one in weights if one.dtype == "int8" and one.ndim > 1]
    assert len(weights) > 5
    assert max(abs(one.astype(int)).max() for one in weights) <= 64


@needs_onnx
@pytest.mark.slow
def test_format_that_loses_too_much_is_refused_and_the_rest_is_written(
    exported, monkeypatch, capsys
):
    """A channel of huge values that the next layers ignore: int8 spends its range on it."""
    model, info = load_model(exported[0])
    del info["architecture"]
    with torch.no_grad():
        model.bn1.bias[0] = 1e5
        for layer in (model.stages[0][0].conv1, model.stages[0][0].shortcut[0]):
            layer.weight[:, 0] = 0
    save_model("huge.safetensors", model, info)
    line = ("huge.safetensors", "--format", "onnx-int8", "onnx", "--out", "app")
    assert run_main("export", *line, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: max_drop: onnx-int8 loses ")
    assert "not written" in err
    assert [one.name for one in Path("app").iterdir()] == ["huge.onnx"]
    assert out.count("file: ") == 1


@needs_onnx
def test_float_format_with_other_logits_is_refused_whatever_its_accuracy(exported, monkeypatch):
    class Doubled(torch.nn.Sequential):
        def forward(self, images):
            return 2 * super().forward(images)

    exporter = torch.onnx.export
    wrong = lambda network, *args, **options: exporter(Doubled(network), *args, **options)  # noqa: E731
    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(InputError, match="onnx differs by"):
        export.export(exported[0], format=("onnx",), out=Path("app"))
    assert not Path("app").exists()


@needs_onnx
def test_page_of_somebody_else_stays(monkeypatch, capsys):
    Path("site").mkdir()
    Path("site/index.html").write_text("my own")
    line = ("fast", "--format", "page", "--out", "site")
    assert run_main("export", *line, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    words = "is another page; name another folder, or move it away\n"
    assert (out, err) == ("", f"error: out: {Path('site/index.html')} {words}")
    assert Path("site/index.html").read_text() == "my own"
    assert [one.name for one in Path("site").iterdir()] == ["index.html"]


@needs_onnx
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--limit", "-1"], "limit: -1 must be an integer of at least 0"),
        (["--max-drop", "nan"], "max_drop: nan must be a number from 0 to 100"),
        (["--out", "taken"], "out: taken is a file; name a folder"),
        (["--out", "taken/app"], "taken is no folder that can be written to"),
        (["--examples", "11", "--format", "page"], "examples: 11 must be an integer from 0 to 10"),
        (["--examples", "-1", "--format", "page"], "examples: -1 must be an integer from 0 to 10"),
        (["--examples", "3"], "examples: 3, but no page is asked for; add --format page"),
    ],
)
def test_bad_options_are_one_line(args, words, monkeypatch, capsys):
    Path("taken").touch()
    assert run_main("export", "fast", *args, monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("missing", "asked", "found"),
    [
        ({"onnxscript"}, ("onnx",), "onnxscript"),
        ({"onnxscript"}, (), ["pte", "pte-int8"]),
        ({"torchao"}, ("pte",), ["pte"]),
        ({"onnx", "executorch"}, (), "executorch, onnx"),
    ],
)
def test_missing_library_is_named_or_its_formats_are_left_out(missing, asked, found, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    if isinstance(found, list):
        assert export.check_libraries(asked) == found
    else:
        with pytest.raises(InputError, match=f"format: {found}: not installed; run `pip install"):
            export.check_libraries(asked)
