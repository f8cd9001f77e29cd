"""Rectified flow: the exact model of pairs has no loss and straight paths; fits."""

import functools
from dataclasses import dataclass

import pytest
import torch
from exact import ExactGaussian
from ladders import same
from luhman_runs import pairs, trainer

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.data.teacher_pairs import PairBatch
from ddim_pl.denoiser import Denoiser
from ddim_pl.noise import latents
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM
from ddim_pl.scales import expand_like
from ddim_pl.schedules import CosineLogSNRSchedule
from ddim_pl.training import DDPM, RectifiedFlow
from ddim_pl.training.loading import load


def straightened(teacher_file, **arguments):
    settings = {
        "teacher_num_steps": 4,
        "num_steps": 3,
        "ema_decay": 0.9,
        "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
        **arguments,
    }
    return RectifiedFlow(teacher=teacher_file[0], **settings)


@dataclass(frozen=True)
class Straight(Denoiser):
    """The model of pairs of a Gaussian flow, `x = m + s z`: from any state, its only image."""

    schedule: CosineLogSNRSchedule
    mean: float
    std: float
    prediction: str = "v"
    sigma_data: float = 1.0

    def __call__(self, z, t):
        scales = self.schedule(t)
        alpha, sigma = (expand_like(each, z) for each in scales)
        eps = (z - alpha * self.mean) / (alpha * self.std + sigma)
        return Prediction(self.mean + self.std * eps, eps)

    def output(self, z, t):
        scales = self.schedule(t)
        x, eps = self(z, t)
        return expand_like(scales.alpha, z) * eps - expand_like(scales.sigma, z) * x


def test_the_model_of_exact_pairs_has_no_loss_and_needs_one_step(teacher_file):
    schedule = CosineLogSNRSchedule()
    exact, straight = ExactGaussian(schedule, 0.2, 0.5), Straight(schedule, 0.2, 0.5)
    z, _ = latents(0, range(40), (1, 8, 8))
    z = z.double()
    x = exact.flow(z, 1000.0, 0.0)
    module = straightened(teacher_file, schedule=schedule, network=teacher_file[1].network)
    batch = PairBatch(x, torch.zeros(40), z)
    for seed in range(3):
        found = module.loss(straight, batch, step_generators(seed, z.device))
        assert found.max() < 1e-7
        apart = PairBatch(x, torch.zeros(40), z.flip(0))
        assert module.loss(straight, apart, step_generators(seed, z.device)).mean() > 0.05
    for num_steps in (1, 3, 50):
        levels = torch.linspace(1000, 0, num_steps + 1).double()
        drawn = DDIM()(straight, z, levels)
        torch.testing.assert_close(drawn, x, rtol=0, atol=1e-3)
        bent = DDIM()(exact, z, levels)
        assert num_steps == 50 or (bent - x).abs().mean() > 0.1
    assert eps_from_x(schedule(500.0), z, x).shape == z.shape


def test_a_fit_trains_on_the_pairs_and_its_student_takes_any_number_of_steps(
    teacher_file, tmp_path
):
    module = straightened(teacher_file)
    t = trainer(tmp_path, max_steps=3)
    t.fit(module, pairs(tmp_path))
    t.save_checkpoint(tmp_path / "last.ckpt")
    assert not same(
        module.average.module.state_dict(), teacher_file[1].average.module.state_dict()
    )
    assert (module.distilled_steps, len(module.levels)) == (None, 4)
    again = load(tmp_path / "last.ckpt")
    torch.testing.assert_close(again.sample([1]), module.sample([1]), rtol=0, atol=0)
    (origin,) = again.origin
    assert (origin["by"], origin["teacher_timesteps"]) == ("RectifiedFlow", "linear")
    # It may be straightened again.
    assert straightened((str(tmp_path / "last.ckpt"), None)).schedule == module.schedule
    assert isinstance(teacher_file[1], DDPM)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_stopped_fit_ends_with_the_weights_of_an_unbroken_one(teacher_file, tmp_path):
    whole, half, rest = (straightened(teacher_file) for _ in range(3))
    trainer(tmp_path, max_steps=4).fit(whole, pairs(tmp_path))
    t = trainer(tmp_path, max_steps=2)
    t.fit(half, pairs(tmp_path))
    t.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_steps=4).fit(
        rest, pairs(tmp_path), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert same(whole.state_dict(), rest.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level_sampling": "random"}, "level_sampling must be one of"),
        ({"loss_weight": "heavy"}, "loss_weight must be one of"),
        ({"pair_batch_size": 0}, "pair_batch_size must be at least 1"),
        ({"teacher_timesteps": "kwadratic"}, "timesteps must be one of"),
        ({"teacher_sampler": DDIM(1.0)}, "sampler must be deterministic"),
    ],
)
def test_wrong_arguments_are_errors(teacher_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        straightened(teacher_file, **arguments)


def test_a_plain_data_module_is_refused(tmp_path, teacher_file):
    with pytest.raises(ValueError, match="the data module of RectifiedFlow must be"):
        trainer(tmp_path, max_steps=1).fit(straightened(teacher_file), DigitsDataModule())
