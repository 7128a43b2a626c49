"""web/index.html in a browser, beside predict.py: the same pictures, the same answers.

Needs `pip install playwright onnxruntime`, Chromium, and the npm package onnxruntime-web in the
page's version: its `dist` folder is named by the environment variable ORT_WEB, or lies in
node_modules/. The browser gets the CDN's files from there, so the tests need no network.
"""

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageCms

import predict
from data import load_dataset

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs `pip install onnxruntime`")

WEB = ROOT / "web"
MODEL = WEB / "fast-int8.onnx"
CHROMIUM = Path("/usr/bin/chromium")
DIST = Path(os.environ.get("ORT_WEB", ROOT / "node_modules/onnxruntime-web/dist"))
HTML = (WEB / "index.html").read_text(encoding="utf-8")
CDN = re.search(r'const CDN = "(.*)"', HTML).group(1)
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
RNG = np.random.default_rng(0)
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs Chromium at {CHROMIUM}"),
    pytest.mark.skipif(not DIST.is_dir(), reason="needs onnxruntime-web's dist folder: ORT_WEB"),
    pytest.mark.skipif(not MODEL.exists(), reason=f"needs {MODEL.name} in web/: python export.py"),
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder):
    """A server of its own for this folder; gives the address of the page in it."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@pytest.fixture(scope="module")
def address():
    with serve(WEB) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, address, pattern, answer):
    """The page on a phone, which has a camera; `page.asked` lists what it fetches."""
    page = browser.new_context(is_mobile=True, has_touch=True).new_page()
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.route(pattern, answer)
    page.goto(address)
    return page


def answer_for_cdn(route):
    name = route.request.url.removeprefix(CDN)
    kind = "application/wasm" if name.endswith(".wasm") else "text/javascript"
    headers = {"access-control-allow-origin": "*", "content-type": kind}
    route.fulfill(path=DIST / name, headers=headers)


@pytest.fixture(scope="module")
def page(browser, address):
    """The page with its network loaded, and from then on offline."""
    page = open_page(browser, address, f"{CDN}*", answer_for_cdn)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(error))
    page.evaluate("tpsnet.ready.then(() => {})")
    page.context.set_offline(True)
    return page


@pytest.fixture(scope="module")
def photos(page):
    """A picture of each class that is not square: the page's drawings between two bars of noise."""
    script = "Array.from(document.querySelectorAll('#samples canvas'), (c) => c.toDataURL())"
    found = {}
    for name, address in zip(CLASSES, page.evaluate(script), strict=True):
        drawing = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        photo = Image.fromarray(RNG.integers(0, 256, (128, 201, 3), dtype=np.uint8))
        photo.paste(drawing.convert("RGB"), (36, 0))
        found[name] = photo
    return found


@functools.cache
def session():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def run_onnx(images):
    """Probabilities of (N, 3, 32, 32) uint8 images, (N, 10), by the same network in Python."""
    (logits,) = session().run(None, {"image": images.numpy().astype(np.float32) / 255})
    temperature = json.loads(session().get_modelmeta().custom_metadata_map["temperature"]) or 1
    return torch.from_numpy(logits / temperature).softmax(1)


def expected(content):
    """The class that predict.py's reading and the same network find in a picture file."""
    probabilities = run_onnx(predict.read_picture(io.BytesIO(content))[None])[0]
    return CLASSES[probabilities.argmax()], float(100 * probabilities.max())


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(page, content):
    """What the network sees in a picture file, by the page's own path: (3, 32, 32) int."""
    script = """async (text) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        return Array.from((await tpsnet.classify(new Blob([bytes]))).seen.data);
    }"""
    pixels = torch.tensor(page.evaluate(script, base64.b64encode(content).decode()))
    return pixels.reshape(32, 32, 4).permute(2, 0, 1)[:3]


def difference(page, content):
    """The most that a channel of a pixel differs from predict.py's, in levels of 255."""
    picture = predict.read_picture(io.BytesIO(content)).int()
    return int((seen(page, content) - picture).abs().max())


def choose(page, content, name="photo.png", kind="image/png"):
    file = {"name": name, "mimeType": kind, "buffer": content}
    page.locator("#file").set_input_files(file)


def answer(page, act):
    """The class and the percentage that appear after `act`."""
    page.evaluate("document.getElementById('bars').replaceChildren()")
    act()
    page.locator("#bars li").first.wait_for(timeout=10_000)
    assert page.locator("#alert").inner_text() == ""
    name, percentage = page.locator("#bars li").first.inner_text().split()
    assert page.locator("#answer").inner_text().endswith(f"{name}: {percentage}")
    return name, float(percentage.removesuffix("%"))


def check(page, content, act):
    name, percentage = answer(page, act)
    told, probability = expected(content)
    assert name == told
    assert percentage == pytest.approx(probability, abs=2)
    return name


# ---------------------------------------------------------------- what the network sees


def test_pixels_are_predicts_at_odd_sizes(page):
    sizes = [(1, 1), (32, 32), (2, 67), (31, 33), (2050, 2049), *RNG.integers(3, 400, (15, 2))]
    for width, height in sizes:
        noise = RNG.integers(0, 256, (min(height, 400), min(width, 400), 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((int(width), int(height)), Image.Resampling.NEAREST)
        assert difference(page, encode(image)) == 0, (width, height)


def test_pixels_are_predicts_with_transparency(page, photos):
    for photo in photos.values():
        image = photo.convert("RGBA")
        image.putalpha(Image.fromarray(RNG.integers(0, 256, (128, 201), dtype=np.uint8)))
        assert difference(page, encode(image)) <= 1


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP"])
def test_pixels_are_predicts_in_other_formats(page, photos, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert difference(page, encode(photos["frog"], kind, **options)) == 0


def test_color_profiles_are_ignored(page, photos):
    """As by predict.py: here one that exchanges red and blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    assert difference(page, encode(photos["bird"], icc_profile=profile)) == 0


# ---------------------------------------------------------------- ways in


def test_choosing_a_file(page, photos):
    content = encode(photos["cat"])
    assert check(page, content, lambda: choose(page, content)) == "cat"
    assert page.locator("#file").input_value() == ""  # or it could not be chosen again


def test_photo_of_the_camera(page, photos):
    content = encode(photos["deer"], "JPEG", quality=95)
    file = {"name": "image.jpg", "mimeType": "image/jpeg", "buffer": content}
    check(page, content, lambda: page.locator("#camera").set_input_files(file))


def test_dropping_a_file_anywhere(page, photos, tmp_path):
    """By the browser itself, which opens a file that the page does not take."""
    photos["ship"].save(tmp_path / "ship.png")
    data = {"items": [], "files": [str(tmp_path / "ship.png")], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)

    def drop():
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 5, "y": 5, "data": data}
            devtools.send("Input.dispatchDragEvent", event)

    assert check(page, (tmp_path / "ship.png").read_bytes(), drop) == "ship"


def test_pasting_from_the_clipboard(page, photos):
    content = encode(photos["truck"])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    script = """(text) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const blob = new Blob([bytes], { type: "image/png" });
        return navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    }"""
    page.evaluate(script, base64.b64encode(content).decode())
    assert check(page, content, lambda: page.keyboard.press("Control+V")) == "truck"
    page.evaluate("navigator.clipboard.writeText('words')")
    page.keyboard.press("Control+V")
    sync_api.expect(page.locator("#alert")).to_have_text("The clipboard holds no picture.")


def test_transparent_picture(page, photos):
    image = photos["horse"].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    content = encode(image)
    check(page, content, lambda: choose(page, content))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photo_turned_by_its_exif(page, photos, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = photos["automobile"].rotate({3: 180, 6: 90, 8: 270}[orientation], expand=True)
    content = encode(turned, "JPEG", quality=95, exif=exif)
    assert check(page, content, lambda: choose(page, content, "photo.jpg", "image/jpeg")) == (
        "automobile"
    )
    assert difference(page, content) <= 4  # two decoders of JPEG


def test_drawings_by_mouse_and_keyboard(page, photos):
    """At least eight of ten are recognised."""
    right = 0
    for i, name in enumerate(CLASSES):
        button = page.get_by_role("button", name="Drawing:").nth(i)
        assert button.get_attribute("aria-label").endswith(f" {name}")
        act = button.click if i % 2 else functools.partial(button.press, "Enter")
        right += answer(page, act)[0] == name
    assert right >= 8


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_broken_file_is_told_and_the_next_one_works(page, photos, kind):
    png = encode(photos["bird"])
    broken = {"text": b"no picture", "cut": png[:40], "empty": b""}[kind]
    choose(page, broken)
    alert = page.get_by_role("alert")
    sync_api.expect(alert).to_have_text("This file is no picture that your browser can read.")
    assert check(page, png, lambda: choose(page, png)) == "bird"


@pytest.mark.parametrize("fault", ["no runtime", "another runtime", "no network"])
def test_what_cannot_be_loaded_is_told(browser, address, fault):
    suffix = ".onnx" if fault == "no network" else ".mjs"

    def answer(route):
        if not route.request.url.endswith(suffix):
            return  # it is still loading
        body = (DIST / "ort.wasm.bundle.min.mjs").read_bytes() + b"\n"
        reply = {"body": body} if fault == "another runtime" else {"status": 404}
        route.fulfill(headers={"access-control-allow-origin": "*"}, **reply)

    page = open_page(browser, address, re.compile(r"\.(mjs|wasm|onnx)$"), answer)
    alert = page.get_by_role("alert")
    sync_api.expect(alert).to_contain_text("The network could not be loaded", timeout=10_000)
    page.get_by_role("button", name="Drawing:").first.click()
    sync_api.expect(alert).to_contain_text("The network could not be loaded")
    page.context.close()


def test_pictures_at_once_get_their_own_answers(page):
    script = """async () => {
        const drawings = [...document.querySelectorAll("#samples canvas")];
        const one = [];
        for (const drawing of drawings) one.push((await tpsnet.classify(drawing)).classes[0]);
        const all = await Promise.all(drawings.map((drawing) => tpsnet.classify(drawing)));
        return [one, all.map((answer) => answer.classes[0])];
    }"""
    one, all_at_once = page.evaluate(script)
    assert one == all_at_once


# ---------------------------------------------------------------- the page itself


def test_no_horizontal_overflow_on_a_small_phone(page, photos):
    content = encode(photos["airplane"])
    answer(page, lambda: choose(page, content))
    size = page.viewport_size
    for width in (320, 375, 768, 1280):
        page.set_viewport_size({"width": width, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = """(width) => [...document.body.querySelectorAll("*")].filter(
            (element) => element.getBoundingClientRect().right > width).map((e) => e.outerHTML)"""
        assert page.evaluate(outside, width) == []
    page.set_viewport_size(size)


def test_every_control_has_a_name_and_a_visible_focus(page):
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        properties = {one["name"]: one["value"].get("value") for one in node.get("properties", [])}
        if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
            named[node["nodeId"]] = node["name"]["value"].strip()
    assert len(named) == 12  # two fields and ten drawings
    assert all(named.values()), named
    page.evaluate("document.activeElement.blur()")
    style = """() => {
        const focused = document.activeElement;
        const shown = focused.matches(".field") ? focused.nextElementSibling : focused;
        return [focused.id || focused.ariaLabel, getComputedStyle(shown).outlineStyle];
    }"""
    reached = {}
    for _ in named:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(style)
        reached[name] = outline
    assert len(reached) == 12
    assert set(reached.values()) == {"solid"}, reached


def test_hashes_are_those_of_the_package():
    version = json.loads((DIST.parent / "package.json").read_text(encoding="utf-8"))["version"]
    assert f"onnxruntime-web@{version}/" in CDN
    hashes = dict(re.findall(r'"([\w.-]+)":\s+"sha384-(.*)"', HTML))
    assert len(hashes) == 2
    for name, told in hashes.items():
        digest = hashlib.sha384((DIST / name).read_bytes()).digest()
        assert base64.b64encode(digest).decode() == told, name


def test_nothing_else_is_fetched_and_nothing_once_loaded(page, photos, address):
    """The tests above ran offline; this one looks at all that was ever asked for."""
    content = encode(photos["frog"])
    answer(page, lambda: choose(page, content))
    asked = [one for one in page.asked if not one.startswith(("blob:", "data:"))]
    files = ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"]
    local = [address, address.replace("index.html", MODEL.name)]
    assert sorted(asked) == sorted([*local, *(CDN + name for name in files)])
    assert page.errors == []
    script = """() => new Promise((resolve) => {
        addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        fetch("https://elsewhere.invalid/").catch(() => setTimeout(resolve, 1000, "no policy"));
    })"""
    assert page.evaluate(script) == "connect-src"


def test_works_offline_after_the_first_visit(browser, photos, tmp_path):
    """By what the server gave last, which has the CDN's files, too: a service worker's requests
    pass routes by.
    """
    shutil.copytree(WEB, tmp_path, dirs_exist_ok=True)
    shutil.copytree(DIST, tmp_path / "dist")
    (tmp_path / "index.html").write_text(HTML.replace(CDN, "dist/"), encoding="utf-8")
    page = browser.new_context().new_page()
    with serve(tmp_path) as address:
        page.goto(address)
        page.evaluate("navigator.serviceWorker.ready.then(() => {})")
        newer = (tmp_path / "index.html").read_text(encoding="utf-8") + "<!-- newer -->"
        (tmp_path / "index.html").write_text(newer, encoding="utf-8")
        page.reload()
        kept = "caches.match(location).then((response) => response.text())"
        deadline = time.monotonic() + 10
        while "<!-- newer -->" not in page.evaluate(kept):
            assert time.monotonic() < deadline
    with pytest.raises(OSError):
        urllib.request.urlopen(address)
    page.reload()
    content = encode(photos["ship"])
    assert check(page, content, lambda: choose(page, content)) == "ship"
    page.context.close()


@pytest.mark.cifar10
@pytest.mark.slow
def test_all_test_images_get_the_classes_of_onnxruntime(page):
    """By the page's own path; two minutes."""
    test = load_dataset("cifar10", ROOT / "data", download=False).test
    script = """async (text) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const found = [];
        for (let at = 0; at < bytes.length; at += 4096) {
            const pixels = new Uint8ClampedArray(bytes.buffer, at, 4096);
            const answer = await tpsnet.classify(new ImageData(pixels, 32, 32));
            found.push(answer.classes[0].name);
        }
        return found;
    }"""
    found, told = [], []
    for images in test.images.split(500):
        opaque = F.pad(images, (0, 0, 0, 0, 0, 1), value=255)
        pixels = opaque.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
        names = page.evaluate(script, base64.b64encode(pixels).decode())
        found += [CLASSES.index(name) for name in names]
        told += run_onnx(images).argmax(1).tolist()
    found, told = torch.tensor(found), torch.tensor(told)
    right, right_told = ((classes == test.labels).sum().item() for classes in (found, told))
    print(f"{right:,} right, ONNX Runtime {right_told:,}; {(found == told).sum():,} classes agree")
    assert abs(right - right_told) <= 10
    assert (found == told).sum() >= 9990
