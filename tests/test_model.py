import math
import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import model
from config import PRESETS
from model import Architecture, ResNet, check_budget, model_cost, num_parameters
from utils import InputError, part_of

SMALL = {"num_blocks": (1, 1, 1), "c1": 4}


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
        "best": 4_327_754,
        "tiny": 272_474,
    }
    for name, num_blocks, c1, size in rows:
        architecture = part_of(PRESETS[name], Architecture)
        assert (architecture.num_blocks, architecture.c1) == (num_blocks, c1)
        if name in ("tpsnet", "model1", "model2"):  # the paper's networks differ in nothing else
            assert architecture == Architecture(num_blocks, c1)
        assert model_cost(architecture).num_params == size


def test_lists_are_taken_for_the_tuples_that_a_run_records():
    lists = Architecture(num_blocks=[1, 2], channels=[8, 9], conv_kernel=[3, 1], skip_kernel=[1, 3])
    same = Architecture(num_blocks=(1, 2), channels=(8, 9), conv_kernel=(3, 1), skip_kernel=(1, 3))
    assert lists == same


def test_layers_are_pytorchs_own():
    """So tools that go by a layer's type, which count operations or prune, find them."""
    for preset in PRESETS.values():
        with torch.device("meta"):
            network = ResNet(preset)
        kinds = {type(layer) for layer in network.modules()}
        for plain in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
            assert {kind for kind in kinds if issubclass(kind, plain)} == {plain}


def test_network_can_be_fused_and_has_second_derivatives():
    network = ResNet(Architecture(**SMALL))
    network(torch.randn(8, 3, 32, 32))  # moves the BN statistics
    network, x = network.eval(), torch.randn(2, 3, 32, 32)
    expected = network(x)
    network.conv1 = fuse_conv_bn_eval(network.conv1, network.bn1)
    network.bn1 = nn.Identity()
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x).logsumexp(1).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "choice",
    [
        {"num_blocks": (1, 2, 1)},
        {"num_blocks": (1, 1)},
        {"num_blocks": (1, 1, 1, 1), "pool_kernel": 4},
        {"c1": 5},
        {"width": 3},
        {"channels": (8, 12, 20)},
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


def test_channels_of_each_stage_stand_instead_of_the_doubling():
    network = ResNet(Architecture(**SMALL, width=1, channels=(8, 12, 4)))
    assert [stage[-1].conv2.out_channels for stage in network.stages] == [8, 12, 4]
    assert network.conv1.out_channels == 4  # C1 is that of the stem
    same = []
    for choice in ({}, {"channels": (8, 16, 32)}):
        torch.manual_seed(0)
        same.append(ResNet(Architecture(**SMALL, **choice)).state_dict())
    assert same[0].keys() == same[1].keys()
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


FOLLOWED = {
    "stride": Architecture(**SMALL, dropout=0.1),
    "pool": Architecture(**SMALL | {"c1": 24}, stem="whitening", downsample="pool", pool_kernel=3),
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_torch_fx_follows_the_network(kind):
    network = ResNet(FOLLOWED[kind]).eval()
    traced = torch.fx.symbolic_trace(network)
    features = create_feature_extractor(network, {"stages.1": "map", "flatten": "features"})
    for size in (32, 28):  # pooled to the same size, 1x1
        x = torch.randn(2, 3, size, size)
        assert torch.equal(traced(x), network(x))
        found = features(x)
        assert torch.equal(
            found["map"], network.stages[:2](network.relu(network.bn1(network.conv1(x))))
        )
        assert torch.equal(network.linear(found["features"]), network(x))


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (2, 3, 16, 16), (2, 3, 32, 16), (2, 1, 32, 32), (3, 32, 32)], ids=str
)
def test_images_of_another_shape_are_one_line(shape):
    network = ResNet(Architecture(**SMALL, pool_kernel=4)).eval()
    for model_ in (network, torch.fx.symbolic_trace(network)):
        with pytest.raises(InputError, match=r"images: \(.*\), not \(N, 3, 32, 32\); make"):
            model_(torch.randn(shape))


def test_each_layer_is_used_once():
    """Tools that keep a layer's input and output, such as DeepLift, need that."""
    network = ResNet(Architecture(**SMALL))
    used = Counter()
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda *_, name=name: used.update([name]))
    network(torch.randn(2, 3, 32, 32))
    assert set(used.values()) == {1}


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
    """On smooth images, whose neighboring pixels are all but equal."""
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


def test_first_loss_of_tpsnet_is_near_ln_10_and_gradients_reach_every_parameter():
    torch.manual_seed(0)
    network = ResNet()
    loss = F.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    # Above ln 10 = 2.30, not at it: 39 blocks each add their variance, and torch's default
    # initialization, the paper's, does not damp them.
    assert abs(loss.item() - math.log(10)) < 1
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


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
    assert num_parameters(Architecture()) == 4_959_770
    with pytest.raises(InputError, match=r"max_params: .* 5,034,010 parameters, .*--max-params"):
        check_budget(Architecture((17, 13, 13)))  # 4 blocks of 18,560 more
    check_budget(Architecture((17, 13, 13)), 6_000_000)
    with pytest.raises(InputError, match="; use --c1 16 or less, or raise --max-params"):
        check_budget(Architecture(c1=40))  # even with a width of 1 it has 7.8 million
