"""Every method trains on the module's own law of noise, and its students inherit it."""

import warnings

import lightning as L
import pytest
import torch
from exact import Distilled, ExactGaussian, ExactMixture
from tiny import some_ddpm, tiny_ddpm, tiny_unet
from torch import nn

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import PairBatch, TeacherPairsDataModule
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.noise import GammaNoise, GaussianNoise, latents
from ddim_pl.prediction import target
from ddim_pl.rng import randn, step_generators
from ddim_pl.samplers import DDIM, GammaExact, GammaQuantile
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.timesteps import linear
from ddim_pl.training import DDPM, LuhmanDistillation, ProgressiveDistillation
from ddim_pl.training.ddpm import denoising_loss, draw_levels
from ddim_pl.training.fingerprint import fingerprint
from ddim_pl.transitions import q_sample

NOISE = GammaNoise(0.1)


class Recorder(nn.Module):
    """A network that answers zeros and keeps what it was shown."""

    in_channels, image_size = 1, 8

    def __init__(self):
        super().__init__()
        self.init_args = {}
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, z, t):
        self.seen.append(z.detach().clone())
        return z * self.weight


def trainer(folder, **arguments):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "default_root_dir": folder,
            **arguments,
        }
    )


def save(module, path):
    t = trainer(path.parent)
    t.strategy.connect(module)
    t.save_checkpoint(path)
    return str(path)


def gamma_teacher(**changes):
    arguments = {
        "noise": NOISE,
        "sampler": None,
        "schedule": CosineLogSNRSchedule(),
        "prediction": "v",
        "loss_weight": "snr_plus_one",
        "time_input": "log_snr",
        "network": tiny_unet(dropout=0.0),
        **changes,
    }
    return some_ddpm(**arguments)


@pytest.fixture(scope="module")
def teacher():
    return gamma_teacher()


@pytest.fixture(scope="module")
def teacher_file(teacher, tmp_path_factory):
    return save(teacher, tmp_path_factory.mktemp("gamma") / "teacher.ckpt")


# Teachers


@pytest.mark.parametrize("noise", [None, NOISE])
def test_training_states_have_the_modules_noise(noise):
    """Gaussian by default, from the same generator as ever."""
    module = tiny_ddpm(network=Recorder(), noise=noise, sampler=None)
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module.loss(
        NetworkDenoiser(module.network, module.schedule), (x,), step_generators(5, x.device)
    )
    again = step_generators(5, x.device)
    scales = module.schedule(draw_levels(module.schedule, 6, "uniform", again.host))
    eps = (
        randn(x.shape, again.device, x)
        if noise is None
        else noise.draw(x.shape, scales, again.device, x)
    )
    assert torch.equal(module.network.seen[0], q_sample(x, eps, scales))


class Missing(NetworkDenoiser):
    """Misses what is wanted of it by 0.3 everywhere."""

    def output(self, z, t):
        return self.wanted + 0.3


@pytest.mark.parametrize(("prediction", "weight"), [("eps", "snr"), ("x", "snr_plus_one")])
def test_l1_weighs_the_absolute_error_by_the_root(prediction, weight):
    """So that for errors of one size everywhere it is the root of l2."""
    losses = []
    for loss in ("l2", "l1"):
        module = tiny_ddpm(prediction=prediction, loss_weight=weight, loss=loss)

        x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([1.0, 10, 500, 900])
        denoiser = Missing(module.network, module.schedule, prediction)
        wanted = target(prediction, module.schedule(t), x, eps)
        object.__setattr__(denoiser, "wanted", wanted)
        losses.append(denoising_loss(denoiser, x, t, eps, weight=weight, loss=module.loss_kind))
    torch.testing.assert_close(losses[1], losses[0].sqrt(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"loss must be one of \('l2', 'l1'\), got 'l3'"):
        tiny_ddpm(loss="l3")


def test_sampling_starts_from_the_noise_at_the_first_level():
    module = tiny_ddpm(network=Recorder(), noise=NOISE, sampler=None)
    assert module.sampler == GammaQuantile(0.1)
    network = module.average.module
    for levels in (None, torch.tensor([300.0, 0.0])):
        network.seen.clear()
        module.sample(range(3), levels=levels)
        first = module.schedule(1000.0 if levels is None else 300.0)
        expected, _ = latents(0, range(3), (1, 8, 8), noise=NOISE, scales=first)
        assert torch.equal(network.seen[0], expected)


def test_a_sampler_of_other_noise_is_named_once():
    with pytest.warns(UserWarning, match=r"DDIM\(eta=0.0\) is made for Gaussian.*GammaQuantile"):
        module = tiny_ddpm(noise=NOISE, sampler=DDIM())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.sample([0])
        module.sample([0], sampler=DDIM())
        module.sample([0], sampler=GammaExact(0.1))
    with pytest.warns(UserWarning, match=r"theta_0=0.001.*GammaNoise\(theta_0=0.1\)"):
        module.sample([0], sampler=GammaExact())
    with pytest.warns(UserWarning, match="use DDIM"):
        tiny_ddpm(sampler=GammaQuantile())


def test_a_checkpoint_keeps_the_noise(teacher, teacher_file):
    read = DDPM.load_from_checkpoint(teacher_file, weights_only=True, map_location="cpu")
    assert read.noise == NOISE
    assert read.sampler == GammaQuantile(0.1)
    assert torch.equal(read.sample([3, 5]), teacher.sample([3, 5]))


def test_images_do_not_depend_on_their_batch(teacher):
    together = teacher.sample(range(4))
    alone = torch.cat([teacher.sample([i]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # float32, as convolutions do


def test_the_noise_is_part_of_the_fingerprint():
    names = {
        fingerprint(tiny_ddpm(network=Recorder(), noise=noise, sampler=None))
        for noise in (None, GaussianNoise(), NOISE, GammaNoise(0.2))
    }
    assert len(names) == 3


# Progressive students


@pytest.mark.parametrize("schedule", [LinearSchedule, CosineLogSNRSchedule])
@pytest.mark.parametrize("law", [ExactGaussian, ExactMixture])
@pytest.mark.parametrize("theta_0", [0.001, 0.1])
def test_a_ladder_of_perfect_students_draws_what_the_teacher_draws(theta_0, law, schedule):
    """To 1e-6: each round multiplies the 1e-10 or so that quantiles and targets are solved to."""
    teacher, noise = law(schedule()), GammaNoise(theta_0)
    module = ProgressiveDistillation(
        Recorder(), teacher.schedule, noise=noise, rounds=[(8, 1), (4, 1), (2, 1), (1, 1)]
    )
    z = noise.draw(
        (5, 1, 2, 2),
        teacher.schedule(1000.0),
        torch.Generator().manual_seed(0),
        torch.empty(0, dtype=torch.float64),
    )
    expected = GammaQuantile(theta_0)(teacher, z, linear(1000, 16))
    student = teacher
    for steps in (8, 4, 2, 1):
        student = Distilled(module.noise, student, steps)
        drawn = GammaQuantile(theta_0)(student, z, linear(1000, steps))
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-6)


def test_a_progressive_student_inherits_the_noise(teacher_file, tmp_path):
    module = ProgressiveDistillation(teacher=teacher_file, rounds=[(4, 2), (2, 2)])
    assert module.noise == NOISE
    assert module.sampler == GammaQuantile(0.1)
    fit = trainer(tmp_path, max_epochs=-1)
    fit.fit(module, DigitsDataModule(batch_size=4, steps_per_epoch=2))
    assert fit.global_step == 4
    torch.save(module.student_checkpoint(), tmp_path / "student.ckpt")
    student = DDPM.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    assert student.noise == NOISE
    assert student.sampler == GammaQuantile(0.1)
    torch.testing.assert_close(student.sample([1]), module.sample([1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [ProgressiveDistillation, LuhmanDistillation])
def test_a_student_of_other_noise_is_refused(kind, teacher_file):
    more = {"rounds": [(4, 2)]} if kind is ProgressiveDistillation else {"teacher_num_steps": 4}
    with pytest.raises(ValueError, match=r"has noise GammaNoise\(theta_0=0.1\), but the student"):
        kind(teacher=teacher_file, noise=GammaNoise(0.2), **more)


# Students of pairs


def test_pairs_begin_at_the_teachers_latents(teacher_file, tmp_path):
    module = LuhmanDistillation(teacher=teacher_file, teacher_num_steps=4)
    assert module.teacher_sampler == module.sampler == GammaQuantile(0.1)
    data = TeacherPairsDataModule(
        DigitsDataModule(),
        str(tmp_path / "pairs"),
        num_pairs=8,
        num_validation=4,
        shard_size=8,
        batch_size=4,
    )
    trainer(tmp_path, max_steps=1).fit(module, data)
    teacher = DDPM.load_from_checkpoint(teacher_file, weights_only=True)
    for batch in data.val_dataloader():
        pairs = PairBatch(*batch)
        seed = data.pair_seed
        z, _ = teacher.latents(range(8, 12), module.teacher_levels[0], seed=seed)
        assert torch.equal(pairs.latents, z)
        images = teacher.sample(range(8, 12), levels=module.teacher_levels, seed=seed)
        torch.testing.assert_close(pairs.images, images, rtol=0, atol=1e-5)
