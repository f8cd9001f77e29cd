"""DINOv2's network, with random weights in the format of the published files."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer
from torchvision.transforms import functional as transforms

from ddim_pl.metrics.dinov2 import MEAN, SHAPES, STD, DINOv2Features, Shape, VisionTransformer
from ddim_pl.metrics.quality import SampleQuality

TINY = Shape(width=32, depth=3, heads=4)


def randomised(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, weights in network.named_parameters():
        scales = weights.ndim == 1 and not name.endswith("bias")
        weights.data = 0.2 * torch.randn(weights.shape, generator=generator) + scales
    return network.eval().requires_grad_(False)


def torchvisions(ours, side):
    """torchvision's network with the same weights; LayerScale is part of what it scales."""
    theirs = TorchvisionTransformer(side, ours.patch, TINY.depth, TINY.heads, 32, 128)
    theirs.heads = nn.Identity()
    state = ours.state_dict()
    mapped = {
        "class_token": state["cls_token"],
        "conv_proj.weight": state["patch_embed.proj.weight"],
        "conv_proj.bias": state["patch_embed.proj.bias"],
        "encoder.pos_embedding": state["pos_embed"],
    }
    for part in ("weight", "bias"):
        mapped[f"encoder.ln.{part}"] = state[f"norm.{part}"]
        for i in range(TINY.depth):
            a, b = f"blocks.{i}.", f"encoder.layers.encoder_layer_{i}."
            scale = [state[f"{a}ls{n}.gamma"] for n in (1, 2)]
            scale = [each[:, None] for each in scale] if part == "weight" else scale
            mapped[f"{b}ln_1.{part}"] = state[f"{a}norm1.{part}"]
            mapped[f"{b}ln_2.{part}"] = state[f"{a}norm2.{part}"]
            mapped[f"{b}self_attention.in_proj_{part}"] = state[f"{a}attn.qkv.{part}"]
            projection = state[f"{a}attn.proj.{part}"]
            mapped[f"{b}self_attention.out_proj.{part}"] = scale[0] * projection
            mapped[f"{b}mlp.0.{part}"] = state[f"{a}mlp.fc1.{part}"]
            mapped[f"{b}mlp.3.{part}"] = scale[1] * state[f"{a}mlp.fc2.{part}"]
    theirs.load_state_dict(mapped)
    return theirs.eval()


def test_the_network_is_torchvisions_with_layer_scale():
    ours = randomised(VisionTransformer(TINY, patch=7, trained_side=28))
    x = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    found = ours(x)
    assert found.std(dim=0).min() > 1e-2  # of different images
    with torch.no_grad():
        torch.testing.assert_close(found, torchvisions(ours, 28)(x), rtol=1e-4, atol=1e-5)


def test_the_network_is_timms():
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model("vit_small_patch14_dinov2", num_classes=0))
    ours = VisionTransformer(SHAPES["small"])
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def bicubic(values, scale, size):
    """One axis, the last, without antialiasing, by the formula with a = -3/4; edges repeat."""
    places = (np.arange(size) + 0.5) / scale - 0.5
    first = np.floor(places).astype(int)
    found = 0
    for offset in (-1, 0, 1, 2):
        x = np.abs(places - first - offset)
        near = 1.25 * x**3 - 2.25 * x**2 + 1
        far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        index = (first + offset).clip(0, values.shape[-1] - 1)
        found = found + np.where(x <= 1, near, far) * values[..., index]
    return found


def test_positions_are_interpolated_as_in_the_authors_code():
    """Bicubic, with the scale of a tenth of a patch more than there is."""
    ours = randomised(VisionTransformer(TINY))
    assert ours.positions(37, 37) is ours.pos_embed
    square = ours.pos_embed[0, 1:].double().reshape(37, 37, 32).permute(2, 0, 1).numpy()
    columns = bicubic(square, 16.1 / 37, 16)
    expected = bicubic(columns.swapaxes(1, 2), 16.1 / 37, 16).swapaxes(1, 2)
    found = ours.positions(16, 16)
    assert torch.equal(found[:, 0], ours.pos_embed[:, 0])
    np.testing.assert_allclose(
        found[0, 1:].reshape(16, 16, 32).permute(2, 0, 1), expected, atol=1e-5
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of the small network as the authors write it."""
    network = randomised(VisionTransformer(SHAPES["small"]))
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 384)}, path)
    return path, network


def test_a_published_file_gives_features_of_images_of_any_size(published):
    path, network = published
    before = torch.get_rng_state()
    features = DINOv2Features(str(path), size="small")
    assert torch.equal(torch.get_rng_state(), before)
    assert (features.name, features.num_features) == ("dinov2_small", 384)
    assert not features.train().training
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    bicubic = transforms.InterpolationMode.BICUBIC
    resized = transforms.resize(images.float(), [224, 224], bicubic, antialias=True)
    expected = network(transforms.normalize(resized / 255, MEAN, STD))
    torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-4)
    grey = images[:, :1]
    torch.testing.assert_close(features(grey), features(grey.repeat(1, 3, 1, 1)))
    by_pil = DINOv2Features(str(path), size="small", resize="pil")
    assert by_pil.name == "dinov2_small_pil"
    picture = transforms.to_pil_image(images[0]).resize((224, 224), Image.Resampling.BICUBIC)
    scaled = transforms.normalize(transforms.to_tensor(picture)[None], MEAN, STD)
    torch.testing.assert_close(by_pil(images), network(scaled), rtol=1e-4, atol=1e-4)
    assert SampleQuality(features).keys == ("dinov2_small_fd",)


def test_no_network_is_an_error_that_names_the_file_and_its_place(monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError,
        match=r"dinov2_vitl14_pretrain.pth.* put it in .*checkpoints, or give .*weights_path",
    ):
        DINOv2Features()


@pytest.mark.parametrize("what", ["nowhere", "text", "other", "list"])
def test_a_wrong_file_is_an_error_that_names_it(tmp_path, published, what):
    path = tmp_path / f"{what}.pth"
    if what == "text":
        path.write_text("no weights")
    elif what == "other":
        torch.save({"cls_token": torch.zeros(1, 1, 384)}, path)
    elif what == "list":
        torch.save([1], path)
    with pytest.raises(ValueError, match=rf"could not be read from .*{what}.pth"):
        DINOv2Features(str(path), size="small")
    with pytest.raises(ValueError, match="could not be read"):  # of another size
        DINOv2Features(str(published[0]), size="base")


def test_a_file_that_runs_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"cls_token": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="could not be read"):
        DINOv2Features(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
