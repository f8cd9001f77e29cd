"""What every training method shares."""

from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from ladders import save
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from small_trainer import trainer
from tiny import some_ddpm, tiny_ddpm, tiny_unet
from torch import nn
from torch._dynamo import config

from ddim_pl.clipping import ClipRange, DynamicThreshold
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.noise import GammaNoise
from ddim_pl.prediction import LossWeight
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM, Ancestral
from ddim_pl.schedules import ZeroTerminalSNR
from ddim_pl.training import base
from ddim_pl.training.ddpm import averaged_checkpoint, denoising_loss
from ddim_pl.training.loading import load


def test_a_step_depends_on_its_seed_alone():
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module = tiny_ddpm()
    denoiser = module.denoiser
    losses = []
    for seed, disturbance in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(disturbance)
        losses.append(module.loss(denoiser, (x,), step_generators(seed, x.device)))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("source", ["generators", "philox"])
@pytest.mark.parametrize("sampler", [DDIM(), DDIM(1.0), Ancestral()], ids=str)
def test_same_index_same_image_for_any_split(sampler, source):
    seed_everything(0, verbose=False)
    module = tiny_ddpm(timesteps="linear", num_steps=3, sampler=sampler, noise_source=source)
    for parameter in module.average.parameters():
        nn.init.normal_(parameter, std=0.1)
    together = module.sample(range(5))
    apart = torch.cat([module.sample([0, 1]), module.sample([2]), module.sample([3, 4])])
    # Convolutions of another batch size may sum in another order.
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_the_source_of_noise_and_one_without_it_has_generators(tmp_path):
    """Whatever becomes the default one day."""
    images = {}
    for source in ("generators", "philox"):
        module = some_ddpm(noise_source=source, sampler=DDIM(1.0))
        path = save(module, tmp_path / f"{source}.ckpt")
        again = load(path)
        assert again.noise_source == source
        images[source] = module.sample(range(3))
        assert torch.equal(again.sample(range(3)), images[source])
    assert not torch.allclose(*images.values())
    content = torch.load(tmp_path / "generators.ckpt", weights_only=True)
    del content["hyper_parameters"]["noise_source"]
    torch.save(content, tmp_path / "old.ckpt")
    assert torch.equal(load(tmp_path / "old.ckpt").sample(range(3)), images["generators"])


def test_an_exported_model_keeps_the_source_of_noise():
    for source in ("generators", "philox"):
        checkpoint = averaged_checkpoint(some_ddpm(noise_source=source))
        assert checkpoint["hyper_parameters"]["noise_source"] == source


def test_training_has_the_same_noise_whatever_the_images_have():
    x = torch.zeros(4, 1, 8, 8)
    generators, philox = (tiny_ddpm(noise_source=each) for each in ("generators", "philox"))
    losses = [
        module.loss(generators.denoiser, (x,), step_generators(5, x.device))
        for module in (generators, philox)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_source": "numpy"}, r"noise_source must be one of .*, got 'numpy'"),
        ({"noise_source": "philox", "seed": 2**64}, r"seed must lie in \[0, 2\^64\)"),
    ],
)
def test_a_source_of_noise_that_there_is_not_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_ddpm(**arguments)


def test_classes_reach_the_network_in_training_and_sampling():
    module = tiny_ddpm(network=tiny_unet(num_classes=3), clip=False)
    for parameter in module.average.parameters():
        nn.init.normal_(parameter, std=0.1)
    free = module.sample([0, 1, 2, 3])
    torch.testing.assert_close(free, module.sample(range(4), label=torch.tensor([0, 1, 2, 0])))
    other = module.sample(range(4), label=torch.tensor([1, 1, 2, 0]))
    assert not torch.allclose(free[0], other[0])
    torch.testing.assert_close(free[1:], other[1:])


def test_learning_rate_warms_up_then_follows_the_schedule():
    module = tiny_ddpm(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=20),
        warmup_steps=4,
    )
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [min(1, (i + 1) / 5) * (1 - i / 20) for i in range(21)]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert configured["lr_scheduler"]["interval"] == "step"


def test_sampling_may_end_at_level_1():
    module = tiny_ddpm(timesteps=[700, 300, 1], last_level=1.0)
    assert module.levels.tolist() == [700, 300, 1]
    assert tiny_ddpm(timesteps=[700, 300, 1]).levels.tolist() == [700, 300, 1, 0]
    with pytest.raises(ValueError, match="last_level"):
        tiny_ddpm(timesteps=[700, 300, 1], last_level=700.0)


def test_gamma_noise_needs_a_signal_at_every_level():
    with pytest.raises(ValueError, match="noise must be Gaussian for ZeroTerminalSNR"):
        tiny_ddpm(schedule=ZeroTerminalSNR(), noise=GammaNoise(), prediction="v", sampler=None)


@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize("weight", get_args(LossWeight))
def test_training_and_sampling_are_finite_without_signal_at_the_last_level(prediction, weight):
    module = tiny_ddpm(schedule=ZeroTerminalSNR(), prediction=prediction, loss_weight=weight)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1000.0, 1.0]).double()
    loss = denoising_loss(module.denoiser, x, t, torch.randn_like(x), weight=weight)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(module.sample([0])).all()


@pytest.mark.parametrize(
    ("compile", "on_cuda", "stage", "wanted"),
    [
        ("auto", True, "fit", True),
        ("auto", False, "fit", False),
        ("auto", True, "predict", False),
        (True, False, "predict", True),
        (False, True, "fit", False),
    ],
)
def test_networks_are_compiled_where_it_pays(compile, on_cuda, stage, wanted, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    monkeypatch.setattr(base, "_trains_on_cuda", lambda module: on_cuda)
    module = tiny_ddpm(compile=compile)
    config.suppress_errors = False
    module.setup(stage)
    assert [id(each) for each in compiled] == [id(each) for each in module.networks if wanted]
    assert module.compiles is wanted
    assert config.suppress_errors is (compile == "auto" and wanted)
    module.teardown(stage)
    assert config.suppress_errors is False


@pytest.mark.parametrize("ends", ["well", "by an error"])
@pytest.mark.parametrize("compile", ["auto", True])
def test_what_a_fit_compiled_by_itself_is_not_compiled_afterwards(
    compile, ends, monkeypatch, tmp_path
):
    """Lightning moves the module to the CPU, where that does not pay and may fail."""

    class Fails(Callback):
        def on_train_batch_end(self, *_):
            if ends == "by an error":
                raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(base, "_trains_on_cuda", lambda module: True)
    make = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda network: make(network, backend="eager"))
    module = tiny_ddpm(network=tiny_unet(num_classes=10), compile=compile)
    data = DigitsDataModule(batch_size=4, steps_per_epoch=1)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[Fails()]).fit
    with nullcontext() if ends == "well" else pytest.raises(RuntimeError, match="on fire"):
        fit(module, data)
    left = [network._compiled_call_impl is not None for network in module.networks]
    assert left == [compile is True] * 2
    assert module.compiles is (compile is True)
    assert config.suppress_errors is False


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Weights that say that they are on a GPU when a module is moved."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", property(lambda weight: True), raising=False)


def layouts(module):
    weights = [each.conv_in.weight for each in module.networks]
    return {w.is_contiguous(memory_format=torch.channels_last) for w in weights}


def test_channels_are_last_on_a_gpu(on_a_gpu):
    module = some_ddpm(network=tiny_unet(in_channels=2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert layouts(module) == {False, True}  # the average's always
    module.to("cpu")
    assert layouts(module) == {True}
    assert all(torch.equal(before[n], value) for n, value in module.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_fit_in_bfloat16_has_channels_last_from_its_first_update(tmp_path, precision):
    module = some_ddpm(network=tiny_unet())
    trained = trainer(tmp_path, precision=precision, max_steps=1)
    trained.fit(module, DigitsDataModule(batch_size=8))
    states = [trained.optimizers[0].state[w]["exp_avg"] for w in module.network.parameters()]
    kernels = [state for state in states if state.ndim == 4 and min(state.shape[1:]) > 1]
    assert kernels
    last = {state.is_contiguous(memory_format=torch.channels_last) for state in kernels}
    assert last == {precision == "bf16-mixed"}


def test_a_network_may_have_no_weights():
    network = nn.Identity()
    network.in_channels, network.image_size, network.init_args = 1, 8, {}
    assert tiny_ddpm(network=network).to("cpu").network is network


def test_arguments_change_what_is_loaded(tmp_path):
    path = save(some_ddpm(), tmp_path / "model.ckpt")
    model = load(path, sampling_precision="bf16", num_steps=3)
    assert (model.sampling_precision, len(model.levels)) == ("bf16", 4)
    with pytest.raises(ValueError, match=r"sampling_precision must be one of"):
        load(path, sampling_precision=16)
    with pytest.raises(ValueError, match="num_step"):
        load(path, num_step=3)


@pytest.mark.parametrize(
    ("clip", "own", "found"),
    [
        (True, None, ClipRange()),
        (False, None, None),
        (False, ClipRange(-2, 3), ClipRange(-2, 3)),
        (True, False, None),
        (DynamicThreshold(), None, DynamicThreshold()),
    ],
)
def test_the_samplers_clipping_comes_before_the_models(clip, own, found):
    assert tiny_ddpm(clip=clip, sampler=DDIM(clip=own)).sampling_clip == found
