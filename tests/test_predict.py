"""predict.py: every kind of picture, of file and of name; and its answers."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, run_main
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, features

import predict
from data import Normalize
from engine.checkpoint import save_model
from engine.pictures import heic_support, list_files, read_or_explain, read_picture
from model import Architecture, ResNet
from utils import InputError, read_csv

RNG = np.random.default_rng(0)
# Smooth, so that the losses of JPEG and the like do not matter: (60, 90, 3), no two corners alike.
Y, X = np.mgrid[0:60, 0:90]
PHOTO = np.stack([2 * X, 4 * Y, 255 - X - Y], axis=-1).clip(0, 255).astype(np.uint8)
GRAY = PHOTO[..., 0]
INFO = {
    "class_names": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "dataset": "cifar10",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ResNet(Architecture((1, 1, 1), 4)).eval()


@pytest.fixture
def checkpoint(network):
    save_model("plain.safetensors", network, INFO)
    return "plain.safetensors"


def png(image=None):
    file = io.BytesIO()
    (image or Image.fromarray(PHOTO)).save(file, "PNG")
    return file.getvalue()


def seen(image, resize="crop", **options):
    """The network's view of an image that is written to a file, (3, 32, 32) int."""
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    file.seek(0)
    return read_picture(file, resize).int()


def png_of(depth, kind, samples, **chunks):
    """A PNG of so many bits a sample, (32, 32, C) integers; `kind` is its color type."""
    wide = np.asarray(samples).reshape(32, -1)
    if depth < 8:
        rows = np.packbits((wide[..., None] >> np.arange(depth)[::-1] & 1).reshape(32, -1), axis=1)
    else:
        rows = wide.astype(f">u{depth // 8}")
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 32, 32, depth, kind, 0, 0, 0)
    return png_file(IHDR=header, **chunks, IDAT=content, IEND=b"")


def png_file(**chunks):
    """A PNG of chunks."""
    parts = []
    for name, content in chunks.items():
        checked = name.encode() + content
        crc = struct.pack(">I", zlib.crc32(checked))
        parts.append(struct.pack(">I", len(content)) + checked + crc)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of(data, **tags):
    """A TIFF of 32x32 pixels in gray, as Pillow itself writes none."""
    values = {"ImageWidth": 32, "ImageLength": 32, "Compression": 1, "RowsPerStrip": 32} | tags
    values |= {"PhotometricInterpretation": 1, "StripByteCounts": len(data), "StripOffsets": 0}
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in values.items():
        ifd[ExifTags.Base[name]] = value
    # Pillow adds the place of the data to the offset.
    return b"II*\0\x08\0\0\0" + ifd.tobytes(8) + data


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
        ("CMYK", {"format": "TIFF"}, 0),
        ("CMYK", {"format": "JPEG", "quality": 95}, 8),
        ("YCbCr", {"format": "TIFF"}, 3),
        ("LAB", {"format": "TIFF"}, 40),
        ("RGBX", {"format": "TIFF"}, 0),
        ("P", {"format": "GIF"}, 32),  # the nearest of a palette's colors
    ],
)
def test_color_pictures_of_every_mode_are_the_same_picture(mode, options, tolerance):
    image = Image.fromarray(PHOTO).convert(mode)
    assert close(seen(image, **options), expected(PHOTO), tolerance)


def test_grayscale_of_8_and_16_bits_is_gray():
    gray = expected(np.stack([GRAY] * 3, axis=-1))
    wide = Image.fromarray(GRAY.astype(np.uint16) * 257)
    for image in (Image.fromarray(GRAY), wide, Image.fromarray(GRAY).convert("LA")):
        assert close(seen(image), gray, 0)
    assert close(seen(wide, format="TIFF"), gray, 0)
    with pytest.raises(ValueError, match="save it with 8 bits"):
        seen(Image.fromarray(GRAY.astype(np.float32)), format="TIFF")


def test_gray_of_32_bits_has_the_range_of_its_own_values():
    gray = expected(np.stack([GRAY] * 3, axis=-1))
    for scale in (1, 257):
        wide = Image.fromarray(GRAY.astype(np.int32) * scale)
        assert close(seen(wide, format="TIFF"), gray, 0)
        assert close(seen(wide, format="TIFF", compression="tiff_lzw"), gray, 0)
    dark = Image.fromarray(GRAY.astype(np.int32))
    assert (seen(dark, format="PPM") <= 1).all()  # 16 bits, and so says the file
    for scale, words in ((400, "integers from 0 to 71200"), (-1, "integers from -178 to 0")):
        with pytest.raises(ValueError, match=f"{words}; save it with 8 bits"):
            seen(Image.fromarray(GRAY.astype(np.int32) * scale), format="TIFF")


def test_rare_tiffs_of_gray_are_gray():
    twelve = np.packbits(np.tile([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], 32 * 32)).tobytes()  # 128
    content = tiff_of(twelve, BitsPerSample=12)
    assert (read_picture(io.BytesIO(content)) == 8).all()
    half = tiff_of(
        bytes([30, 128] * 32 * 32), BitsPerSample=(8, 8), SamplesPerPixel=2, ExtraSamples=1
    )
    shown = read_picture(io.BytesIO(half)).int()  # 30 of its own, and half of white
    assert close(shown, 30 + 127)


TRANSPARENT = {  # the left half is transparent, and the right half is what is shown
    "gray of 1 bit": (1, 0, 1, 0, 1, 0),
    "gray of 2 bits": (2, 0, 1, 2, 1, 170),
    "gray of 4 bits": (4, 0, 5, 6, 5, 102),
    "gray of 8 bits": (8, 0, 5, 6, 5, 6),
    "gray of 16 bits": (16, 0, 0x1234, 0x1235, 0x1234, 18),
    "RGB of 8 bits": (8, 2, [1, 2, 3], [128] * 3, [1, 2, 3], 128),
    "RGB of 16 bits": (16, 2, [0x1234, 2, 3], [0x8080] * 3, [0x1234, 2, 3], 128),
    "gray and alpha of 16 bits": (16, 4, [5, 0], [0x8080, 0xFFFF], None, 128),
    "RGBA of 16 bits": (16, 6, [5, 5, 5, 0], [0x8080] * 3 + [0xFFFF], None, 128),
    "palette": (8, 3, 0, 1, None, 9),
    "palette of 1 bit": (1, 3, 0, 1, None, 9),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_color_of_a_png_shows_white(name):
    depth, kind, left, right, color, shown = TRANSPARENT[name]
    samples = np.stack([np.stack([left] * 16 + [right] * 16)] * 32)
    chunks = {"PLTE": bytes([7] * 3 + [9] * 3), "tRNS": bytes([0, 255])} if kind == 3 else {}
    if color:
        chunks["tRNS"] = np.array(color, ">u2").tobytes()
    found = read_picture(io.BytesIO(png_of(depth, kind, samples, **chunks)))
    assert (found[:, :, :16] == 255).all()
    assert (found[:, :, 16:] == shown).all()


def test_transparency_shows_white():
    alpha = np.full((60, 90, 1), 51, np.uint8)  # a fifth
    mixed = (255 - (255 - PHOTO.astype(float)) / 5).round().astype(np.uint8)
    assert close(seen(Image.fromarray(np.concatenate([PHOTO, alpha], axis=-1))), expected(mixed))
    palette = Image.new("P", (60, 60), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (seen(palette, transparency=1) == 255).all()
    assert (seen(palette) == 9).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_whatever_the_other_tags_are(orientation):
    stored = Image.fromarray(PHOTO)
    stored.getexif()[0x0112] = orientation
    upright = seen(ImageOps.exif_transpose(stored))
    for file_format in ("PNG", "TIFF"):  # Pillow itself turns a TIFF as it loads
        exif = stored.getexif().tobytes()
        assert torch.equal(seen(stored, exif=exif, format=file_format), upright)
    resolution_as_text = struct.pack(">HHI4s", 0x011A, 2, 3, b"72")
    tags = struct.pack(">HHIHxx", 0x0112, 3, 1, orientation) + resolution_as_text
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + bytes(4)
    assert torch.equal(seen(stored, exif=exif), upright)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_turns_nothing(file_format):
    picture = Image.fromarray(PHOTO)
    damaged = seen(picture, exif=b"Exif\0\0" + bytes(40), format=file_format)
    assert torch.equal(damaged, seen(picture, format=file_format))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_of_several_counts(file_format):
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    red = seen(first, format=file_format, save_all=True, append_images=[second])
    assert close(red[:, 16, 16], torch.tensor([255, 0, 0]), 1)


def test_pictures_of_a_folder_are_those_with_a_suffix_that_is_read(tmp_path):
    """Those that Pillow registers, and those that it reads by the plugin of another format."""
    names = ["a.JPG", "b.jpeg", "c.mpo", "d.webp", "e.heic", "f.txt", "g.eps"]
    for name in names:
        (tmp_path / name).touch()
    pictures, others = list_files(tmp_path)
    assert [path.name for path in pictures] == names[:5]
    assert [path.name for path in others] == names[5:]


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


def test_heic_is_read_where_its_library_is():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(PHOTO)).save(file, quality=100)
    file.seek(0)
    assert close(read_picture(file).int(), expected(PHOTO), 8)


def test_heic_without_its_library_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    heic_support.cache_clear()
    Path("phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    try:
        _, problem = read_or_explain(Path("phone.heic"))
    finally:
        heic_support.cache_clear()
    assert "pip install pillow-heif" in problem


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_whose_first_brand_is_that_of_heif_is_read():
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "AVIF", quality=100)
    content = file.getvalue()
    assert content[8:12] == b"avif"
    assert b"avif" in content[12:40]
    file = io.BytesIO(content[:8] + b"mif1" + content[12:])
    assert close(read_picture(file).int(), expected(PHOTO), 8)


# ---------------------------------------------------------------- bad files, bad options


def bomb():
    """A PNG that claims 3.6 gigapixels and holds next to nothing."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return png_file(IHDR=header, IDAT=zlib.compress(bytes(99)))


BAD = {
    "bomb.png": (bomb(), "more than 178,956,970 pixels"),
    "corrupt.png": (png()[:60] + bytes(500), "cannot be read"),
    "empty.png": (b"", "is empty"),
    "foreign.jpg": (b"hello, world", "no picture that Pillow can read"),
    "truncated.png": (png()[:-200], "truncated"),
}


def test_bad_pictures_are_a_line_each_and_the_others_are_answered(checkpoint, monkeypatch, capsys):
    folder = Path("photos")
    folder.mkdir()
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    (folder / "z.png").write_bytes(png())
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    line = ("photos", "--checkpoint", checkpoint, "--json", "a.json", "--csv", "a.csv")
    assert run_main("predict", *line, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    (answer,) = out.splitlines()
    assert answer.startswith(f"{folder / 'z.png'}: ")
    assert f"warning: {folder}: 1 file that is no picture was left out (notes.txt)" in err
    assert ".hidden" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for (name, (_, problem)), found in zip(BAD.items(), errors, strict=False):
        assert name in found
        assert problem in found
    assert errors[-1] == "error: images: 5 of 6 could not be read"
    answers = json.loads(Path("a.json").read_text())["images"]
    assert [Path(row["file"]).name for row in answers] == [*BAD, "z.png"]
    assert [row["error"] is None for row in answers] == [False] * 5 + [True]
    rows = read_csv("a.csv")
    columns = ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [list(row) for row in rows] == [columns] * 6
    assert [row["error"] for row in rows] == [row["error"] for row in answers]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "images: none is named"),
        (["*.tiff"], "'*.tiff' does not exist, and matches no file"),
        (["https://example.com/a.jpg"], "is an address; download the picture first"),
        (["-", "-"], "can be read only once"),
        (["empty"], "empty holds no picture"),
        (["empt*"], "empt* holds no picture"),
        (["a.png", "--top", "11"], "top: 11 must be an integer from 1 to 10"),
        (["a.png", "--batch-size", "0"], "batch_size: 0"),
        (["a.png", "--csv", "empty"], "csv: empty is a folder; name a file"),
        (["a.png", "--checkpoint", "none.safetensors"], "none.safetensors does not exist"),
    ],
)
def test_bad_command_lines_are_refused(args, words, checkpoint, monkeypatch, capsys):
    Path("empty").mkdir()
    Path("a.png").write_bytes(png())
    if "--checkpoint" not in args:
        args = [*args, "--checkpoint", checkpoint]
    assert run_main("predict", *args, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert words in err.splitlines()[-1]
    assert not out


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("options", [[], ["--tta"]])
def test_answers_are_those_of_the_network(options, network, checkpoint, monkeypatch, capsys):
    """In batches of three, and from Python in one."""
    pixels = RNG.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(f"{i}.png")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    x = Normalize(INFO["mean"], INFO["std"])(images)
    with torch.no_grad():
        logits = (network(x) + network(x.flip(-1))) / 2 if options else network(x)
    values, classes = logits.softmax(1).topk(3)
    line = ["*.png", "--top", 3, "--checkpoint", checkpoint, "--batch-size", 3, "--json", "a.json"]
    line += ["--csv", "a.csv"]
    assert run_main("predict", *line, *options, monkeypatch=monkeypatch) == 0
    table = read_csv("a.csv")
    found = json.loads(Path("a.json").read_text())
    assert (found["checkpoint"], found["temperature"]) == (checkpoint, None)
    for i, row in enumerate(found["images"]):
        assert row["file"] == f"{i}.png"
        names = [one["class"] for one in row["predictions"]]
        assert names == [INFO["class_names"][c] for c in classes[i]]
        assert names == [table[i][f"class_{n}"] for n in (1, 2, 3)]
        probabilities = [one["probability"] for one in row["predictions"]]
        assert probabilities == pytest.approx(values[i].tolist(), abs=1e-4)
    out, err = capsys.readouterr()
    first = f"0.png: {INFO['class_names'][classes[0, 0]]} {100 * values[0, 0]:.1f}%, "
    assert out.startswith(first)
    assert "not calibrated" in err
    answers = predict.predict(("*.png",), Path(checkpoint), top=3, tta=bool(options))
    assert [a["predictions"][0]["class"] for a in answers] == [
        a["predictions"][0]["class"] for a in found["images"]
    ]


def test_answers_are_about_the_resized_picture_that_is_asked_for(checkpoint):
    edges = np.zeros((32, 96, 3), np.uint8)
    edges[:, :32] = edges[:, 64:] = 255
    Image.fromarray(edges).save("a.png")
    cropped, squashed = (
        predict.predict(("a.png",), Path(checkpoint), resize=resize)[0]["predictions"]
        for resize in ("crop", "squash")
    )
    assert cropped != squashed


def test_temperature_divides_the_logits(network, checkpoint, monkeypatch, capsys):
    save_model("cold.safetensors", network, INFO | {"temperature": 0.5})
    Path("a.png").write_bytes(png())
    found = {}
    for path in (checkpoint, "cold.safetensors"):
        line = ["a.png", "--top", 10, "--checkpoint", path, "--csv", "a.csv"]
        assert run_main("predict", *line, monkeypatch=monkeypatch) == 0
        (row,) = read_csv("a.csv")
        by_class = {row[f"class_{i}"]: row[f"probability_{i}"] for i in range(1, 11)}
        found[path] = torch.tensor([by_class[name] for name in INFO["class_names"]])
    squared = found[checkpoint].double() ** 2
    assert torch.allclose(found["cold.safetensors"], (squared / squared.sum()).float(), atol=1e-4)
    assert "calibrated for images like those it was trained on" in capsys.readouterr().err


def test_stdin_pipes_globs_and_folders_name_the_same_picture(checkpoint, monkeypatch, capsys):
    path = Path("deep/er/a b.png")
    path.parent.mkdir(parents=True)
    path.write_bytes(png())
    line = command("predict.py", "-", "--checkpoint", checkpoint)
    result = subprocess.run(
        line,
        input=path.read_bytes(),
        capture_output=True,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},  # lists the imports on stderr
    )
    assert result.returncode == 0, result.stderr
    assert b" torch\n" in result.stderr
    assert b" torch._dynamo\n" not in result.stderr  # PyTorch's compiler: as long as the rest
    found = [result.stdout.decode().strip().rpartition(": ")[2]]
    Path("deep/empty").mkdir()
    for source in ("deep", "deep/**/*.png", "deep/**", "deep/*", str(path)):
        assert run_main("predict", source, "--checkpoint", checkpoint, monkeypatch=monkeypatch) == 0
        (line,) = capsys.readouterr().out.splitlines()
        found.append(line.rpartition(": ")[2])
    assert len(set(found)) == 1


def test_names_may_hold_any_bytes(checkpoint, monkeypatch, capsys):
    names = ["\x1b[2J.png", "ü ö.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"\xff\xfe.png"))
    for name in names:
        Path(name).write_bytes(png())
    line = [*names, "--checkpoint", checkpoint, "--json", "a.json", "--csv", "a.csv"]
    assert run_main("predict", *line, monkeypatch=monkeypatch) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert [row["file"] for row in json.loads(Path("a.json").read_text())["images"]] == names
    assert [row["file"] for row in read_csv("a.csv")][:2] == names[:2]


def test_answers_are_written_where_stdout_is_closed(checkpoint, monkeypatch):
    Path("a.png").write_bytes(png())
    monkeypatch.setattr("sys.stdout", None)
    line = ("a.png", "--checkpoint", checkpoint, "--json", "a.json")
    assert run_main("predict", *line, monkeypatch=monkeypatch) == 0
    assert Path("a.json").exists()


def test_a_file_may_be_named_like_stdin():
    Path("-").touch()
    assert predict.find_pictures(("./-", "-")) == ["./-", "-"]


def test_a_full_disk_under_stdout_is_named_and_no_file_is_written(checkpoint, monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    Path("a.png").write_bytes(png())
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        line = ["a.png", "--checkpoint", checkpoint, "--csv", "a.csv"]
        assert run_main("predict", *line, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: stdout: cannot be written")
    assert not Path("a.csv").exists()


def test_broken_pipe_leaves_no_file(checkpoint, monkeypatch, capsys):
    """As with `| head`, and no half of an answer is left."""
    Path("a.png").write_bytes(png())
    line = ["a.png", "--checkpoint", checkpoint, "--json", "a.json"]
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert run_main("predict", *line, monkeypatch=monkeypatch) == 128 + 13
    assert "error" not in capsys.readouterr().err
    assert not Path("a.json").exists()


def test_eps_is_not_opened_since_ghostscript_would_run_it():
    Image.fromarray(PHOTO).save("a.eps")
    assert read_or_explain("a.eps") == (None, "is no picture that Pillow can read")


# ---------------------------------------------------------------- from Python


def test_classify_gives_the_probabilities_of_predict_for_files_and_opened_pictures(network):
    save_model("warm.safetensors", network, INFO | {"temperature": 2.0})
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(PHOTO).save("a.png", exif=exif)
    sixteen = np.stack([np.stack([[0x1234, 2, 3]] * 16 + [[0x8080] * 3] * 16)] * 32)
    color = np.array([0x1234, 2, 3], ">u2").tobytes()
    Path("b.png").write_bytes(png_of(16, 2, sixteen, tRNS=color))
    Image.fromarray(PHOTO).convert("CMYK").save("c.tif")
    files = ["a.png", "b.png", "c.tif"]
    answers = predict.predict(tuple(files), Path("warm.safetensors"), top=10)
    expected = [[tuple(one.values()) for one in answer["predictions"]] for answer in answers]
    loaded = Image.open("a.png")
    loaded.load()
    for images in (files, map(Path, files), map(Image.open, files)):
        found = predict.classify(images, "warm.safetensors")
        assert [list(one.items()) for one in found] == expected
    (found,) = predict.classify([loaded], Path("warm.safetensors"))
    assert list(found.items()) == expected[0]
    assert sum(found.values()) == pytest.approx(1, abs=1e-4)
    assert predict.classify([], "warm.safetensors") == []


def test_classify_is_not_changed_by_the_defaults_of_the_program(checkpoint):
    Image.fromarray(PHOTO).save("a.png")
    expected = predict.classify(["a.png"], checkpoint)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = predict.classify(["a.png"], checkpoint)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_classify_answers_for_itself_in_one_of_several_processes(checkpoint, monkeypatch):
    Image.fromarray(PHOTO).save("a.png")
    expected = predict.classify(["a.png"], checkpoint)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert predict.classify(["a.png"], checkpoint) == expected


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("a.png", "images: 'a.png' is one picture; put it into a list"),
        (["none.png"], "images: none.png cannot be read (No such file or directory)"),
        ([Image.new("F", (9, 9))], "its pixels are floating-point numbers"),
    ],
)
def test_classify_refuses_what_is_no_list_of_pictures(images, words, checkpoint):
    with pytest.raises(InputError) as raised:
        predict.classify(images, checkpoint)
    assert words in str(raised.value)


def test_predict_takes_paths_and_their_names(checkpoint):
    Image.fromarray(PHOTO).save("photo.png")
    by_path, by_name = (
        predict.predict([name], checkpoint) for name in (Path("photo.png"), "photo.png")
    )
    assert by_path == by_name


@pytest.mark.parametrize("images", ["photo.jpg", Path("photos")])
def test_predict_refuses_a_path_that_is_in_no_list(images):
    with pytest.raises(InputError, match=r"^images: '.*' is one path; put it into a list$"):
        predict.predict(images)
