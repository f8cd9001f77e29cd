"""Folders of diffusers: the same answers, and what is refused."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from foreign import (
    CIFAR10,
    CIFAR10_SCHEDULER,
    OWN_DEFAULTS,
    PUBLISHED_256,
    TINY,
    random_unet,
    save_as_before,
    save_pipeline,
)

from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.unet import UNet
from ddim_pl.samplers import Ancestral
from ddim_pl.schedules import LinearSchedule
from ddim_pl.teachers.diffusers_folder import DEFAULTS, native_arguments, read_folder

RESNET = {
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
}
NATIVE = {
    "cifar10": {},
    "film": RESNET,
    "heads": {"attention_head_dim": 8},
    "classes": {"num_class_embeds": 3},
    "width": {"time_embedding_dim": 24},
    "attention everywhere": {
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
    },
    "three levels": {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "sample_size": [16, 16],
        "layers_per_block": 2,
    },
}
LACKING = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "center_input_sample": True,
    "mid_block_scale_factor": 2.0,
    "act_fn": "gelu",
    "add_attention": False,
    "attn_norm_num_groups": 2,
    "sample_size": [8, 16],
    "block_out_channels": [8, 12],
    "attention_head_dim": 3,
    "upsample_type": "resnet",
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
}


def answers(network, theirs, seed=0):
    """What both networks answer to the same states, times and labels."""
    config = theirs.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, config.in_channels, height, width, generator=generator)
    t, label = torch.tensor([5.0, 800.0]), None
    if config.num_class_embeds:
        label = torch.tensor([2, 0])
    with torch.no_grad():
        expected = theirs(z, t, class_labels=label).sample
        actual = network.eval()(z, t, *(() if label is None else (label,)))
    assert expected.std() > 0.05
    return actual, expected


def assert_same(network, theirs, tolerance=1e-5):
    actual, expected = answers(network, theirs)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def test_the_defaults_are_those_of_diffusers():
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    theirs = {name: each.default for name, each in parameters.items() if name != "self"}
    lists = {n: list(value) if isinstance(value, tuple) else value for n, value in theirs.items()}
    assert lists == DEFAULTS


@pytest.mark.parametrize("changes", NATIVE.values(), ids=NATIVE)
def test_unet_answers_as_the_pipelines_network(changes, tmp_path):
    theirs = random_unet(**{**TINY, **changes})
    teacher = read_folder(save_pipeline(tmp_path, theirs))
    assert type(teacher.network) is UNet
    assert_same(teacher.network, theirs)


@pytest.mark.parametrize(("name", "value"), LACKING.items(), ids=LACKING)
def test_what_unet_lacks_is_named(name, value):
    arguments = {**DEFAULTS, **TINY}
    native_arguments(arguments)
    with pytest.raises(ValueError, match=rf"^({name}|.*(Block2D|attn_norm|two ways))"):
        native_arguments(arguments | {name: value})


def test_all_that_unet_lacks_is_named():
    with pytest.raises(ValueError, match="act_fn: gelu; add_attention: False; sample_size"):
        native_arguments(
            {**DEFAULTS, **TINY, "act_fn": "gelu", "add_attention": False, "sample_size": (8, 4)}
        )


@pytest.mark.parametrize(
    "changes",
    [{}, {**TINY, "norm_eps": 1e-5}, {**OWN_DEFAULTS, "num_class_embeds": 3}],
    ids=["defaults", "eps", "classes"],
)
def test_what_unet_lacks_is_wrapped(changes, tmp_path):
    theirs = random_unet(**(changes or OWN_DEFAULTS))
    teacher = read_folder(save_pipeline(tmp_path, theirs))
    assert type(teacher.network) is DiffusersUNet
    assert "UNet has no" in teacher.notes[0]
    assert_same(teacher.network, theirs, 0)


def test_the_published_cifar10_network_answers_the_same(tmp_path):
    theirs = random_unet(**CIFAR10)
    folder = save_as_before(tmp_path / "ddpm-cifar10-32", theirs, CIFAR10_SCHEDULER)
    teacher = read_folder(folder)
    assert type(teacher.network) is UNet
    assert sum(value.numel() for value in teacher.network.parameters()) == 35_746_307
    assert_same(teacher.network, theirs)
    assert teacher.settings["sampler"] == Ancestral("large")
    assert teacher.settings["schedule"] == LinearSchedule()


def test_the_published_networks_of_256_pixels_are_ours():
    native = native_arguments({**DEFAULTS, **PUBLISHED_256})
    with torch.device("meta"):
        ours, theirs = UNet(**native), UNet2DModel(**PUBLISHED_256)
    counts = [sum(value.numel() for value in each.parameters()) for each in (ours, theirs)]
    assert counts == [113_673_219] * 2
    assert native["attention"] == [16]


def test_weights_of_half_precision_are_read(tmp_path):
    theirs = random_unet()
    for value in theirs.parameters():
        value.data = value.data.half().float()
    folder = save_pipeline(tmp_path / "half", theirs)
    theirs.half().save_pretrained(folder / "unet")
    assert_same(read_folder(folder).network, theirs.float())


def test_a_network_alone_needs_a_scheduler(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", random_unet(), "DDPM")
    alone = tmp_path / "alone"
    shutil.copytree(folder / "unet", alone)
    with pytest.raises(ValueError, match=r"has no scheduler_config.json: .* by --scheduler"):
        read_folder(alone)
    given = [read_folder(alone, each) for each in (folder / "scheduler",)]
    given += [read_folder(alone, folder / "scheduler" / "scheduler_config.json")]
    assert all(each.settings["sampler"] == Ancestral("small") for each in given)
    with pytest.raises(ValueError, match=r"scheduler must be a scheduler_config.json or its fold"):
        read_folder(alone, tmp_path)


def test_a_given_scheduler_takes_the_place_of_the_pipelines(tmp_path):
    folder = save_pipeline(tmp_path / "a", random_unet(), num_train_timesteps=1000)
    other = save_pipeline(tmp_path / "b", random_unet(), num_train_timesteps=100)
    teacher = read_folder(folder, other / "scheduler")
    assert teacher.settings["schedule"] == LinearSchedule(100)


def rewritten(path, **changes):
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({n: each for n, each in content.items() if each != "gone"}))


def pipeline(tmp_path):
    return save_pipeline(tmp_path / "pipeline", random_unet())


def test_other_pipelines_are_refused(tmp_path):
    folder = pipeline(tmp_path)
    latent = {"vqvae": ["diffusers", "VQModel"]}
    rewritten(folder / "model_index.json", **latent)
    with pytest.raises(ValueError, match=r"pipeline of latents with vqvae \(VQModel\): supported"):
        read_folder(folder)
    texts = {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIP"]}
    rewritten(folder / "model_index.json", vqvae="gone", **texts)
    with pytest.raises(ValueError, match="pipeline of latents and of texts with vae"):
        read_folder(folder)
    rewritten(folder / "model_index.json", vae="gone", text_encoder="gone")
    read_folder(folder)
    unet = ["diffusers", "UNet2DConditionModel"]
    rewritten(folder / "model_index.json", unet=unet)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*: supported are pipelines of im"):
        read_folder(folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither model_index.json nor config.json: supported"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="holds a VQModel: supported are"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="a config of diffusers, got a file that cannot be read"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "unknown entry 'depth'"),
        ({"sample_size": None}, "image_size must be given"),
        ({"layers_per_block": 2}, r"do not fit the network \(\d+ missing: down_blocks"),
        (
            {"in_channels": 3},
            r"conv_in.weight has shape \(8, 1, 3, 3\) in place of \(8, 3, 3, 3\)",
        ),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None"),
        ({"norm_eps": 1e-5, "in_channels": 3}, r"conv_in.weight has shape \(8, 1, 3, 3\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, tmp_path):
    folder = pipeline(tmp_path)
    rewritten(folder / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


def test_the_size_of_images_is_given_only_where_it_is_missing(tmp_path):
    folder = pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"image_size must be 8, as in config.json, got 16"):
        read_folder(folder, image_size=16)
    rewritten(folder / "unet" / "config.json", sample_size=None)
    assert read_folder(folder, image_size=16).network.image_size == 16


def test_missing_and_damaged_weights_are_named(tmp_path):
    folder = pipeline(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"must be a file of weights, got .*it is damaged"):
        read_folder(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"put diffusion_pytorch_model.safetensors or .*\.bin"):
        read_folder(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json for its unet"):
        read_folder(folder)
