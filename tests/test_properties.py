"""Whatever configuration hypothesis thinks of: it is built as predicted, or its field is named."""

import math
from dataclasses import fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Architecture, ResNet, num_parameters
from utils import InputError

FIELDS = [field.name for field in fields(Architecture)]
LIMIT = 200_000  # parameters: the forward passes take milliseconds

kernels = st.sampled_from([1, 3, 5])
SOUND = {
    "num_blocks": st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    "c1": st.integers(1, 12),
    "width": st.integers(1, 3),
    "channels": st.just(()),
    "conv_kernel": kernels,
    "skip_kernel": kernels,
    "pool_kernel": st.integers(1, 4),
    "dropout": st.floats(0, 0.9),
    "num_classes": st.integers(2, 20),
    "stem": st.just("conv"),
    "downsample": st.sampled_from(["stride", "pool"]),
    "classifier_dropout": st.floats(0, 0.9),
}
some_kernels = st.integers(-1, 9) | st.lists(st.integers(-1, 5), max_size=5).map(tuple)
WILD = {
    "num_blocks": st.lists(st.integers(-1, 9), max_size=6).map(tuple),
    "c1": st.integers(-9, 5000),
    "width": st.integers(-9, 99),
    "channels": st.lists(st.integers(-1, 20), max_size=5).map(tuple),
    "conv_kernel": some_kernels,
    "skip_kernel": some_kernels,
    "pool_kernel": st.integers(-1, 40),
    "dropout": st.floats(),
    "num_classes": st.integers(-1, 200_000),
    "stem": st.sampled_from(["whitening", "none"]),
    "downsample": st.text(max_size=3),
    "classifier_dropout": st.floats(),
}


@st.composite
def architectures(draw):
    """A sound configuration, often with one or two wild values, which may be sound as well."""
    found = draw(st.fixed_dictionaries(SOUND))
    if draw(st.booleans()):
        found["channels"] = tuple(draw(st.integers(1, 20)) for _ in found["num_blocks"])
    if draw(st.booleans()):
        found["conv_kernel"] = tuple(draw(kernels) for _ in found["num_blocks"])
    for _ in range(2):
        if name := draw(st.sampled_from([None, *WILD])):
            found[name] = draw(WILD[name])
    if found["stem"] == "whitening" and draw(st.booleans()):
        found["c1"] = 24
    return found


def convolution(inputs, outputs, kernel):
    """Parameters of a convolution without bias and the BN after it."""
    return inputs * outputs * kernel**2 + 2 * outputs


def predicted(a):
    """Number of parameters, by hand."""
    stages = len(a["num_blocks"])
    conv, skip = (
        (a[name],) * stages if isinstance(a[name], int) else a[name]
        for name in ("conv_kernel", "skip_kernel")
    )
    whitening, pools = a["stem"] == "whitening", a["downsample"] == "pool"
    total, inputs = convolution(3, a["c1"], 2 if whitening else 3), a["c1"]
    size = 31 if whitening else 32
    for i, depth in enumerate(a["num_blocks"]):
        channels = a["channels"][i] if a["channels"] else a["c1"] * a["width"] * 2**i
        if pools:
            total, inputs, size = (
                total + convolution(inputs, channels, conv[i]),
                channels,
                size // 2,
            )
        elif i > 0:
            size = math.ceil(size / 2)
        for block in range(depth):
            total += convolution(inputs, channels, conv[i])
            total += convolution(channels, channels, conv[i])
            strided = not pools and i > 0 and block == 0
            if strided or inputs != channels:
                total += convolution(inputs, channels, skip[i])
            inputs = channels
    features = inputs * (size // a["pool_kernel"]) ** 2
    return total + (features + 1) * a["num_classes"]


def test_configuration_runs_as_predicted_or_its_field_is_named():
    outcomes = []

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(architectures())
    def check(architecture):
        try:
            count = num_parameters(Architecture(**architecture))
        except InputError as error:
            field = str(error).split(":")[0]
            assert field in FIELDS
            assert "\n" not in str(error)
            outcomes.append(field)
            return
        assert count == predicted(architecture)
        if count > LIMIT:
            return
        outcomes.append("accepted")
        model = ResNet(Architecture(**architecture)).eval()
        with torch.no_grad():
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, architecture["num_classes"])

    check()
    assert outcomes.count("accepted") > 50
    assert set(outcomes) == {"accepted", *FIELDS}  # every field was refused at least once
