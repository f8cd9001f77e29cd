"""diffusers' network as one of ours."""

import sys

import pytest
import torch
from foreign import OWN_DEFAULTS, random_unet, random_weights
from tiny import tiny_config, write_config

import ddim_pl
from ddim_pl.cli import main
from ddim_pl.networks.diffusers import DiffusersUNet


def test_its_sizes_are_where_ours_are():
    network = DiffusersUNet({**OWN_DEFAULTS, "num_class_embeds": 3})
    assert (network.image_size, network.in_channels, network.out_channels) == (8, 1, 1)
    assert network.num_classes == 3
    assert not hasattr(DiffusersUNet({**OWN_DEFAULTS, "sample_size": [8, 16]}), "image_size")


def test_it_answers_as_the_network_itself():
    theirs = random_unet(**OWN_DEFAULTS)
    ours = DiffusersUNet(dict(theirs.config)).eval()
    random_weights(ours)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3.0, 9.0])
    with torch.no_grad():
        assert torch.equal(ours(z, t), theirs(z, t).sample)


@pytest.mark.parametrize("count", [2, 64])
@pytest.mark.parametrize("upsample_type", ["conv", "resnet"])
def test_it_answers_the_same_when_it_is_made_ready_for_a_graph(count, upsample_type):
    network = DiffusersUNet({**OWN_DEFAULTS, "upsample_type": upsample_type}).eval()
    random_weights(network)
    z = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(z, torch.arange(count))
        network.take_any_batch()
        assert torch.equal(network(z, torch.arange(count)), before)


def test_dropout_is_an_argument_of_its_own():
    network = DiffusersUNet({**OWN_DEFAULTS, "dropout": 0.5}, dropout=0.2)
    assert {each.p for each in network.modules() if isinstance(each, torch.nn.Dropout)} >= {0.2}
    assert "dropout" not in network.init_args["arguments"]
    assert network.init_args["dropout"] == 0.2


def test_a_config_may_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "runs", max_epochs=1, limit_val_batches=0)
    network = {"class_path": "DiffusersUNet", "init_args": {"arguments": OWN_DEFAULTS}}
    config["model"]["init_args"]["network"] = network
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    checkpoint = tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    model = ddim_pl.load(checkpoint)
    assert type(model.network) is DiffusersUNet
    assert model.sample([0]).shape == (1, 1, 8, 8)


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'ddim_pl\[diffusers\]'"):
        DiffusersUNet(OWN_DEFAULTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "must be those of diffusers' UNet2DModel, .* 'depth'"),
        ({"up_block_types": ["UpBlock2D"]}, "must be those of diffusers' UNet2DModel"),
        ({"time_embedding_type": "learned"}, "time_embedding_type must be 'positional'"),
        ({"class_embed_type": "identity"}, "class_embed_type must be None"),
        ({"sample_size": None}, "sample_size must be the height and width"),
    ],
)
def test_other_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiffusersUNet({**OWN_DEFAULTS, **changes})
