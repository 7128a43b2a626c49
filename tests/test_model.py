import json
import pickle
import re

import pytest
import safetensors.torch
import torch
from conftest import Bomb
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from config import PRESETS
from model import Architecture, ResNet, check_budget, model_cost
from utils import InputError, part_of
from weights import load_model, save_model

SMALL = {"num_blocks": (1, 1, 1), "c1": 4}
INFO = {
    "dataset": "cifar10",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "class_names": list("abcdefghij"),
}


def named_networks():
    """The rows of the table in the module's docstring."""
    row = r"\| (\w+) +\| \(([\d, ]+)\) +\| +(\d+) \| +([\d,]+) \|"
    for name, blocks, c1, parameters in re.findall(row, model.__doc__):
        yield name, tuple(map(int, blocks.split(","))), int(c1), int(parameters.replace(",", ""))


def test_named_networks_have_the_sizes_in_the_docstring():
    rows = list(named_networks())
    assert {name: size for name, _, _, size in rows} == {
        "tpsnet": 4_959_770,
        "model1": 4_865_580,
        "model2": 4_971_680,
        "fast": 4_342_042,
        "small": 1_092_922,
        "tiny": 277_066,
        "best": 4_327_754,
    }
    for name, num_blocks, c1, size in rows:
        architecture = part_of(PRESETS[name], Architecture)
        assert (architecture.num_blocks, architecture.c1) == (num_blocks, c1)
        if name in ("tpsnet", "model1", "model2"):  # the paper's networks differ in nothing else
            assert architecture == Architecture(num_blocks, c1)
        assert sum(p.numel() for p in ResNet(architecture).parameters()) == size
        assert model_cost(architecture).num_params == size


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels, size", [(96, 8), (256, 3)])  # only the second's forward
def test_convolutions_by_matrix_products_are_convolutions(kernel, channels, size):
    torch.manual_seed(0)
    x = torch.randn(2, channels, size, size, dtype=torch.float64, requires_grad=True)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(4, channels, kernel, kernel, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, size, size, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=kernel // 2)
    output = model.MatmulConv.apply(x, weight)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
    )


def test_matrix_products_take_over_only_in_training_on_amx_in_bfloat16(monkeypatch):
    used = []
    monkeypatch.setattr(model.MatmulConv, "apply", lambda x, weight: used.append(x) or x)
    x = torch.randn(2, 96, 7, 7)

    def uses(x, conv=None, amx=True):
        monkeypatch.setattr(model, "HAS_AMX", amx)
        used.clear()
        (conv or model.conv(x.shape[1], 96, 3))(x)
        return len(used) == 1

    with torch.autocast("cpu", torch.bfloat16):
        assert uses(x.bfloat16())
        assert not uses(x.bfloat16(), amx=False)
        assert not uses(x)  # float32, as after no other convolution
        assert not uses(x.bfloat16(), model.conv(96, 96, 3).eval())
        assert not uses(x.bfloat16(), model.conv(96, 192, 3, stride=2))
        assert not uses(x.bfloat16(), model.conv(96, 192, 5))
        assert not uses(torch.randn(2, 96, 8, 8).bfloat16())
        assert not uses(torch.randn(2, 95, 7, 7).bfloat16())


def normalised(norm, x, grad):
    """Output and gradients of a training batch normalisation and the ReLU after it."""
    x = x.clone().requires_grad_()
    output = F.relu(norm(x), inplace=True)
    return output, *torch.autograd.grad(output, (x, norm.weight, norm.bias), grad)


def test_folded_batch_norm_is_batch_norm(monkeypatch):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    folded = model.BatchNorm2d(24).double()
    folded.load_state_dict(norm.state_dict())
    x, grad = (
        (3 * torch.randn(2, 24, 6, 6, dtype=torch.float64) + 1).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    expected = normalised(norm, x, grad)
    monkeypatch.setattr(model.FoldedBatchNorm, "is_faster", lambda x: True)
    torch.testing.assert_close(normalised(folded, x, grad), expected)
    torch.testing.assert_close(folded.state_dict(), norm.state_dict())


def test_folded_batch_norm_takes_over_only_in_training_in_bfloat16(monkeypatch):
    used, apply = [], model.FoldedBatchNorm.apply
    monkeypatch.setattr(
        model.FoldedBatchNorm, "apply", lambda *args: used.append(1) or apply(*args)
    )
    x = torch.randn(2, 24, 2, 2).bfloat16().to(memory_format=torch.channels_last)

    def uses(x, norm=None):
        used.clear()
        assert (norm or model.BatchNorm2d(x.shape[1]))(x).dtype == x.dtype
        return len(used) == 1

    assert uses(x)
    assert not uses(x, model.BatchNorm2d(24).eval())
    assert not uses(x.float())
    assert not uses(x.contiguous())
    assert not uses(x[:1, :, :1, :2].contiguous(memory_format=torch.channels_last))  # two pixels
    assert not uses(torch.cat([x, x], dim=1))
    assert not uses(x[:, :16].contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    "choice",
    [
        {"num_blocks": (1, 2, 1)},
        {"num_blocks": (1, 1)},
        {"num_blocks": (1, 1, 1, 1), "pool_kernel": 4},
        {"c1": 5},
        {"width": 3},
        {"conv_kernel": 5},
        {"conv_kernel": (3, 1, 5)},
        {"skip_kernel": 3},
        {"skip_kernel": (1, 3, 5)},
        {"pool_kernel": 4},
        {"num_classes": 7},
        {"downsample": "pool", "pool_kernel": 4},
        {"c1": 24, "stem": "whitening"},
    ],
    ids=str,
)
def test_every_choice_changes_the_network(choice):
    base, changed = ResNet(Architecture(**SMALL)), ResNet(Architecture(**(SMALL | choice)))
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (base, changed)]
    assert shapes[0] != shapes[1]
    logits = changed.eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, choice.get("num_classes", 10))


def test_pooling_window_of_the_same_size_is_a_mean_over_the_map():
    network = ResNet(Architecture(**SMALL, pool_kernel=8)).eval()
    x = torch.randn(2, 3, 32, 32)
    features = network.stages(network.relu(network.bn1(network.conv1(x))))
    assert features.shape == (2, 2 * 4 * 4, 8, 8)
    torch.testing.assert_close(network(x), network.linear(features.mean((2, 3))))


def test_dropout_acts_between_the_convolutions_and_only_in_training():
    network = ResNet(Architecture(**SMALL, dropout=0.5))
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    inputs = []
    block = network.train().stages[0][0]
    block.conv2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.dropout.register_forward_hook(lambda *args: inputs.append(args[2]))
    network(x)
    assert inputs[0] is inputs[1]


def test_classifier_dropout_acts_on_the_pooled_features_and_only_in_training():
    network = ResNet(Architecture(**SMALL, classifier_dropout=0.5))
    inputs = []
    network.linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    features = network(torch.randn(4, 3, 32, 32)) is None or inputs.pop()
    assert 0.25 < (features == 0).float().mean() < 0.75
    x = torch.randn(4, 3, 32, 32)
    network.eval()
    assert torch.equal(network(x), network(x))
    with torch.no_grad():
        plain = ResNet(Architecture(**SMALL)).eval()
        plain.load_state_dict(network.state_dict())  # no parameter of its own
        assert torch.equal(plain(x), network(x))


def test_strides_and_projections_stand_where_the_shape_changes():
    network = ResNet(Architecture(num_blocks=(2, 2, 2), c1=4, skip_kernel=3))
    for i, stage in enumerate(network.stages):
        first, second = stage
        assert first.conv1.stride == ((1, 1) if i == 0 else (2, 2))
        assert first.shortcut[0].kernel_size == (3, 3)
        assert isinstance(first.shortcut[1], nn.BatchNorm2d)
        assert second.conv1.stride == (1, 1)
        assert isinstance(second.shortcut, nn.Identity)
    # With width 1 the first stage has the stem's channels, so its shortcut is the identity.
    assert isinstance(ResNet(Architecture(**SMALL, width=1)).stages[0][0].shortcut, nn.Identity)


def test_block_is_its_formula():
    block = model.BasicBlock(4, 8, 2, conv_kernel=3, skip_kernel=1, dropout=0.0).eval()
    x = torch.randn(2, 4, 8, 8)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    skip = block.shortcut[1](block.shortcut[0](x))
    torch.testing.assert_close(block(x), (branch + skip).relu())


def test_whitening_stem_is_frozen_and_whitens():
    """On smooth images, whose neighbouring pixels are all but equal."""
    network = ResNet(Architecture(num_blocks=(1,), c1=24, stem="whitening"))
    noise = torch.randn(100, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(noise, size=(32, 32), mode="bicubic")
    network.set_whitening(images)
    out = network.conv1(images)  # (100, 24, 31, 31)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])
    flat = out[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(12), atol=0.02, rtol=0)
    network(images).sum().backward()
    assert network.conv1.weight.grad is None
    assert network.bn1.weight.grad is not None


def test_pooled_stages_halve_before_their_blocks():
    network = ResNet(Architecture(**SMALL, downsample="pool", pool_kernel=4)).eval()
    x = torch.randn(2, 3, 32, 32)
    shapes = []
    for stage in network.stages:
        stage[1].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    network(x)
    assert shapes == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
    first = network.stages[0][0]
    expected = F.max_pool2d(F.conv2d(x := torch.randn(2, 4, 8, 8), first[0].weight, padding=1), 2)
    torch.testing.assert_close(first(x), (expected / (1 + 1e-5) ** 0.5).relu())


def test_cost_by_hand():
    # stem 3->2, one block 2->2 with identity shortcut at 32x32, pool to 4x4, linear 32->10
    cost = model_cost(Architecture(num_blocks=(1,), c1=2, width=1, pool_kernel=8))
    assert cost.num_params == (27 * 2 + 4) + 2 * (9 * 2 * 2 + 4) + (2 * 16 * 10 + 10)
    assert cost.macs == 32 * 32 * (27 * 2 + 2 * 9 * 2 * 2) + 2 * 16 * 10
    # kept for backward: the image, conv1's output, relu's; conv1's, relu's and conv2's outputs of
    # the block; its sum, after ReLU; and the pooled features
    maps = 3 + 2 + 2 + 2 + 2 + 2 + 2
    assert cost.activation_bytes == 4 * (maps * 32 * 32 + 2 * 16)


@pytest.mark.parametrize("preset", ["tpsnet", "fast"])
def test_macs_are_half_of_what_torch_counts_as_operations(preset):
    with torch.device("meta"):
        network, image = ResNet(part_of(PRESETS[preset], Architecture)), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    assert model.count_macs(network) == counter.get_total_flops() // 2
    network(image)  # and no hook is left
    assert not any(layer._forward_hooks for layer in network.modules())


def test_activation_memory_is_what_a_real_step_keeps():
    network = ResNet(Architecture(**SMALL))

    def kept(batch_size):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = network(torch.randn(batch_size, 3, 32, 32)).sum()  # noqa: F841
        return sum(sizes.values())

    per_image = kept(9) - kept(8)
    assert model_cost(Architecture(**SMALL)).activation_bytes == per_image


def test_cost_allocates_nothing():
    # 121 GB, were they allocated
    assert model_cost(Architecture(num_blocks=(3, 3, 3), c1=2700)).num_params > 30e9


def test_budget():
    assert check_budget(Architecture()) == 4_959_770
    with pytest.raises(InputError, match=r"max_params: .* 5,034,010 parameters, .*--max-params"):
        check_budget(Architecture((17, 13, 13)))  # 4 blocks of 18,560 more
    assert check_budget(Architecture((17, 13, 13)), 6_000_000) == 5_034_010


def test_saved_model_explains_itself(tmp_path):
    torch.manual_seed(0)
    network = ResNet(
        Architecture(num_blocks=(1, 2), c1=3, conv_kernel=(3, 5), skip_kernel=3, dropout=0.1)
    )
    network(torch.randn(8, 3, 32, 32))  # moves the BN statistics
    path = tmp_path / "new folder" / "a.safetensors"
    save_model(path, network, INFO | {"seed": 3})
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]

    loaded, info = load_model(path)
    x = torch.randn(2, 3, 32, 32)
    assert not loaded.training
    assert torch.equal(loaded(x), network.eval()(x))
    assert info["seed"] == 3
    assert info["mean"] == INFO["mean"]
    assert info["architecture"]["num_blocks"] == [1, 2]


def test_wrappers_leave_no_prefix(tmp_path):
    network = ResNet(Architecture(**SMALL))
    for wrapped in (
        nn.DataParallel(network),
        torch.compile(network, backend="eager"),
        nn.DataParallel(torch.compile(network, backend="eager")),
    ):
        save_model(tmp_path / "a.safetensors", wrapped, INFO)
        names = safetensors.torch.load_file(tmp_path / "a.safetensors")
        assert set(names) == set(network.state_dict())
        load_model(tmp_path / "a.safetensors")


def test_half_precision_weights_load_as_float(tmp_path):
    save_model(tmp_path / "a.safetensors", ResNet(Architecture(**SMALL)).half(), INFO)
    loaded, _ = load_model(tmp_path / "a.safetensors")
    assert loaded(torch.randn(1, 3, 32, 32)).dtype == torch.float32


def tampered(path, **changes):
    """A file of ours, its metadata changed; a key set to None is removed."""
    save_model(path, ResNet(Architecture(**SMALL)), INFO)
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
    texts |= {k: json.dumps(v) for k, v in changes.items()}
    texts = {k: v for k, v in texts.items() if v != "null"}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(path.read_bytes()), texts))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:1000]),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes((2**63).to_bytes(8, "little") + p.read_bytes()[8:]),
        lambda p: p.write_bytes(pickle.dumps(Bomb())),
        lambda p: torch.save({"model": Bomb()}, p),
        lambda p: safetensors.torch.save_file({"weight": torch.ones(3)}, p),
        lambda p: tampered(p, architecture=None),
        lambda p: tampered(p, architecture={"num_blocks": [500, 500, 500, 500], "c1": 4096}),
        lambda p: tampered(p, architecture={"num_blocks": [1, 1, 1], "c1": 5}),
        lambda p: tampered(p, architecture={"num_blocks": [1, 1, 1], "c1": "many"}),
        lambda p: tampered(p, architecture={"layers": 3}),
        lambda p: tampered(p, architecture=[1, 2]),
        lambda p: tampered(p, mean=None),
        lambda p: tampered(p, std=[0, 1, "x"]),
        lambda p: tampered(p, class_names=["one"]),
        lambda p: (p.unlink(), p.mkdir()),
    ],
)
def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save_model(path, ResNet(Architecture(**SMALL)), INFO)
    damage(path)
    with pytest.raises(InputError, match=r"^checkpoint: .*a\.safetensors .*; .*") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bomb_went_off").exists()


def test_failed_save_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    save_model(path, ResNet(Architecture(**SMALL)), INFO)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_model(path, ResNet(Architecture(**SMALL)), INFO | {"bad": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
