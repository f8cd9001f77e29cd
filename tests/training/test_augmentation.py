"""Augmentation that does not leak: against the authors' formulas, and what the network is told."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ladders import same
from lightning.pytorch.callbacks import ModelCheckpoint
from small_trainer import trainer
from tiny import tiny_ddpm

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.networks.songunet import SongUNet
from ddim_pl.rng import step_generators
from ddim_pl.schedules import EDMSchedule
from ddim_pl.training.augmentation import FILTER, Augmentation, Change, change_images

EDM = {
    "schedule": EDMSchedule(),
    "prediction": "edm",
    "loss_weight": "edm",
    "time_input": "log_sigma",
    "sigma_data": 0.5,
    "level_sampling": "log_normal",
}


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


CHANGE = Change(
    mirror=numbers(1, 0, 1),
    flip=numbers(0, 1, 0),
    scale=numbers(0.5, 0, -1.5),
    angle=numbers(0.4, 0, -2.0),
    stretch=numbers(-0.8, 0.6, 0),
    direction=numbers(0.9, 0, 0),
    shift=numbers((0.3, -0.6), (0, 0), (-1.2, 0.5)),
)
NOTHING = Change(*(torch.zeros_like(each) for each in CHANGE))


def some_images():
    n, c, i, j = torch.meshgrid(*map(torch.arange, (3, 2, 8, 10)), indexing="ij")
    return torch.sin(1 + n + 2 * c + 0.7 * i + 1.1 * j)


# What the authors' own class gives for `some_images` and `CHANGE` in place of its random numbers:
# row 3 of the second channel of each image, and the labels (NVlabs/edm, training/augment.py).
THEIR_ROWS = [
    *([0.95962, 0.81077, 0.17537, -0.54827, -0.94683, -0.79711, -0.17595, 0.54112, 0.96613]),
    *([0.74258, 0.65485, 0.93216, 0.15452, -0.71512, -0.94496, -0.2721, 0.65152, 0.93869]),
    *([0.37581, -0.64537, 0.95987, 0.8256, 0.98013, 0.95023, 0.90115, 0.81638, 0.69998]),
    *([0.79642, 0.43082, -0.80353]),
]
THEIR_LABELS = [
    [1.0, 0.0, 0.5, -0.07894, 0.38942, -0.49729, -0.62666, 0.3, -0.6],
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0],
    [1.0, 0.0, -1.5, -1.41615, -0.9093, 0.0, 0.0, -1.2, 0.5],
]


def test_images_and_labels_are_those_of_the_authors_code():
    rows = change_images(some_images(), CHANGE)[:, 1, 3].flatten()
    torch.testing.assert_close(rows, torch.tensor(THEIR_ROWS), rtol=0, atol=2e-5)
    labels = CHANGE.labels.float()
    torch.testing.assert_close(labels, torch.tensor(THEIR_LABELS), rtol=0, atol=1e-5)


def rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def changed_slowly(image, k):
    """One channel in float64, pixel by pixel, with padding as wide as the image allows."""
    mirror, flip, a, angle, b, direction = (each[k].item() for each in CHANGE[:6])
    image = image[:, ::-1] if mirror else image
    image = image[::-1] if flip else image
    height, width = image.shape
    size = np.array([width, height])
    taps, padded = (
        np.array(FILTER),
        np.pad(image, ((height - 1,) * 2, (width - 1,) * 2), "reflect"),
    )

    def up(row):  # value n is the sum of x_k h_(n + 5 - 2 k)
        wide = np.zeros(2 * len(row) + 10)
        for k, value in enumerate(row):
            wide[2 * k : 2 * k + 12] += value * taps
        return wide[5:-5]

    fine = np.apply_along_axis(up, 0, np.apply_along_axis(up, 1, padded))
    # From the centre pixel i lies at i + 1/2 - size / 2, and pixel i of the fine image at half of
    # that and a quarter, since pixel k has become pixel 2 k.
    turn = rotation(direction)
    stretched = turn.T @ np.diag([2 ** (0.2 * b), 2 ** (-0.2 * b)]) @ turn
    matrix = 2 ** (0.2 * a) * stretched @ rotation(-angle)
    shift = CHANGE.shift[k].numpy() * size / 8
    sampled = np.zeros((2 * height + 12, 2 * width + 12))
    for i, j in np.ndindex(*sampled.shape):
        place = (np.array([j, i]) + 0.5 - np.array(sampled.shape[::-1]) / 2) / 2 + 0.25
        source = np.linalg.inv(matrix) @ (place - shift)
        x, y = 2 * (source - 0.25) + np.array(fine.shape[::-1]) / 2 - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < fine.shape[0] and 0 <= column < fine.shape[1]:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    sampled[i, j] += weight * fine[row, column]

    def down(row):
        row = np.pad(row, 5)
        return np.array([row[2 * n : 2 * n + 12] @ taps for n in range((len(row) - 10) // 2)])

    coarse = np.apply_along_axis(down, 0, np.apply_along_axis(down, 1, sampled))
    return coarse[3:-3, 3:-3]


def test_images_are_those_of_the_formulas_pixel_by_pixel():
    images = some_images()
    found = change_images(images, CHANGE)
    for k, c in np.ndindex(3, 2):
        slow = torch.from_numpy(changed_slowly(images[k, c].double().numpy(), k))
        torch.testing.assert_close(found[k, c].double(), slow, rtol=0, atol=2e-5)


def test_what_is_not_changed_stays_as_it_was():
    """The low-pass filter is orthogonal to its shifts by two."""
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(change_images(images, NOTHING), images, rtol=0, atol=1e-5)
    assert NOTHING.labels.abs().max() == 0
    mirrored = change_images(images, NOTHING._replace(mirror=CHANGE.mirror))
    expected = torch.stack([images[0].flip(2), images[1], images[2].flip(2)])
    torch.testing.assert_close(mirrored, expected, rtol=0, atol=1e-5)


def test_a_shift_goes_to_the_right_and_down():
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 5, 4] = 1
    shift = NOTHING._replace(shift=numbers((1.0, 2.0)))  # eighths: 2 and 4 pixels
    moved = change_images(image, Change(*(each[:1] for each in shift)))
    assert divmod(moved.argmax().item(), 16) == (9, 6)


@pytest.mark.parametrize("probability", [0.12, 1.0])
def test_changes_are_drawn_with_their_probabilities(probability):
    """Five standard deviations of a share are 5 sqrt(p (1 - p) / n) <= 0.0112."""
    n = 50_000
    drawn = Augmentation(probability).draw(n, torch.Generator().manual_seed(0))
    shares = {name: (each != 0).double().mean().item() for name, each in drawn._asdict().items()}
    half, p = 0.5, probability
    expected = {"mirror": half, "flip": p / 2, "scale": p, "angle": p, "stretch": p}
    assert shares == pytest.approx(expected | {"direction": half, "shift": p}, abs=0.0112)
    for name in ("scale", "stretch", "shift"):
        values = getattr(drawn, name)
        assert values[values != 0].std().item() == pytest.approx(1, abs=0.05)
    for name in ("angle", "direction"):
        values = getattr(drawn, name)
        assert values.abs().max() <= math.pi
        assert values[values != 0].abs().mean().item() == pytest.approx(math.pi / 2, rel=0.05)


def network(**changes):
    sizes = {"channels": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]}
    return SongUNet(8, 1, **{**sizes, "num_augment_labels": 9, **changes})


def answering(net):
    """The same network with weights that answer; a new one answers almost zeros."""
    for values in net.parameters():
        values.data += 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    return net


def test_a_network_that_is_told_nothing_answers_as_if_told_zeros():
    net = answering(network()).eval()
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([-1.0, 0.5])
    labels = torch.zeros(2, 9)
    with torch.no_grad():
        assert torch.equal(net(z, t), net(z, t, augment=labels))
        assert not torch.allclose(net(z, t), net(z, t, augment=labels + 1))
    net(z, t).sum().backward()  # DDP wants a gradient for all
    assert net.augment_in.weight.grad.abs().max() == 0
    for told, wrong in ((net, labels[:1]), (network(num_augment_labels=None), labels)):
        with pytest.raises(ValueError, match=r"augment must have shape \(2, "):
            told(z, t, augment=wrong)


def test_in_training_the_network_sees_the_changed_images_and_is_told():
    """With as good as no noise it is fed the image, over the standard deviation of a state."""
    seen = []

    def look(net, arguments, told):
        seen.append((arguments[0], told.get("augment")))

    net = network()
    net.register_forward_pre_hook(look, with_kwargs=True)
    laws = {"level_mean": -12.0, "level_std": 0.01}
    module = tiny_ddpm(network=net, augment_probability=1.0, **EDM, **laws)
    plain = tiny_ddpm(network=net, **EDM, **laws)
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    for each, mode in ((module, True), (module, False), (plain, True)):
        net.train(mode)
        denoiser = replace(each.denoiser, network=net)
        each.loss(denoiser, (x,), step_generators(0, x.device))
    host = step_generators(0, x.device).host
    torch.randn(4, generator=host, dtype=torch.float64)  # the levels come first
    changed, labels = Augmentation(1.0)(x, host)
    torch.testing.assert_close(seen[0][0] / 2, changed, rtol=0, atol=1e-3)
    assert torch.equal(seen[0][1], labels)
    # Evaluation is that of a model without.
    assert torch.equal(seen[1][0], seen[2][0])
    assert seen[1][1] is None
    assert seen[2][1] is None


def fit(folder, updates, resume=None):
    torch.manual_seed(0)
    module = tiny_ddpm(network=network(), augment_probability=0.5, **EDM)
    files = ModelCheckpoint(folder, save_last=True, save_top_k=0)
    t = trainer(folder, callbacks=[files], max_steps=updates, limit_val_batches=0)
    data = DigitsDataModule(batch_size=4, steps_per_epoch=100)
    t.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state, folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_a_resumed_fit_draws_the_same_changes(tmp_path):
    whole, _ = fit(tmp_path / "whole", 6)
    _, half = fit(tmp_path / "half", 3)
    rest, _ = fit(tmp_path / "rest", 6, half)
    assert same(whole, rest)


def test_it_keeps_the_dtype():
    x = torch.rand(3, 1, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = change_images(x.float(), CHANGE)
    torch.testing.assert_close(images, change_images(x.float(), CHANGE), rtol=0, atol=0)
    images, labels = Augmentation(0.5)(x, torch.Generator())
    assert images.dtype == labels.dtype == torch.bfloat16


def test_wrong_arguments_are_refused():
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"augment_probability must lie in \[0, 1\], got"):
            tiny_ddpm(network=network(), augment_probability=wrong)
    for net in (network(num_augment_labels=None), network(num_augment_labels=3), None):
        with pytest.raises(ValueError, match="augment_probability must be 0 for a network withou"):
            tiny_ddpm(network=net, augment_probability=0.1)
    with pytest.raises(ValueError, match="num_augment_labels of the network must be None without"):
        tiny_ddpm(network=network()).check_data(None)
    tiny_ddpm(network=network(), augment_probability=0.1).check_data(None)
    with pytest.raises(ValueError, match="num_augment_labels"):
        network(num_augment_labels=0)
