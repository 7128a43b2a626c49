"""Export a saved network for apps, as ONNX, ExecuTorch or a page, checked in its real runtime.

    python export.py checkpoints/fast.safetensors      # every format whose libraries are there
    python export.py checkpoints/mine --format onnx onnx-int8 --out app --limit 1000
    python export.py checkpoints/mine --format page --out mine-page  # for any static web host

The exported file takes RGB images scaled to [0, 1], (N, 3, 32, 32) with N = 1 for ExecuTorch,
normalizes them itself, and returns logits. `pip install -r requirements-export.txt` installs the
libraries; docs/mobile.md shows how apps use the files.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("export")

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from data import EVAL_BATCH, Dataset, Normalize, Split, load_data_of, stratified
from engine.checkpoint import find_checkpoint, load_model
from engine.distributed import keep_freed_memory, usable_cpus
from engine.script import plain_arguments
from utils import (
    CHECKPOINTS,
    InputError,
    atomic_path,
    check_integer,
    check_number,
    check_writable,
    first_line,
    printable,
    quoted,
)

CALIBRATION_IMAGES = 512  # of the training set, from which int8 takes its ranges
MAX_DIFFERENCE = 1e-4  # between a float32 format's logits and PyTorch's, relative to the largest
LARGE_BATCH = 64  # images; its latency is printed beside that of one image
LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
    "pte": ("executorch",),
    "pte-int8": ("executorch", "torchao"),
    "page": ("onnx", "onnxscript", "onnxruntime"),
}
WEB = Path(__file__).resolve().parent / "web"  # the page of a released network
MAX_EXAMPLES = 10  # test pictures on a page
Classifier = Callable[[Tensor], Tensor]  # (N, 3, 32, 32) float32 in [0, 1] to (N, C) logits
Opener = Callable[[int], Classifier]  # from a number of threads to a classifier that uses them


class Verdict(NamedTuple):
    """Size, accuracy and latency of a format in its runtime, on the test images."""

    name: str
    size: int  # bytes; 0 for PyTorch itself
    accuracy: float  # percent
    agreement: float  # percent of the images that get the same class as from PyTorch
    difference: float  # the largest between a logit and PyTorch's
    single_ms: float  # median for one image, on one thread
    batch_ms: float | None  # median per image of a large batch; None if it takes no batches

    def __str__(self) -> str:
        size = f"{self.size / 1e6:.2f}" if self.size else "-"
        batch = f"{self.batch_ms:.2f}" if self.batch_ms else "-"
        return (
            f"{self.name:9}  {size:>6}  {self.accuracy:7.2f}%  {self.agreement:8.2f}%"
            f"  {self.difference:10.1e}  {self.single_ms:7.2f}  {batch:>8}"
        )


HEADER = (
    f"{'format':9}  {'MB':>6}  {'accuracy':>8}  {'agreement':>9}  {'difference':>10}"
    f"  {'ms of 1':>7}  {f'ms in {LARGE_BATCH}':>8}"
)


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Give PyTorch back its number of threads, which the timing sets to 1."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@threads_kept()
def export(
    checkpoint: Path = CHECKPOINTS,
    /,
    format: tuple[Literal["onnx", "onnx-int8", "pte", "pte-int8", "page"], ...] = (),
    out: Path = Path("export"),
    limit: int = 0,
    max_drop: float = 0.2,
    examples: int = 0,
    data_dir: str = "",
    download: bool = True,
) -> list[Verdict]:
    """Export a saved network for apps, and check each file in its real runtime.

    Args:
        checkpoint: A file, a network's name, or a folder: its newest run, else a released network.
        format: ONNX or ExecuTorch (pte), by default all that are installed; or a page for browsers.
        out: Folder for the files; all but those of a page are named after the network.
        limit: Check on this many test images only; 0 for all.
        max_drop: Points of accuracy that a format may lose; one image is always allowed.
        examples: Test pictures to publish with the page, up to 10.
        data_dir: Folder of the data; by default `data`, or where your own pictures were.
        download: Download CIFAR if it is not in data_dir.

    Returns:
        The verdicts on PyTorch and on each format.

    Raises:
        InputError: the checkpoint, the data, a library or the folder is missing or wrong; or a
            format loses too much.
    """
    check_integer("limit", limit, 0)
    check_number("max_drop", max_drop, 0, 100)
    check_integer("examples", examples, 0, MAX_EXAMPLES)
    if examples and "page" not in format:
        raise InputError(f"examples: {examples}, but no page is asked for; add --format page")
    formats = check_libraries(format)
    check_folder(out, formats)
    path = find_checkpoint(checkpoint)
    model, info = load_model(path)
    data = load_data_of(path, info, data_dir, download)
    keep_freed_memory()  # as in a training, for the times of PyTorch
    test = data.test[:limit] if limit else data.test
    calibration = choose_calibration(data).images / 255
    # With the normalization inside, no app can get it wrong.
    network = nn.Sequential(Normalize(info["mean"], info["std"]), model).eval()
    facts = {
        "class_names": info["class_names"],
        "temperature": info.get("temperature"),
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }

    name = path.stem if path.name != "model.safetensors" else path.resolve().parent.name
    print(
        f"{printable(path.as_posix())} on {len(test):,} test images; time per image on one"
        f" thread\n\n{HEADER}",
        flush=True,
    )
    eager = partial(open_eager, network)
    expected = logits_of(eager, test)
    largest = expected.abs().max().item()
    verdicts = [verify("PyTorch", 0, eager, test, expected)]
    print(verdicts[0], flush=True)
    refused, files, made = [], [], {}
    for kind in formats:
        file_kind = "onnx-int8" if kind == "page" else kind
        if file_kind not in made:
            try:
                with quiet():
                    content = make(file_kind, network, calibration, facts)
                    opener = partial(open_pte if kind.startswith("pte") else open_onnx, content)
                    made[file_kind] = content, verify(kind, len(content), opener, test, expected)
            except Exception as error:  # a library of another version can raise anything
                raise InputError(
                    f"format: {kind} failed ({first_line(error)}); install the versions of"
                    " requirements-export.txt, or choose another format"
                ) from None
        content, verdict = made[file_kind]
        verdict = verdict._replace(name=kind)
        verdicts.append(verdict)
        print(verdict, flush=True)
        if reason := why_refused(verdict, verdicts[0], max_drop, len(test), largest):
            refused.append(reason)
            continue
        contents = {file_name(name, kind): content}
        if kind == "page":
            shown = {"accuracy": verdict.accuracy, "test_images": len(test)}
            shown["examples"] = choose_examples(test, info["class_names"], examples)
            contents = page_files(content, facts | shown)
        for file, whole in contents.items():
            files.append(out / file)
            with atomic_path(files[-1]) as temporary:
                temporary.write_bytes(whole)
    print()
    for file in files:
        print(f"file: {printable(file.as_posix())}")
    if out / "network.json" in files:
        if examples:
            print("examples: whoever opens the page gets these test pictures, in network.json")
        print(f"next: python -m http.server -d {quoted(out)}")
    if refused:
        raise InputError(
            f"{'; '.join(refused)}; not written: take another format, or a larger max_drop"
        )
    return verdicts


def file_name(network: str, kind: str) -> str:
    """The name of the file of a network in a format, such as fast-int8.onnx."""
    suffix, dash, precision = kind.partition("-")
    return f"{network}{dash}{precision}.{suffix}"


def page_files(network: bytes, facts: dict[str, object]) -> dict[str, bytes]:
    """The files of a page by name: ours, an ONNX network, and the facts that the page shows."""
    files = {name: (WEB / name).read_bytes() for name in ("index.html", "offline.js")}
    # A browser that has kept the network of an older page refuses it under the new class names.
    digest = base64.b64encode(hashlib.sha384(network).digest()).decode()
    description = json.dumps(facts | {"integrity": f"sha384-{digest}"}, indent=2) + "\n"
    return {"network.onnx": network, "network.json": description.encode(), **files}


def choose_examples(test: Split, names: list[str], number: int) -> list[dict[str, str]]:
    """Choose the first test image of each class, then the second ones: PNG files in data URLs."""
    turns, seen = [], Counter()
    for i, label in enumerate(test.labels.tolist()):
        turns.append((seen[label], label, i))
        seen[label] += 1
    examples = []
    for _, label, i in sorted(turns)[:number]:
        file = io.BytesIO()
        Image.fromarray(test.images[i].permute(1, 2, 0).numpy()).save(file, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        examples.append({"class_name": names[label], "image": address})
    return examples


def check_libraries(asked: tuple[str, ...]) -> list[str]:
    """Choose the formats to make: those asked for, else all files whose libraries are installed.

    Raises:
        InputError: a library is missing.
    """
    missing = {
        kind: [name for name in names if importlib.util.find_spec(name) is None]
        for kind, names in LIBRARIES.items()
    }
    formats = list(dict.fromkeys(asked)) or [
        kind for kind in LIBRARIES if kind != "page" and not missing[kind]
    ]
    lacking = {name for kind in formats or LIBRARIES for name in missing[kind]}
    if lacking:
        names = ", ".join(sorted(lacking))
        raise InputError(
            f"format: {names}: not installed; run `pip install -r requirements-export.txt`"
        )
    return formats


def check_folder(out: Path, formats: list[str]) -> None:
    """Raise InputError if files cannot go to `out`, or a page of somebody else's is there."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; name a folder")
    check_writable("out", out)
    page = out / "index.html"
    if "page" in formats and page.exists() and not (out / "network.json").exists():
        raise InputError(f"out: {page} is another page; name another folder, or move it away")


def choose_calibration(data: Dataset) -> Split:
    """Choose training images for the ranges of int8, with the share of every class.

    Those of a folder are in random order, and a class may have too few of them to be divided.
    """
    if len(data.train) <= CALIBRATION_IMAGES or data.name == "folder":
        return data.train[:CALIBRATION_IMAGES]
    return stratified(data.train, CALIBRATION_IMAGES)[1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters print, log and warn about, C++ code included."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# ---------------------------------------------------------------- verifying


@torch.inference_mode()
def logits_of(opener: Opener, test: Split) -> Tensor:
    """Logits of all images, computed on all processors that this process may use."""
    classifier = opener(usable_cpus())
    return torch.cat([classifier(batch / 255) for batch in test.images.split(EVAL_BATCH)])


@torch.inference_mode()
def verify(name: str, size: int, opener: Opener, test: Split, expected: Tensor) -> Verdict:
    """Compare a classifier with PyTorch's logits, `expected`, and time it on one thread."""
    logits = logits_of(opener, test)
    classifier = opener(1)
    images = test.images[:1].repeat(LARGE_BATCH, 1, 1, 1) / 255
    takes_batches = not name.startswith("pte")
    return Verdict(
        name,
        size,
        accuracy=percent(logits.argmax(1) == test.labels),
        agreement=percent(logits.argmax(1) == expected.argmax(1)),
        difference=(logits - expected).abs().max().item(),
        single_ms=latency(classifier, images[:1], 50),
        batch_ms=latency(classifier, images, 10) / LARGE_BATCH if takes_batches else None,
    )


def why_refused(
    verdict: Verdict, eager: Verdict, max_drop: float, num_images: int, largest: float
) -> str | None:
    """The reason not to write a format, if there is one.

    Args:
        eager: the verdict on PyTorch itself.
        largest: the largest of its logits, by magnitude.
    """
    drop = eager.accuracy - verdict.accuracy
    if loses_too_much(drop, max_drop, num_images):
        return f"max_drop: {verdict.name} loses {drop:.2f} points, {max_drop:g} are allowed"
    if verdict.name in ("onnx", "pte") and verdict.difference > MAX_DIFFERENCE * max(1, largest):
        return f"format: {verdict.name} differs by {verdict.difference:.1e}, more than rounding"
    return None


def loses_too_much(drop: float, max_drop: float, num_images: int) -> bool:
    """True if a drop in percent is over `max_drop` and over one of the images."""
    return drop > max_drop and round(drop / 100 * num_images) > 1


def percent(right: Tensor) -> float:
    """Share of true elements, in percent."""
    return 100 * right.double().mean().item()


def latency(classifier: Classifier, images: Tensor, repetitions: int) -> float:
    """Median time of a call, in milliseconds."""
    times = []
    for _ in range(repetitions + 3):  # the first ones warm up
        start = time.perf_counter()
        classifier(images)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


# ---------------------------------------------------------------- the formats


def open_eager(network: nn.Module, threads: int) -> Classifier:
    """Open the network in PyTorch itself."""
    torch.set_num_threads(threads)
    return network


def make(kind: str, network: nn.Module, calibration: Tensor, facts: dict[str, object]) -> bytes:
    """Make the network in this format, with the facts as metadata: strings, by name."""
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
    }
    if kind == "onnx":
        return to_onnx(network, metadata)
    if kind == "onnx-int8":
        return to_onnx_int8(network, calibration, metadata)
    if kind == "pte":
        return to_pte(network, metadata)
    return to_pte_int8(network, calibration, metadata)


def to_onnx(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """Convert to ONNX in float32, for any batch size."""
    import onnx

    return finished_onnx(onnx.load_from_string(traced(network)), metadata)


@lru_cache(maxsize=1)  # the way to int8 begins with it, too
def traced(network: nn.Module) -> bytes:
    """The network as PyTorch's exporter writes it."""
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, 32, 32),),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def finished_onnx(model: object, metadata: dict[str, str]) -> bytes:
    """Serialize an `onnx.ModelProto` reproducibly, with no other metadata than ours.

    The exporter stores stack traces, and with them the paths of this machine.
    """
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


def to_onnx_int8(network: nn.Module, calibration: Tensor, metadata: dict[str, str]) -> bytes:
    """Convert to ONNX in int8: static ranges, a scale per channel, unsigned activations.

    Weights have 7 bits, because on CPUs with AVX2 but without VNNI a sum of two 8-bit products
    saturates (there the accuracy of `fast` falls to 50%). The first convolution and the layers
    after the last one stay in float32: they cost little, and most of the error came from them.
    """
    import onnx
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration.split(64))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, quantized = (Path(folder, f"{i}.onnx") for i in range(3))
        whole.write_bytes(to_onnx(network, {}))
        quantization.quant_pre_process(whole, prepared)  # folds BN into convolutions
        nodes = onnx.load(prepared).graph.node
        first = next(node for node in nodes if node.op_type == "Conv")
        last = [node for node in nodes if node.op_type in ("AveragePool", "Reshape", "Gemm")]
        quantization.quantize_static(
            prepared,
            quantized,
            Calibration(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[node.name for node in (first, *last)],
        )
        return finished_onnx(onnx.load(quantized), metadata)


def open_onnx(content: bytes, threads: int) -> Classifier:
    """Open an ONNX model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def to_pte(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """Convert to ExecuTorch for one image at a time, run by XNNPACK.

    The format's place for metadata are methods without inputs, each of which returns a constant.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(network, (torch.zeros(1, 3, 32, 32),))
    lowered = to_edge_transform_and_lower(
        exported, partitioner=[XnnpackPartitioner()], constant_methods=metadata
    )
    return bytes(lowered.to_executorch().buffer)


def to_pte_int8(network: nn.Module, calibration: Tensor, metadata: dict[str, str]) -> bytes:
    """Convert to ExecuTorch in int8: static ranges, a scale per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    exported = torch.export.export(network, (torch.zeros(1, 3, 32, 32),))
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        for image in calibration.split(1):
            prepared(image)
    return to_pte(convert_pt2e(prepared), metadata)


def open_pte(content: bytes, threads: int) -> Classifier:
    """Open an ExecuTorch program in its runtime; it takes an image at a time."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)  # there is no public way
    method = Runtime.get().load_program(content).load_method("forward")

    def run(images: Tensor) -> Tensor:
        # The output lies in the program's own memory, which the next call overwrites.
        return torch.cat([method.execute([image])[0].clone() for image in images.split(1)])

    return run


def main(args: list[str]) -> None:
    """Export the checkpoint that the command line names."""
    import tyro

    tyro.cli(export, args=plain_arguments(args, export), prog="export.py")
