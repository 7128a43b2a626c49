"""torch.hub beside a user's own utils.py, model.py, data.py and engine/."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import hubconf
from engine.checkpoint import load_model

RELEASED = sorted(path.stem for path in ROOT.glob("checkpoints/*.safetensors"))
USERS = ("utils", "data", "model", "engine.checkpoint")
USER = """
import sys, importlib.abc

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
from concurrent.futures import ThreadPoolExecutor
import pickle, torch, utils, engine.checkpoint

def look(event, args):
    if event == "exec":  # one of the files is imported; the user's stay what they are
        assert sys.modules["utils"] is utils

sys.addaudithook(look)
path = list(sys.path)
sys.setswitchinterval(1e-5)
with ThreadPoolExecutor() as pool:
    load = lambda name: torch.hub.load({root!r}, name, source="local")
    networks = list(pool.map(load, {names}))
import model, data
mine = [module.MINE for module in (utils, data, model, engine.checkpoint)]
assert mine == ["utils", "data", "model", "engine.checkpoint"], mine
assert sys.modules["utils"] is utils
assert sys.path == path
image = torch.ones(2, 3, 32, 32)
for network in networks:
    assert type(network) is type(networks[0])
    assert type(network).__module__ not in ("model", "__main__")
    same = pickle.loads(pickle.dumps(network))
    assert torch.equal(same(same.normalize(image)), network(network.normalize(image)))
sys.meta_path.pop(0)  # torch.export imports all kinds of libraries
assert torch.export.export(network, (image,))
"""


def test_hub_works_beside_a_users_own_modules(tmp_path):
    """All networks in one process, with the libraries that hubconf names alone."""
    for name in ("engine.__init__", *USERS):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"MINE = {name!r}\n")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line[:1] not in ("#", "-", "")}
    blocked = required - set(hubconf.dependencies) | {"PIL", "sklearn"}
    code = USER.format(root=str(ROOT), names=RELEASED, blocked=blocked)
    (tmp_path / "users.py").write_text(code)
    line = [sys.executable, "users.py"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", RELEASED)
def test_entry_gives_the_released_network_with_its_normalization(name):
    network = copy.deepcopy(getattr(hubconf, name)())
    model, info = load_model(ROOT / f"checkpoints/{name}.safetensors")
    assert network.info == info
    assert not network.training
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model((image - mean) / std)
        assert torch.allclose(network(network.normalize(image)), expected, atol=1e-4)
    # `normalize` is no layer: whatever counts, cuts or saves layers sees the network alone.
    assert [n for n, _ in network.named_modules()] == [n for n, _ in model.named_modules()]
    assert network.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", RELEASED)
def test_layers_are_those_of_pytorch(name):
    """Tools that go by a layer's type recognize them."""
    layers = list(getattr(hubconf, name)().modules())
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        found = [layer for layer in layers if isinstance(layer, kind)]
        assert found
        assert all(type(layer) is kind for layer in found)


def test_entry_without_pretrained_is_the_same_architecture_with_other_weights():
    network, new = hubconf.fast(), hubconf.fast(pretrained=False)
    assert new.architecture == network.architecture
    assert type(new) is type(pickle.loads(pickle.dumps(network)))
    assert not torch.equal(new.linear.weight, network.linear.weight)
    assert "accuracy" not in new.info


@pytest.mark.parametrize("pretrained", [False, True])
def test_network_comes_on_the_cpu_whatever_the_default_device_is(pretrained):
    with torch.device("meta"):
        network = hubconf.tiny(pretrained)
    tensors = [*network.state_dict().values(), *network.normalize.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_every_released_network_has_an_entry_and_nothing_else_is_one():
    public = [name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"]
    assert sorted(public) == RELEASED
