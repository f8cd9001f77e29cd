"""The average of the weights."""

from dataclasses import dataclass

import pytest
import torch
from ladders import same
from lightning.pytorch.callbacks import ModelCheckpoint
from small_trainer import trainer
from tiny import tiny_ddpm
from torch import nn
from torch.utils.data import DataLoader

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.evaluation.manifest import sampling_of
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.ema import Decay, ExponentialAverage, HalfLife
from ddim_pl.training.fingerprint import fingerprint, fingerprint_of_file
from ddim_pl.training.hyperparameters import build, describe
from ddim_pl.training.loading import load

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


def test_average_follows_its_recurrence_and_copies_buffers():
    network = nn.BatchNorm1d(3)
    average = ExponentialAverage(network, 0.5)
    expected = None
    for n in range(12):
        with torch.no_grad():
            network.weight.normal_(generator=torch.Generator().manual_seed(n))
            network.running_mean.fill_(float(n))
            network.num_batches_tracked.fill_(n)
        average.update_parameters(network)
        current = network.weight.detach().clone()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = current if expected is None else keep * expected + (1 - keep) * current
    torch.testing.assert_close(average.module.weight, expected)
    assert average.module.num_batches_tracked == 11
    assert not any(p.requires_grad for p in average.parameters())


def test_average_stays_in_evaluation_mode():
    module = tiny_ddpm()
    module.train()
    assert module.network.training
    assert not any(part.training for part in module.average.modules())


def test_the_count_comes_with_a_checkpoint_and_can_restart():
    network = nn.Linear(2, 2)
    average, other = ExponentialAverage(network, 0.9), ExponentialAverage(network, 0.9)
    values = [nn.Linear(2, 2) for _ in range(4)]
    for value in values[:3]:
        average.update_parameters(value)
    other.update_parameters(values[0])  # its own count is 1 before it reads another
    other.load_state_dict(average.state_dict())
    average.update_parameters(values[3])
    other.update_parameters(values[3])
    assert other.n_averaged == average.n_averaged == 4
    assert torch.equal(other.module.weight, average.module.weight)
    assert not torch.equal(average.module.weight, values[3].weight)
    average.restart()
    average.update_parameters(values[0])
    assert average.n_averaged == 1
    assert torch.equal(average.module.weight, values[0].weight)


def test_an_update_reads_nothing_from_the_device():
    """On a meta device there are no values, and whoever reads one gets an error."""
    network = nn.Linear(2, 2)
    average = ExponentialAverage(network, 0.9)
    average.update_parameters(network)
    average.to("meta").update_parameters(network.to("meta"))


@pytest.mark.parametrize("ramp", [0.05, 0.5, None])
def test_a_half_life_is_that_of_edms_loop(ramp):
    """Their rule from the images seen, of which the first update sees none and copies."""
    half_life, images, network = 900, 64, nn.Linear(1, 1, bias=False)
    average = ExponentialAverage(network, HalfLife(half_life, ramp))
    expected, seen = None, 0
    for n in range(60):
        with torch.no_grad():
            network.weight.fill_(float(n))
        average.update_parameters(network, images)
        effective = half_life if ramp is None else min(half_life, seen * ramp)
        beta = 0.5 ** (images / max(effective, 1e-8)) if n else 0.0
        expected = beta * (expected or 0.0) + (1 - beta) * n
        seen += images
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_after_a_half_life_half_of_the_average_is_new():
    network = nn.Linear(1, 1, bias=False)
    for images in (10, 50):
        average = ExponentialAverage(network, HalfLife(1000, None))
        for value in (0.0, *[1.0] * (1000 // images)):
            nn.init.constant_(network.weight, value)
            average.update_parameters(network, images)
        assert average.module.weight.item() == pytest.approx(0.5, rel=1e-5)


def test_a_half_life_is_described_by_its_arguments():
    decay = HalfLife(5e5)
    assert build(describe(decay), float | type(decay).__mro__[1], "a test") == decay


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "images of a HalfLife must be positive and finite, got 0: EDM has"),
        ({"images": 1, "ramp": 0.0}, "ramp of a HalfLife must be positive and finite, got 0.0"),
    ],
)
def test_a_wrong_half_life_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HalfLife(**arguments)


# Several averages

DECAYS = {"ema_decay": 0.2, "more_ema_decays": [0.9, HalfLife(20, None)]}


def fit(folder, updates, resume=None, **arguments):
    torch.manual_seed(0)
    module = tiny_ddpm(**{**DECAYS, **arguments})
    files = ModelCheckpoint(folder, save_last=True, save_top_k=0)
    t = trainer(folder, callbacks=[files], max_steps=updates, limit_val_batches=0)
    data = DigitsDataModule(batch_size=4, steps_per_epoch=100)
    t.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module, folder / "last.ckpt"


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("averages"), 8)


def test_every_average_is_that_of_a_run_which_has_it_alone(run, tmp_path):
    module, _ = run
    for average, decay in zip(module.averages, [0.2, *DECAYS["more_ema_decays"]], strict=True):
        alone, _ = fit(tmp_path, 8, ema_decay=decay, more_ema_decays=None)
        assert len(alone.averages) == 1
        assert same(weights(average.module), weights(alone.average.module))


def test_a_resumed_run_has_the_same_averages(run, tmp_path):
    _, half = fit(tmp_path / "first", 4)
    rest, _ = fit(tmp_path / "rest", 8, resume=half)
    for one, other in zip(run[0].averages, rest.averages, strict=True):
        assert same(weights(one), weights(other))


@pytest.mark.slow
def test_a_checkpoint_is_read_with_the_average_that_is_asked_for(run, tmp_path):
    module, path = run
    assert len({fingerprint(load(path, average=index)) for index in range(3)}) == 3
    for index, average in enumerate(module.averages):
        read = load(path, average=index)
        assert same(weights(read.average.module), weights(average.module))
        assert read.average.decay == average.decay
        assert fingerprint(read) == fingerprint_of_file(load(path, average=index), str(path))
        assert sampling_of(read).get("ema_decay") == (str(average.decay) if index else None)
        file = tmp_path / "exported.ckpt"
        torch.save(averaged_checkpoint(read), file)
        exported = load(file).average
        assert same(weights(exported.module), weights(average.module))
        assert exported.decay == average.decay


@dataclass(frozen=True)
class OnesOwn(Decay):
    """A class that others do not have."""

    def kept(self, updates, images):
        return 0.5


def test_an_export_needs_no_class_of_ones_own(tmp_path):
    for decay, recorded in [(OnesOwn(), None), (HalfLife(1000), "HalfLife"), (0.5, 0.5)]:
        arguments = averaged_checkpoint(tiny_ddpm(ema_decay=decay))["hyper_parameters"]
        found = arguments.get("ema_decay")
        found = found["class_path"].rpartition(".")[2] if isinstance(found, dict) else found
        assert found == recorded


def test_what_a_checkpoint_lacks_is_said(run, tmp_path):
    _, path = run
    with pytest.raises(ValueError, match=r"average must lie in \[0, 2\], got 3: 0 is that of"):
        load(path, average=3)
    with pytest.raises(ValueError, match=r"more_ema_decays must hold 2 decays, .* got 1"):
        load(path, more_ema_decays=[0.9])
    with pytest.raises(ValueError, match="ema_decay must lie in"):
        tiny_ddpm(more_ema_decays=[1.5])
    message = "average must be 0 in a fit, which keeps all, got 1"
    with pytest.raises(ValueError, match=message):
        tiny_ddpm(**DECAYS, average=1).check_data(None)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, 9, path, average=1)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_counts_the_images_of_its_updates(monkeypatch, tmp_path):
    """Of accumulated batches together; on several devices of all."""
    counts = []
    monkeypatch.setattr(
        ExponentialAverage, "update_parameters", lambda *args: counts.append(args[2])
    )
    t = trainer(tmp_path, max_steps=2, accumulate_grad_batches=3)
    t.fit(tiny_ddpm(), DataLoader(torch.zeros(24, 1, 8, 8), batch_size=4))
    assert counts == [12, 12]
