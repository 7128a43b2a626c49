"""Export a saved network for apps, as ONNX and ExecuTorch, each checked by its real runtime.

    python export.py checkpoints/fast.safetensors      # every format whose libraries are there
    python export.py checkpoints/mine --format onnx onnx-int8 --out app --limit 1000

The file takes RGB images scaled to [0, 1], (N, 3, 32, 32), normalises them itself, and gives
logits. `pip install -r requirements-export.txt` has the libraries; docs/mobile.md the rest.
"""

import script

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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import utils
from config import CHECKPOINTS
from data import Split, load_dataset, stratified
from distributed import init_processes
from metrics import EVAL_BATCH
from utils import InputError, first_line
from weights import find_checkpoint, load_model

CALIBRATION_IMAGES = 512  # of the training set, for the ranges of int8
MAX_DIFFERENCE = 1e-4  # of a float32 format's logits from PyTorch's, of the largest one
LARGE_BATCH = 64  # whose latency is told beside that of one image
LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
    "pte": ("executorch",),
    "pte-int8": ("executorch", "torchao"),
}
Classifier = Callable[[Tensor], Tensor]  # (N, 3, 32, 32) float32 in [0, 1] to (N, C) logits
Opener = Callable[[int], Classifier]  # makes one that uses so many threads


class Verdict(NamedTuple):
    """How a format does on the test images, in its runtime."""

    name: str
    size: int  # bytes; 0 for PyTorch itself
    accuracy: float  # percent
    agreement: float  # percent of the images whose class is PyTorch's
    difference: float  # the largest of any logit from PyTorch's
    single_ms: float  # median, of one image, on one thread
    batch_ms: float | None  # median per image, of a large batch; None if it takes no batches

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


def export(
    checkpoint: Path = CHECKPOINTS,
    /,
    format: tuple[Literal["onnx", "onnx-int8", "pte", "pte-int8"], ...] = (),
    out: Path = Path("export"),
    limit: int = 0,
    max_drop: float = 0.2,
    data_dir: str = "data",
    download: bool = True,
) -> list[Verdict]:
    """Export a saved network for apps, after its runtime has classified the test images.

    Args:
        checkpoint: A .safetensors file, or a folder: its newest run, else a released model.
        format: ONNX or ExecuTorch (pte), in float32 or int8; all whose libraries are installed.
        out: Folder for the files, which are named after the network.
        limit: Verify on this many test images only; 0 for all.
        max_drop: Points of accuracy that a format may lose; one that loses more is not written.
        data_dir: Folder of CIFAR-10, which is downloaded into it if it is not there.
        download: Download CIFAR-10 if it is not in data_dir.

    Returns:
        How PyTorch and each format did.

    Raises:
        InputError: the checkpoint, the data, a library or the folder is missing or wrong; or a
            format loses too much.
    """
    utils.check_integer("limit", limit, 0)
    utils.check_number("max_drop", max_drop, 0, 100)
    formats = check_libraries(format)
    path = find_checkpoint(checkpoint)
    model, info = load_model(path)
    data = load_dataset(info.get("dataset"), data_dir, download=download)
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; name a folder")
    init_processes()
    test = data.test[:limit] if limit else data.test
    calibration = data.train
    if len(calibration) > CALIBRATION_IMAGES:
        calibration = stratified(data.train, CALIBRATION_IMAGES)[1]
    calibration = calibration.images / 255
    network = Normalized(model, info["mean"], info["std"]).eval()
    described = {
        "class_names": json.dumps(info["class_names"]),
        "temperature": json.dumps(info.get("temperature")),
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }

    name = path.stem if path.name != "model.safetensors" else path.resolve().parent.name
    print(
        f"{utils.printable(path.as_posix())} on {len(test):,} test images; time per image on one"
        f" thread\n\n{HEADER}",
        flush=True,
    )
    eager = partial(open_eager, network)
    expected = classify(eager, test)
    verdicts = [judge("PyTorch", 0, eager, test, expected)]
    print(verdicts[0], flush=True)
    refused, files = [], []
    for kind in formats:
        with quiet():
            content = make(kind, network, calibration, described)
            opener = partial(open_onnx if kind.startswith("onnx") else open_pte, content)
            verdict = judge(kind, len(content), opener, test, expected)
        verdicts.append(verdict)
        print(verdict, flush=True)
        drop = verdicts[0].accuracy - verdict.accuracy
        allowed = MAX_DIFFERENCE * max(1, expected.abs().max().item())
        if drop > max_drop:
            refused.append(f"max_drop: {kind} loses {drop:.2f} points, {max_drop:g} are allowed")
        elif not kind.endswith("int8") and verdict.difference > allowed:
            refused.append(
                f"format: {kind} differs by {verdict.difference:.1e}, more than rounding"
            )
        else:
            files.append(out / file_name(name, kind))
            with utils.atomic_path(files[-1]) as temporary:
                temporary.write_bytes(content)
    print()
    for file in files:
        print(f"file: {utils.printable(file.as_posix())}")
    if refused:
        raise InputError(f"{'; '.join(refused)}; not written: take another format")
    return verdicts


def file_name(network: str, kind: str) -> str:
    """What the file of a network in a format is called: fast-int8.onnx, say."""
    suffix, dash, precision = kind.partition("-")
    return f"{network}{dash}{precision}.{suffix}"


def check_libraries(asked: tuple[str, ...]) -> list[str]:
    """The formats to make: those asked for, else all whose libraries are installed.

    Raises:
        InputError: a library is missing.
    """
    missing = {
        kind: [name for name in names if importlib.util.find_spec(name) is None]
        for kind, names in LIBRARIES.items()
    }
    formats = list(dict.fromkeys(asked)) or [kind for kind in LIBRARIES if not missing[kind]]
    lacking = {name for kind in formats or LIBRARIES for name in missing[kind]}
    if lacking:
        names = ", ".join(sorted(lacking))
        raise InputError(
            f"format: {names}: not installed; run `pip install -r requirements-export.txt`"
        )
    return formats


class Normalized(nn.Module):
    """A network with its normalization inside, so that no app can get that wrong."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) RGB in [0, 1] to (N, num_classes) logits."""
        return self.network((images - self.mean) / self.std)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In the block, the exporters keep to themselves what they print, log and warn of."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # some of it comes from C++
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# ---------------------------------------------------------------- verifying


@torch.inference_mode()
def classify(opener: Opener, test: Split) -> Tensor:
    """Logits of all images, on all processors."""
    classifier = opener(os.cpu_count() or 1)
    return torch.cat([classifier(batch / 255) for batch in test.images.split(EVAL_BATCH)])


@torch.inference_mode()
def judge(name: str, size: int, opener: Opener, test: Split, expected: Tensor) -> Verdict:
    """How a classifier does beside PyTorch's logits, and how long it takes on one thread."""
    logits = classify(opener, test)
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


def percent(right: Tensor) -> float:
    """How many of these are true, in percent."""
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
    """PyTorch itself."""
    torch.set_num_threads(threads)
    return network


def make(kind: str, network: Normalized, calibration: Tensor, described: dict[str, str]) -> bytes:
    """The content of a file of this format.

    Raises:
        InputError: its exporter fails.
    """
    try:
        match kind:
            case "onnx":
                return to_onnx(network, described)
            case "onnx-int8":
                return to_onnx_int8(network, calibration, described)
            case "pte":
                return to_pte(network)
            case "pte-int8":
                return to_pte_int8(network, calibration)
    except Exception as error:  # whatever a library of another version can raise
        raise InputError(
            f"format: {kind} failed ({first_line(error)}); install the versions of"
            " requirements-export.txt, or choose another format"
        ) from None


def to_onnx(network: Normalized, described: dict[str, str]) -> bytes:
    """ONNX in float32, for any batch size."""
    example = (torch.zeros(2, 3, 32, 32),)
    program = torch.onnx.export(
        network,
        example,
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    return finished_onnx(program.model_proto, described)


def finished_onnx(model: object, described: dict[str, str]) -> bytes:
    """The bytes of an `onnx.ModelProto`: the same each time, with our metadata alone.

    The exporter notes stack traces, and with them the paths of this machine.
    """
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    for key, value in described.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


def to_onnx_int8(network: Normalized, calibration: Tensor, described: dict[str, str]) -> bytes:
    """ONNX in int8: static ranges, a scale per channel, unsigned activations.

    Weights have 7 bits: on CPUs with AVX2 but without VNNI a sum of two products of 8 bits
    saturates (`fast` is right in 50% there). The first convolution and all that follows the last
    one stay in float32: they cost little, and most of the error came from them.
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
        quantization.quant_pre_process(whole, prepared)  # folds BN where it follows a convolution
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
        return finished_onnx(onnx.load(quantized), described)


def open_onnx(content: bytes, threads: int) -> Classifier:
    """An ONNX model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def to_pte(network: nn.Module) -> bytes:
    """ExecuTorch for one image at a time, run by XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(network, (torch.zeros(1, 3, 32, 32),))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def to_pte_int8(network: Normalized, calibration: Tensor) -> bytes:
    """ExecuTorch in int8: static ranges, a scale per channel."""
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
    return to_pte(convert_pt2e(prepared))


def open_pte(content: bytes, threads: int) -> Classifier:
    """An ExecuTorch program in its runtime, an image at a time."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)  # it has no other way to say so
    method = Runtime.get().load_program(content).load_method("forward")

    def run(images: Tensor) -> Tensor:
        # Its output is its own memory, which the next call overwrites.
        return torch.cat([method.execute([image])[0].clone() for image in images.split(1)])

    return run


def main(args: list[str]) -> None:
    """Export the checkpoint that the command line names."""
    script.parse_command_line(export, args, prog="export.py")()


if __name__ == "__main__":
    script.run_script(main)
