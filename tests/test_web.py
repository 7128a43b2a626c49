"""web/index.html in a browser: it answers as predict.py does with the same network.

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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import export
from data import Split
from engine.pictures import read_picture

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs `pip install onnxruntime`")

WEB = ROOT / "web"
MODEL = WEB / "network.onnx"
CHROMIUM = Path("/usr/bin/chromium")
DIST = Path(os.environ.get("ORT_WEB", ROOT / "node_modules/onnxruntime-web/dist"))
HTML = (WEB / "index.html").read_text(encoding="utf-8")
CDN = re.search(r'const CDN = "(.*)"', HTML).group(1)
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CLASS_NAMES = "tpsnet.ready.then(({ description }) => description.class_names)"  # of a page
RNG = np.random.default_rng(0)
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs Chromium at {CHROMIUM}"),
    pytest.mark.skipif(not DIST.is_dir(), reason="needs onnxruntime-web's dist folder: ORT_WEB"),
    pytest.mark.skipif(not MODEL.exists(), reason=f"needs {MODEL.name} in web/: python export.py"),
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def end_headers(self):
        self.send_header("Vary", "Accept-Encoding, User-Agent")  # as many a host does
        super().end_headers()


@contextlib.contextmanager
def serve(folder):
    """Serve a folder; gives the address of the page in it."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, address, answer):
    """Open the page, whose requests elsewhere get `answer(route)`; `page.asked` lists them all."""
    page = browser.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(error))
    page.route(f"{CDN}*", answer)
    page.goto(address)
    return page


def answer_for_cdn(route):
    name = route.request.url.removeprefix(CDN)
    kind = "application/wasm" if name.endswith(".wasm") else "text/javascript"
    headers = {"access-control-allow-origin": "*", "content-type": kind}
    route.fulfill(path=DIST / name, headers=headers)


@contextlib.contextmanager
def offline_page(browser, folder):
    """The page of a folder with its network loaded, and from then on offline.

    The browser loads the runtime only if its hashes are those of index.html.
    """
    with serve(folder) as address:
        page = open_page(browser, address, answer_for_cdn)
        page.evaluate("tpsnet.ready.then(() => {})")
        page.context.set_offline(True)
        yield page
        page.close()


@pytest.fixture(scope="module")
def page(browser):
    with offline_page(browser, WEB) as page:
        yield page


@functools.cache
def session():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def metadata():
    return session().get_modelmeta().custom_metadata_map


def temperature():
    return json.loads(metadata()["temperature"]) or 1


def run_onnx(images):
    """Probabilities of (N, 3, 32, 32) uint8 images, (N, 10), by the same network in Python."""
    (logits,) = session().run(None, {"image": images.numpy().astype(np.float32) / 255})
    return torch.from_numpy(logits / temperature()).softmax(1)


def noise(width, height):
    """A picture of large random pixels."""
    small = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(page, content):
    """Largest difference between a pixel as the page sees it and as predict.py does, of 255."""
    script = """async (text) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        return Array.from((await tpsnet.classify(new Blob([bytes]))).seen.data);
    }"""
    pixels = torch.tensor(page.evaluate(script, base64.b64encode(content).decode()))
    seen = pixels.reshape(32, 32, 4).permute(2, 0, 1)[:3]
    return int((seen - read_picture(io.BytesIO(content)).int()).abs().max())


def choose(page, content):
    """Choose a file; returns the class and the percentage that appear."""
    page.evaluate("document.getElementById('bars').replaceChildren()")
    file = {"name": "photo", "mimeType": "image/png", "buffer": content}
    page.locator("#file").set_input_files(file)
    page.locator("#bars li").first.wait_for(timeout=10_000)
    name, percentage = page.locator("#bars li").first.inner_text().split()
    return name, float(percentage.removesuffix("%"))


def check_answer(page, content):
    probabilities = run_onnx(read_picture(io.BytesIO(content))[None])[0]
    name, percentage = choose(page, content)
    assert name == CLASSES[probabilities.argmax()]
    assert percentage == pytest.approx(float(100 * probabilities.max()), abs=2)


# ---------------------------------------------------------------- pictures and answers


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (2, 67), (31, 33), (201, 128), (2050, 2049)])
def test_pixels_are_those_of_predict(page, size):
    assert difference(page, encode(noise(*size))) == 0


def test_transparency_and_exif_are_those_of_predict(page):
    image = noise(90, 60).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert difference(page, encode(image)) <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    assert difference(page, encode(noise(90, 60), "JPEG", quality=95, exif=exif)) <= 4


def test_answers_are_those_of_the_network(page):
    for _ in range(3):
        check_answer(page, encode(noise(201, 128)))


def test_most_drawings_are_recognized(page):
    buttons = page.get_by_role("button", name="Drawing:")
    right = 0
    for i, name in enumerate(CLASSES):
        page.evaluate("document.getElementById('bars').replaceChildren()")
        buttons.nth(i).click()
        page.locator("#bars li").first.wait_for(timeout=10_000)
        right += page.locator("#bars li").first.inner_text().split()[0] == name
    assert right >= 8


@pytest.mark.parametrize("content", [b"no picture", b"", encode(noise(64, 48))[:40]])
def test_broken_file_gets_a_sentence_and_the_next_one_works(page, content):
    file = {"name": "photo", "mimeType": "image/png", "buffer": content}
    page.locator("#file").set_input_files(file)
    alert = page.get_by_role("alert")
    sync_api.expect(alert).to_have_text("This file is no picture that your browser can read.")
    check_answer(page, encode(noise(64, 48)))


# ---------------------------------------------------------------- networks

RELEASED = "What is in the picture?"
NAMES = [*"0123456", "<b>seven</b>", "constructor", "n" * 60]  # one network under other names
MANY = [f"class {i}" for i in range(10)] + ["more"] * 11


def test_committed_page_is_the_one_of_fast(page):
    facts = json.loads((WEB / "network.json").read_text())
    assert facts["class_names"] == CLASSES
    assert facts["temperature"] == json.loads(metadata()["temperature"])
    assert facts["checkpoint_sha256"] == metadata()["checkpoint_sha256"]
    checkpoint = (ROOT / "checkpoints/fast.safetensors").read_bytes()
    assert facts["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert facts["test_images"] == 10_000
    assert page.title() == RELEASED
    about = page.locator("#about").inner_text()
    assert "tells 10 classes apart: airplane, automobile, bird, cat, deer," in about
    assert f"right about {facts['accuracy']:.1f}% of 10,000 test pictures" in about
    assert "calibrated for pictures like" in page.locator("#calibration").inner_text()


@pytest.mark.parametrize(
    ("names", "title", "about"),
    [
        (list("0123456789"), "What is it: 0, 1, 2, 3, 4, 5, 6, 7, 8 or 9?", "8 and 9. It was"),
        (NAMES, RELEASED, "10 classes apart: 0, 1, 2, 3, 4, 5, 6, <b>seven</b>, constructor and"),
        (MANY, RELEASED, "21 classes apart. It was right about 50.0% of 20 test pictures."),
    ],
    ids=["digits", "odd", "many"],
)
def test_page_of_other_classes_has_their_names_and_no_drawings(
    names, title, about, browser, tmp_path
):
    write_page(tmp_path, names)
    with offline_page(browser, tmp_path) as page:
        assert page.title() == title
        assert page.locator("h1").inner_text() == title
        assert about in page.locator("#about").inner_text()
        assert page.locator("#names").is_hidden()
        assert page.get_by_text("The classes", exact=True).is_visible() == (names is MANY)
        assert page.locator("#calibration").inner_text().endswith("are not calibrated.")
        assert not page.locator("#offer").is_visible()
        assert page.locator("b").count() == 0
        assert page.errors == []
        if names is MANY:  # the network has ten
            return
        choose(page, encode(noise(64, 48)))
        shown = page.locator("#bars li span:first-child").all_inner_texts()
        assert len(shown) == 5
        assert set(shown) <= set(names)


def test_examples_are_offered_and_answered_as_the_files_are(browser, tmp_path):
    images = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    test = Split(torch.from_numpy(images), torch.arange(12) % 2)
    examples = export.choose_examples(test, ["left", "right"], 3)
    assert [one["class_name"] for one in examples] == ["left", "right", "left"]
    write_page(tmp_path, CLASSES, examples=examples)
    with offline_page(browser, tmp_path) as page:
        assert page.locator("h2").inner_text() == "Or try a test picture"
        assert page.locator("#samples button").count() == 3
        page.get_by_role("button", name="Test picture: right").click()
        page.locator("#bars li").first.wait_for(timeout=10_000)
        name, percentage = page.locator("#bars li").first.inner_text().split()
        probabilities = run_onnx(test.images[1:2])[0] ** temperature()
        assert name == CLASSES[probabilities.argmax()]
        probabilities /= probabilities.sum()
        assert float(percentage[:-1]) == pytest.approx(100 * float(probabilities.max()), abs=2)


def write_page(folder, names, examples=()):
    """A page of the released network under other names, without a temperature."""
    facts = {"class_names": names, "temperature": None, "accuracy": 50.0, "test_images": 20}
    files = export.page_files(MODEL.read_bytes(), facts | {"examples": list(examples)})
    for name, content in files.items():
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------- the page itself


@pytest.mark.parametrize("reply", [{"status": 404}, {"body": "another file"}])
def test_runtime_that_is_missing_or_another_gets_a_sentence(browser, reply):
    headers = {"access-control-allow-origin": "*"}
    with serve(WEB) as address:
        page = open_page(browser, address, lambda route: route.fulfill(headers=headers, **reply))
        alert = page.get_by_role("alert")
        sync_api.expect(alert).to_contain_text("The network could not be loaded", timeout=10_000)
        page.close()


def test_network_of_another_page_is_refused(browser, tmp_path):
    """A browser may have kept it from before the class names changed."""
    write_page(tmp_path, ["ant", "dog"])
    with (tmp_path / MODEL.name).open("ab") as file:
        file.write(b"\x32\x01x")  # another doc_string: ONNX Runtime would take it
    with serve(tmp_path) as address:
        page = open_page(browser, address, answer_for_cdn)
        alert = page.get_by_role("alert")
        sync_api.expect(alert).to_contain_text("The network could not be loaded", timeout=10_000)
        page.close()


def test_network_that_was_exported_anew_is_seen_at_the_next_visit(browser, tmp_path):
    """Browsers ask for no file that was a month old yesterday, unless the page tells them to.

    With routes they would ask, so the runtime lies beside the page.
    """
    context, now = browser.new_context(), time.time()
    shutil.copytree(DIST, tmp_path / "dist")
    with serve(tmp_path) as address:
        for days, names in ((30, ["ant", "dog"]), (29, ["bee", "cat"])):
            write_page(tmp_path, names)
            (tmp_path / "index.html").write_text(HTML.replace(CDN, "dist/"), encoding="utf-8")
            for path in tmp_path.glob("*.*"):
                os.utime(path, 2 * (now - days * 86_400,))
            page = context.new_page()
            page.goto(address)
            assert page.evaluate(CLASS_NAMES) == names
            page.close()
    context.close()


def test_browser_without_webassembly_is_told_so_before_anything_is_downloaded(browser):
    context = browser.new_context()
    context.add_init_script("delete globalThis.WebAssembly")
    with serve(WEB) as address:
        page = open_page(context, address, answer_for_cdn)
        alert = page.get_by_role("alert")
        sync_api.expect(alert).to_contain_text("This browser cannot run the network")
        asked = [Path(url).name for url in page.asked]
        assert asked == ["index.html", "network.json"]
    context.close()


def test_pictures_are_sent_nowhere(page):
    """The other tests ran offline; the page asked for its own files alone, and may do no more."""
    check_answer(page, encode(noise(64, 48)))
    asked = [Path(url).name for url in page.asked if not url.startswith(("blob:", "data:"))]
    runtime = ["ort-wasm-simd-threaded.wasm", "ort.wasm.bundle.min.mjs"]
    assert sorted(asked) == sorted([MODEL.name, "network.json", "index.html", *runtime])
    assert page.errors == []
    script = """() => new Promise((resolve) => {
        addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        fetch("https://elsewhere.invalid/").catch(() => setTimeout(resolve, 1000, "no policy"));
    })"""
    assert page.evaluate(script) == "connect-src"


def test_works_offline_after_the_first_visit(browser, tmp_path):
    """The runtime lies beside the page: routes do not see a service worker's requests.

    Also after an update of which a part alone has arrived. At the machine's own name and number
    nothing stays: the next page there may be another's.
    """
    shutil.copytree(WEB, tmp_path, dirs_exist_ok=True)
    shutil.copytree(DIST, tmp_path / "dist")
    (tmp_path / "index.html").write_text(HTML.replace(CDN, "dist/"), encoding="utf-8")
    until_kept = """async (name) => {
        for (let i = 0; i < 200; i++) {
            const file = await caches.match("network.json", { ignoreVary: true });
            if (file && (await file.json()).class_names[3] === name) return;
            await new Promise((resolve) => setTimeout(resolve, 50));
        }
        throw new Error(`${name} was not kept`);
    }"""
    page = browser.new_page()
    with serve(tmp_path) as address:
        for name in ("127.0.0.1", "localhost"):
            page.goto(address.replace("127.0.0.1", name))
            page.evaluate("tpsnet.ready")
            assert not page.evaluate("navigator.serviceWorker.getRegistrations()")
        page.goto(address.replace("127.0.0.1", "app.localhost") + "?from=mail")
        page.evaluate(until_kept, "cat")
        description, names = tmp_path / "network.json", [*CLASSES[:3], "kitten", *CLASSES[4:]]
        updates = {"class_names": names}, {"integrity": f"sha384-{64 * 'A'}"}
        for minutes, update in enumerate(updates, start=1):
            description.write_text(json.dumps(json.loads(description.read_text()) | update))
            os.utime(description, 2 * (time.time() + 60 * minutes,))  # which tells browsers so
            page.reload()  # by way of the service worker
            page.evaluate(until_kept, "kitten")
        alert = page.get_by_role("alert")
        sync_api.expect(alert).to_contain_text("The network could not be loaded", timeout=10_000)
    page.reload()  # the server has gone
    assert page.evaluate(CLASS_NAMES) == names
    check_answer(page, encode(noise(64, 48)))
    page.close()
