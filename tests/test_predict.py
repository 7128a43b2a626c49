"""predict.py: every kind of picture, of file and of name; and what it tells."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, run, run_main
from PIL import Image

import predict
from data import load_dataset
from metrics import calibrate, evaluate, fit_temperature
from train import train
from utils import InputError, normalizer, read_csv
from weights import load_model, save_model

RNG = np.random.default_rng(0)
# Smooth, so that what JPEG and the like lose does not matter: (60, 90, 3), no two corners alike.
Y, X = np.mgrid[0:60, 0:90]
PHOTO = np.stack([2 * X, 4 * Y, 255 - X - Y], axis=-1).clip(0, 255).astype(np.uint8)
GRAY = PHOTO[..., 0]


def seen(image, resize="crop", **options):
    """What the network sees of an image that is written to a file, (3, 32, 32) int."""
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    file.seek(0)
    return predict.read_picture(file, resize).int()


def expected(pixels):
    """Pillow's antialiased scaling of the middle square of (60, 90, 3) pixels."""
    square = Image.fromarray(pixels[:, 15:75]).resize((32, 32), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square.convert("RGB"))).permute(2, 0, 1).int()


def close(a, b, tolerance=1):
    return (a - b).abs().max() <= tolerance


# ---------------------------------------------------------------- kinds of picture


@pytest.mark.parametrize(
    ("mode", "options", "tolerance"),
    [
        ("RGB", {"format": "PNG"}, 0),
        ("RGB", {"format": "JPEG", "quality": 95}, 8),
        ("RGB", {"format": "WEBP", "lossless": True}, 0),
        ("RGB", {"format": "AVIF", "quality": 100}, 8),
        ("CMYK", {"format": "JPEG", "quality": 95}, 8),
        ("CMYK", {"format": "TIFF"}, 0),
        ("RGBA", {"format": "PNG"}, 0),
        ("P", {"format": "PNG"}, 32),  # the nearest of a palette's colors
        ("P", {"format": "GIF"}, 32),
    ],
)
def test_color_pictures_of_every_mode_are_the_same_picture(mode, options, tolerance):
    image = Image.fromarray(PHOTO).convert(mode)
    assert close(seen(image, **options), expected(PHOTO), tolerance)


def test_grayscale_of_8_and_16_bits_is_gray():
    gray = expected(np.stack([GRAY] * 3, axis=-1))
    assert close(seen(Image.fromarray(GRAY)), gray, 0)
    wide = GRAY.astype(np.uint16) * 257
    assert close(seen(Image.fromarray(wide)), gray, 0)
    assert close(seen(Image.fromarray(wide), format="TIFF"), gray, 0)
    assert close(seen(Image.fromarray(wide), format="PPM"), gray, 0)
    assert close(seen(Image.fromarray(GRAY).convert("LA")), gray, 0)


def test_transparency_shows_white():
    alpha = np.full((60, 90, 1), 51, np.uint8)  # a fifth
    mixed = (255 - (255 - PHOTO.astype(float)) / 5).round().astype(np.uint8)
    rgba = Image.fromarray(np.concatenate([PHOTO, alpha], axis=-1))
    assert close(seen(rgba), expected(mixed))
    clear = Image.fromarray(np.concatenate([PHOTO, 0 * alpha], axis=-1))
    assert (seen(clear) == 255).all()
    palette = Image.new("P", (60, 60), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (seen(palette, transparency=1) == 255).all()
    assert (seen(palette) == 9).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image, exif = Image.fromarray(PHOTO), Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(undo[orientation]) if orientation in undo else image
    assert close(seen(stored, exif=exif.tobytes()), expected(PHOTO), 0)


def test_first_frame_of_an_animation_counts():
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    red = seen(first, format="GIF", save_all=True, append_images=[second])
    assert red[:, 16, 16].tolist() == [255, 0, 0]


def test_crop_is_floored_and_squash_takes_all():
    edges = np.zeros((33, 64, 3), np.uint8)
    edges[:, :15] = edges[:, 48:] = 255  # left of the square and right of it
    assert (seen(Image.fromarray(edges)) == 0).all()
    assert (seen(Image.fromarray(edges), "squash") == 255).any()
    assert (seen(Image.fromarray(edges[:, 14:])) == 255).any()


def test_large_pictures_are_antialiased_and_small_ones_stay_as_they_are():
    checkers = np.indices((320, 320)).sum(0) % 2 * 255
    gray = seen(Image.fromarray(checkers.astype(np.uint8)))
    assert ((gray >= 120) & (gray <= 135)).all()
    small = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert torch.equal(seen(Image.fromarray(small)).permute(1, 2, 0), torch.tensor(small).int())


# ---------------------------------------------------------------- files that are none


def chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png_of(width, height):
    """A PNG that claims a size and holds next to nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99)))


def sound_png():
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "PNG")
    return file.getvalue()


BAD = {
    "empty.png": (b"", "is empty"),
    "foreign.jpg": (b"hello, world", "no picture that Pillow can read"),
    "truncated.png": (sound_png()[:-200], "truncated"),
    "corrupt.png": (sound_png()[:60] + bytes(500), "cannot be read"),
    "bomb.png": (png_of(60_000, 60_000), "more than 178,956,970 pixels"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(200), "HEIC needs `pip install pillow-heif`"),
}


@pytest.fixture
def checkpoint(demo):
    return demo[0] / "model.safetensors"


def test_what_is_no_picture_is_a_line_and_the_rest_is_done(
    checkpoint, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    Image.fromarray(PHOTO).save(folder / "z.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    line = ("photos", "--checkpoint", checkpoint, "--json", "a.json", "--csv", "a.csv")
    monkeypatch.setattr(predict, "heic_support", lambda: False)
    assert run_main(predict.main, *line, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.startswith(f"{Path('photos/z.png')}: ")
    assert "notes.txt" in err
    assert ".hidden" not in err
    for name, (_, problem) in BAD.items():
        (found,) = [line for line in err.splitlines() if name in line]
        assert found.startswith("error: ")
        assert problem in found
    assert err.splitlines()[-1] == f"error: {len(BAD)} of the files could not be read"
    answers = json.loads(Path("a.json").read_text())["images"]
    assert [Path(row["file"]).name for row in answers] == [*sorted(BAD), "z.png"]
    assert [row["error"] is None for row in answers] == [False] * len(BAD) + [True]
    assert [row["error"] for row in read_csv("a.csv")][:-1] == [r["error"] for r in answers][:-1]


def test_heic_is_read_where_its_library_is():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(PHOTO)).save(file, quality=100)
    file.seek(0)
    assert close(predict.read_picture(file).int(), expected(PHOTO), 8)


def test_floating_point_pixels_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="save it with 8 bits"):
        seen(Image.fromarray(PHOTO[..., 0].astype(np.float32)), format="TIFF")


def test_a_file_may_be_called_as_stdin_is():
    Path("-").touch()
    assert predict.find_pictures(("./-", "-")) == ["./-", "-"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "images: none is named"),
        (["nothing.jpg"], "'nothing.jpg' does not exist, and matches no file"),
        (["*.tiff"], "'*.tiff' does not exist, and matches no file"),
        (["https://example.com/a.jpg"], "is an address; download the picture first"),
        (["-", "-"], "can be read only once"),
        (["a.eps"], "1 of the files could not be read"),  # a program for Ghostscript
        (["empty"], "empty holds no picture"),
        (["a.png", "--top", "11"], "top: 11 must be an integer from 1 to 10"),
        (["a.png", "--batch-size", "0"], "batch_size: 0"),
        (["a.png", "--json", "empty"], "json: empty is a folder; name a file"),
        (["a.png", "--csv", "empty"], "csv: empty is a folder; name a file"),
        (["a.png", "--resize", "pad"], "resize"),
        (["a.png", "--checkpoint", "none.safetensors"], "none.safetensors does not exist"),
    ],
)
def test_bad_command_lines_are_refused_before_any_work(
    args, words, checkpoint, monkeypatch, capsys
):
    Path("empty").mkdir()
    Image.fromarray(PHOTO).save("a.png")
    Image.fromarray(PHOTO).save("a.eps")
    if "--checkpoint" not in args:
        args = [*args, "--checkpoint", str(checkpoint)]
    assert run_main(predict.main, *args, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert words in err.splitlines()[-1]
    assert not out


# ---------------------------------------------------------------- answers


def test_answers_are_those_of_the_network(checkpoint, monkeypatch, capsys):
    """By hand, from the metadata alone; also mirrored, and whatever the batch."""
    model, info = load_model(checkpoint)
    pixels = RNG.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(f"{i}.png")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    x = normalizer(info["mean"], info["std"], torch.device("cpu"))(images)
    for options, logits in (([], model(x)), (["--tta"], (model(x) + model(x.flip(-1))) / 2)):
        values, classes = logits.softmax(1).topk(3)
        line = ["*.png", "--top", "3", "--checkpoint", checkpoint, "--batch-size", "3", *options]
        assert run_main(predict.main, *line, "--json", "a.json", monkeypatch=monkeypatch) == 0
        found = json.loads(Path("a.json").read_text())
        assert found["temperature"] is None
        for i, row in enumerate(found["images"]):
            assert row["file"] == f"{i}.png"
            names = [one["class"] for one in row["predictions"]]
            assert names == [info["class_names"][c] for c in classes[i]]
            told = [one["probability"] for one in row["predictions"]]
            assert told == pytest.approx(values[i].tolist(), abs=1e-4)
        first = f"0.png: {info['class_names'][classes[0, 0]]} {100 * values[0, 0]:.1f}%, "
        out, err = capsys.readouterr()
        assert out.startswith(first)
        assert "not calibrated" in err


def test_temperature_divides_the_logits(checkpoint, monkeypatch, capsys):
    model, info = load_model(checkpoint)
    save_model("cold.safetensors", model, info | {"temperature": 0.5})
    Image.fromarray(PHOTO).save("a.png")
    told = {}
    for path in (checkpoint, "cold.safetensors"):
        line = ["a.png", "--top", "10", "--checkpoint", path, "--csv", "a.csv"]
        assert run_main(predict.main, *line, monkeypatch=monkeypatch) == 0
        (row,) = read_csv("a.csv")
        told[path] = torch.tensor([row[f"probability_{i}"] for i in range(1, 11)])
    squared = told[checkpoint].double() ** 2
    assert torch.allclose(told["cold.safetensors"], (squared / squared.sum()).float(), atol=1e-4)
    assert "calibrated for images like" in capsys.readouterr().err


def test_temperature_out_of_range_is_no_model(checkpoint):
    model, info = load_model(checkpoint)
    for bad in (0, -1.0, 1e9, "hot"):
        with pytest.raises(InputError, match="temperature"):
            save_model("bad.safetensors", model, info | {"temperature": bad})


def test_temperature_makes_probabilities_come_true():
    """Labels drawn from a softmax: of logits three times as large, it finds 3 again."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    temperature = fit_temperature(3 * logits, labels)
    assert temperature == pytest.approx(3, rel=0.03)
    assert calibrate(3 * logits, labels).error > 15
    assert calibrate(3 * logits / temperature, labels).error < 1.5
    always_right = fit_temperature(5 * torch.eye(10), torch.arange(10))
    assert 0.05 <= always_right < 0.5  # the lower the better, with no end


def test_stdin_pipes_globs_and_folders_name_the_same_picture(
    checkpoint, tmp_path, monkeypatch, capsys
):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "deep" / "er" / "a b.png"
    Image.fromarray(PHOTO).save(path)
    monkeypatch.chdir(tmp_path)
    line = command("predict.py", "--checkpoint", checkpoint)
    told = []
    for source in ("-", "/dev/stdin"):
        if source == "/dev/stdin" and not os.path.exists(source):  # noqa: PTH110
            continue
        result = subprocess.run(
            [*line, source],
            input=path.read_bytes(),
            capture_output=True,
            env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},  # what is loaded, on stderr
        )
        assert result.returncode == 0, result.stderr
        assert b" torch\n" in result.stderr
        assert b" torch._dynamo\n" not in result.stderr  # PyTorch's compiler: as long as the rest
        told.append(result.stdout.decode().strip().rpartition(": ")[2])
    for source in ("deep", "deep/**/*.png", "deep/er/a b.png"):
        line = [source, "--checkpoint", checkpoint]
        assert run_main(predict.main, *line, monkeypatch=monkeypatch) == 0
        told.append(capsys.readouterr().out.strip().rpartition(": ")[2])
    assert len(set(told)) == 1


def test_names_in_any_bytes_and_escapes_are_safe(checkpoint, monkeypatch, capsys):
    names = ["\x1b[2J.png", "ü ö.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"\xff\xfe.png"))
    for name in names:
        Image.fromarray(PHOTO).save(name)
    line = [*names, "--checkpoint", checkpoint, "--json", "a.json", "--csv", "a.csv"]
    assert run_main(predict.main, *line, monkeypatch=monkeypatch) == 0
    assert "\x1b" not in capsys.readouterr().out
    rows = json.loads(Path("a.json").read_text())["images"]
    assert [row["file"] for row in rows] == names
    assert b"\xff" in Path("a.csv").read_bytes() or sys.platform != "linux"


def test_broken_pipe_leaves_no_answers(checkpoint):
    """`| head` ends it as it ends any program, and no half of a file is left."""
    for i in range(40):
        Image.fromarray(PHOTO).save(f"{i}.png")
    line = command("predict.py", "*.png", "--checkpoint", checkpoint, "--json", "a.json")
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 128 + 13
    assert "written" not in result.stderr
    assert not Path("a.json").exists()


def test_memory_does_not_grow_with_the_number_of_files(checkpoint, monkeypatch):
    """No more than a batch of pictures is alive at any time."""
    Image.fromarray(PHOTO).save("a.png")
    alive, most, read_picture = [0], [0], predict.read_picture

    class Counted:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    def counted(stream, resize):
        picture = read_picture(stream, resize)
        picture.counted = Counted()
        return picture

    monkeypatch.setattr(predict, "read_picture", counted)
    line = ["a.png"] * 40 + ["--batch-size", "4", "--checkpoint", checkpoint]
    assert run_main(predict.main, *line, monkeypatch=monkeypatch) == 0
    assert most[0] <= 9  # a batch, and the one before until its names are bound again


def test_validation_images_give_a_run_its_temperature(tiny):
    train(replace(tiny, val_size=100))
    train(replace(tiny, name="none"))
    model, info = load_model("checkpoints/tiny/model.safetensors")
    data = load_dataset("digits", val_size=100)
    logits = evaluate(model, data.val.images, data.normalize)
    assert info["temperature"] == pytest.approx(fit_temperature(logits, data.val.labels), rel=1e-3)
    assert load_model("checkpoints/none/model.safetensors")[1]["temperature"] is None


def test_test_tells_calibration_before_and_after(checkpoint):
    model, info = load_model(checkpoint)
    save_model("cold.safetensors", model, info | {"temperature": 2.0})
    result = run("test.py", "cold.safetensors", "--json", "a.json")
    assert result.returncode == 0, result.stderr
    assert "with the temperature of its validation images, 2.000: " in result.stdout
    found = json.loads(Path("a.json").read_text())
    assert found["temperature"] == 2
    assert found["calibrated_mean_confidence"] < found["mean_confidence"]
    assert found["calibrated_error"] != found["calibration_error"]
