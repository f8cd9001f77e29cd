"""BitsPerDim against direct calls, on a network of random weights."""

import dataclasses

import lightning as L
import pytest
import torch
from tiny import tiny_ddpm, tiny_unet
from torch import nn
from torch.utils.data import DataLoader

from callbacks import BitsPerDim
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.images import from_uint8
from ddim_pl.likelihood import Bound, ode_bits_per_dim, ode_levels, variational_bound
from ddim_pl.noise import GammaNoise
from ddim_pl.rng import image_generators
from ddim_pl.schedules import LinearSchedule

NAMES = ["bits_per_dim", "bits_prior", "bits_diffusion", "bits_decoder", "bits_per_dim_ode"]
LEVELS = 12


def trainer(folder, *callbacks, **arguments):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=1,
        limit_test_batches=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **arguments,
    )


@pytest.fixture(params=[None, 10], ids=["plain", "classes"])
def module(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = tiny_unet(num_classes=request.param)
        nn.init.normal_(network.conv_out.weight, std=0.1)  # zeros say nothing
        return tiny_ddpm(network=network, schedule=LinearSchedule(LEVELS), seed=5)


def direct(module, indices, num_terms=None):
    """Means over the validation images `indices`, by name."""
    data = DigitsDataModule()
    data.setup()
    x, label = from_uint8(data.val_set.images(indices)), data.val_set.labels(indices)
    denoiser = module.denoiser.condition(label if module.num_classes else None)
    bound = variational_bound(
        denoiser, x, generator=image_generators(5, indices), num_terms=num_terms
    )
    ode = ode_bits_per_dim(
        dataclasses.replace(denoiser, clip=False),
        x,
        ode_levels(LEVELS, 3),
        generator=image_generators(5, indices),
        dequantise=True,
    )
    return dict(zip(NAMES, [v.mean().item() for v in (bound.total, *bound, ode)], strict=True))


def measured(t, stage):
    metrics = {k.removeprefix(f"{stage}/"): v.item() for k, v in t.callback_metrics.items()}
    return {name: metrics[name] for name in NAMES if name in metrics}


def near(values):
    return pytest.approx(values, rel=1e-5, abs=1e-6)  # the log is float32


@pytest.mark.parametrize("num_terms", [None, 4])
@pytest.mark.parametrize("batch_size", [4, 50])
def test_numbers_are_those_of_direct_calls(tmp_path, module, num_terms, batch_size):
    """Of exactly 17 images, over the whole set, whatever the batch; in inference mode."""
    callback = BitsPerDim(17, batch_size=batch_size, num_terms=num_terms, ode=True, ode_steps=3)
    t = trainer(tmp_path, callback)
    t.test(module, DigitsDataModule(), verbose=False)
    indices = torch.arange(17) * 1797 // 17
    assert measured(t, "test") == near(direct(module, indices, num_terms))
    assert all(p.grad is None for p in module.parameters())


def test_validate_measures_and_fit_does_not(tmp_path, module):
    data = DigitsDataModule(batch_size=4, steps_per_epoch=1)
    t = trainer(tmp_path, BitsPerDim(3))
    t.validate(module, data, verbose=False)
    want = direct(module, torch.tensor([0, 599, 1198]))
    del want["bits_per_dim_ode"]
    assert measured(t, "val") == near(want)
    t = trainer(tmp_path, BitsPerDim(3), max_epochs=1)
    t.fit(module, data)
    assert measured(t, "val") == {}
    assert "val/loss" in t.callback_metrics


def test_none_takes_all_images_and_a_large_number_no_more(tmp_path, monkeypatch):
    def brightness(denoiser, x, **_):
        return Bound(*x.flatten(1).double().mean(1).expand(3, -1))

    monkeypatch.setattr("callbacks.likelihood.variational_bound", brightness)
    images = DigitsDataModule(holdout=True).load(train=False).images(torch.arange(360))
    for number in (None, 10_000):
        t = trainer(tmp_path, BitsPerDim(number))
        t.test(tiny_ddpm(), DigitsDataModule(holdout=True), verbose=False)
        got = t.callback_metrics["test/bits_prior"].item()
        assert got == near(from_uint8(images).double().mean().item())


class Rank:
    """The part of a trainer that the callback asks, on one of two ranks."""

    def __init__(self, rank, datamodule, sums):
        self.global_rank, self.world_size, self.is_global_zero = rank, 2, rank == 0
        self.datamodule, self.sums = datamodule, sums
        self.progress_bar_callback = None
        self.strategy = self
        self.precision_plugin = L.pytorch.plugins.Precision()

    def reduce(self, values, reduce_op):
        assert reduce_op == "sum"
        assert values.dtype == torch.float64
        self.sums.append(values)
        return sum(self.sums)


def test_two_ranks_share_the_images(module, monkeypatch):
    """The second rank adds the first's sums to its own."""
    data, sums, logged = DigitsDataModule(), [], {}
    data.setup()
    monkeypatch.setattr(
        type(module), "log", lambda self, name, value, **_: logged.update({name: value})
    )
    callback = BitsPerDim(7, batch_size=2, ode=True, ode_steps=3)
    for rank in range(2):
        callback.on_test_epoch_end(Rank(rank, data, sums), module)
    assert [s[-1].item() for s in sums] == [4, 3]
    want = direct(module, torch.arange(7) * 1797 // 7)
    assert {k.removeprefix("test/"): v for k, v in logged.items()} == near(want)


@pytest.mark.parametrize("num_terms", [None, 3])
def test_the_options_are_those_of_the_bound(tmp_path, module, num_terms):
    """DDPM's published quantity, from the fourth level on."""
    options = {"variance": "large", "decoder_variance": "posterior", "num_terms": num_terms}
    t = trainer(tmp_path, BitsPerDim(5, first_level=4, **options))
    t.test(module, DigitsDataModule(), verbose=False)
    indices, data = torch.arange(5) * 1797 // 5, DigitsDataModule()
    data.setup()
    x, label = from_uint8(data.val_set.images(indices)), data.val_set.labels(indices)
    denoiser = module.denoiser.condition(label if module.num_classes else None)
    bound = variational_bound(
        denoiser,
        x,
        generator=image_generators(5, indices),
        levels=torch.arange(4, LEVELS + 1),
        **options,
    )
    want = dict(zip(NAMES, [v.mean().item() for v in (bound.total, *bound)], strict=False))
    assert measured(t, "test") == near(want)


def gamma_module(theta_0=0.01):
    noise = GammaNoise(theta_0)
    return tiny_ddpm(schedule=LinearSchedule(LEVELS), seed=5, noise=noise, sampler=None)


@pytest.mark.parametrize("share", [None, 0.1])
def test_gamma_models_are_measured(tmp_path, share):
    module = gamma_module()
    t = trainer(tmp_path, BitsPerDim(6, batch_size=4, gaussian_share=share, first_level=2))
    t.test(module, DigitsDataModule(), verbose=False)
    indices, data = torch.arange(6) * 1797 // 6, DigitsDataModule()
    data.setup()
    bound = variational_bound(
        module.denoiser,
        from_uint8(data.val_set.images(indices)),
        generator=image_generators(5, indices),
        levels=torch.arange(2, LEVELS + 1),
        noise=GammaNoise(0.01),
        gaussian_share=share,
    )
    want = dict(zip(NAMES, [v.mean().item() for v in (bound.total, *bound)], strict=False))
    assert measured(t, "test") == near(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "large"}, "variance must be 'small' for GammaNoise.*got 'large'"),
        ({"ode": True}, "ode must be False for GammaNoise.*got True"),
        ({"gaussian_share": 0.0}, "gaussian_share must lie in .*got 0.0"),
        ({}, "first_level must be at least 8 for GammaNoise.*got 1: the shapes"),
    ],
)
def test_what_a_gamma_model_cannot_have_is_refused_before_the_run(tmp_path, options, message):
    module = gamma_module(0.01 if options else 0.2)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, BitsPerDim(**options)).test(module, DigitsDataModule())


def test_what_a_gaussian_model_cannot_have_is_refused_before_the_run(tmp_path, module):
    for options, message in (
        ({"gaussian_share": 0.1}, "gaussian_share must be None for Gaussian noise, got 0.1"),
        ({"first_level": LEVELS}, f"first_level must be below {LEVELS}.*got {LEVELS}"),
        ({"first_level": 9, "num_terms": 4}, "num_terms must be at most 3.*got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, BitsPerDim(**options)).test(module, DigitsDataModule())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_terms": 0}, "num_terms must be at least 1, got 0"),
        ({"first_level": 0}, "first_level must be at least 1, got 0"),
        ({"variance": "middle"}, "variance must be one of .*got 'middle'"),
        ({"decoder_variance": "beta"}, "decoder_variance must be one of .*got 'beta'"),
        ({"ode_steps": 0}, "ode_steps must be at least 1, got 0"),
        ({"ode_probes": 0}, "ode_probes must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BitsPerDim(**arguments)


def test_a_plain_dataloader_is_refused(tmp_path):
    loader = DataLoader([(torch.zeros(1, 8, 8), 0)])
    with pytest.raises(ValueError, match=r"data must be a data module.*got NoneType"):
        trainer(tmp_path, BitsPerDim()).test(tiny_ddpm(), loader)


def test_more_terms_than_the_schedule_has_are_refused_before_the_run(tmp_path, module):
    with pytest.raises(ValueError, match=f"num_terms must be at most {LEVELS - 1}.*got {LEVELS}"):
        trainer(tmp_path, BitsPerDim(num_terms=LEVELS)).test(module, DigitsDataModule())


def test_bits_are_those_of_the_network_without_guidance_and_it_says_so(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("callbacks.likelihood.rank_zero_info", told.append)
    found = []
    for guidance in (None, 3.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = tiny_unet(num_classes=10, null_class=True)
            nn.init.normal_(network.conv_out.weight, std=0.1)
        model = tiny_ddpm(
            network=network, schedule=LinearSchedule(LEVELS), seed=5, guidance=guidance
        )
        t = trainer(tmp_path, BitsPerDim(num_images=6))
        t.test(model, DigitsDataModule(), verbose=False)
        found.append(measured(t, "test"))
        assert len(told) == (guidance is not None)
    assert found[0] == found[1]
    assert "without guidance" in told[0]
