"""torch.hub, from another folder; and the cards and citation that other programs read."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import hubconf
from weights import load_model

RELEASED = sorted(path.stem for path in ROOT.glob("checkpoints/*.safetensors"))
USER = """
import sys, importlib.abc

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
import torch, utils, data

network = torch.hub.load({root!r}, {name!r}, source="local", pretrained={pretrained})
import model, weights
assert [utils.MINE, data.MINE, model.MINE, weights.MINE] == ["utils", "data", "model", "weights"]
assert sys.modules["utils"] is utils
assert sys.path[0] != {root!r}
{then}
"""


@pytest.fixture
def use(tmp_path):
    """Runs a user's script that loads a network, beside their own utils.py and more."""
    for name in ("utils", "data", "model", "weights"):
        (tmp_path / f"{name}.py").write_text(f"MINE = {name!r}\n")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line[0] != "#"}
    blocked = required - set(hubconf.dependencies) - {"pillow", "scikit-learn"} | {"PIL", "sklearn"}

    def run(then, name="fast", pretrained=True):
        code = USER.format(
            root=str(ROOT), name=name, pretrained=pretrained, then=then, blocked=blocked
        )
        (tmp_path / "users.py").write_text(code)
        line = [sys.executable, "users.py"]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    return run


@pytest.mark.parametrize("name", RELEASED)
def test_hub_gives_the_released_network(name, use):
    model, info = load_model(ROOT / f"checkpoints/{name}.safetensors")
    image = torch.ones(2, 3, 32, 32)
    use(
        "import pickle, copy\n"
        f"assert network.info['accuracy'] == {info['accuracy']}\n"
        "assert not network.training\n"
        "image = torch.ones(2, 3, 32, 32)\n"
        "same = pickle.loads(pickle.dumps(copy.deepcopy(network)))\n"
        "assert torch.equal(same(image), network(image))\n"
        f"assert abs(network(image).sum().item() - {model(image).sum().item()}) < 1e-3\n"
        "sys.meta_path.pop(0)  # torch.export looks for all kinds of libraries\n"
        "assert torch.export.export(network, (image,))",
        name,
    )


def test_two_networks_live_in_one_process(use):
    use(
        "import pickle\n"
        f"other = torch.hub.load({str(ROOT)!r}, 'tiny', source='local')\n"
        "assert type(other) is type(network)\n"
        "assert pickle.loads(pickle.dumps(network)).architecture == network.architecture"
    )


def test_hub_without_pretrained_is_the_same_architecture_with_other_weights(use):
    use(
        f"trained = torch.hub.load({str(ROOT)!r}, 'fast', source='local')\n"
        "assert network.architecture.c1 == trained.architecture.c1 == 24\n"
        "assert not torch.equal(network.linear.weight, trained.linear.weight)\n"
        "assert 'accuracy' not in network.info",
        pretrained=False,
    )


def test_every_released_network_has_an_entry_and_nothing_else_is_one():
    public = [name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"]
    assert sorted(public) == RELEASED


@pytest.mark.parametrize("name", RELEASED)
def test_cards_are_what_model_hubs_read(name):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(ROOT / f"checkpoints/{name}.md").data
    _, info = load_model(ROOT / f"checkpoints/{name}.safetensors")
    assert (data.license, data.pipeline_tag) == ("mit", "image-classification")
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.metrics == ["accuracy"]
    assert data.eval_results[0].metric_value == pytest.approx(info["accuracy"]["test"])
    assert data.eval_results[0].dataset_split == "test"
