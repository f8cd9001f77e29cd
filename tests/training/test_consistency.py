"""Consistency models: their loss in the papers' units, their limits, and their students."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from exact import ExactConsistency, ExactGaussian
from ladders import clone, fit, same, save
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import some_ddpm, tiny_unet
from torch import nn

from ddim_pl.evaluation.worker import warn_of_student
from ddim_pl.noise import GammaNoise
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM, Consistency
from ddim_pl.scales import expand_like
from ddim_pl.schedules import (
    CosineLogSNRSchedule,
    EDMSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    ZeroTerminalSNR,
)
from ddim_pl.training import DDPM, ConsistencyModel
from ddim_pl.training.consistency import earlier_noise
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.loading import load

SCHEDULES = [LinearSchedule(), CosineLogSNRSchedule(), EDMSchedule()]
STAGES = {"q": 2.0, "num_stages": 3, "stage_updates": 2}


class Wave(nn.Module):
    """A network whose answer is smooth and keeps float64."""

    in_channels, image_size = 1, 2

    def __init__(self):
        super().__init__()
        self.init_args = {}
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, z, t):
        return torch.sin(self.scale * z + t.to(z.dtype)[:, None, None, None] / 500)


def wave(schedule=None, **arguments):
    return ConsistencyModel(Wave(), schedule or EDMSchedule(), **arguments)


def images(count=64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64).clamp(-1, 1)


def drawn(x, seed):
    """The `ln s` of N(0, 1) and the noise that a loss with this seed draws."""
    generators = step_generators(seed, x.device)
    normal = torch.randn(len(x), generator=generators.host, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=generators.device).double()
    return normal, eps


# ---- noises


@pytest.mark.parametrize(("q", "stage"), [(2.0, 0), (2.0, 3), (2.0, 7), (256.0, 0)])
def test_the_earlier_noise_is_that_of_the_authors_code(q, stage):
    """`t_to_r_sigmoid`: `ratio = 1 - decay (1 + k sigmoid(-b t))` with k = 8 and b = 1."""
    s = np.geomspace(1e-4, 80, 40)
    ratio = 1 - (1 / q ** (stage + 1)) * (1 + 8 / (1 + np.exp(s)))
    found = earlier_noise(torch.from_numpy(s), q, stage).numpy()
    np.testing.assert_allclose(found, np.clip(s * ratio, 0, None), rtol=1e-12, atol=0)
    assert (found < s).all()


def test_the_first_stage_is_a_denoisers_and_eight_stages_end_where_the_preset_begins():
    s = torch.tensor([0.01, 1.0, 1.9, 2.0, 80.0], dtype=torch.float64)
    assert (earlier_noise(s, 2.0, 0) > 0).tolist() == [False, False, False, True, True]
    torch.testing.assert_close(earlier_noise(s, 2.0, 7), earlier_noise(s, 256.0, 0))


@pytest.mark.parametrize("schedule", [*SCHEDULES, ZeroTerminalSNR()], ids=repr)
def test_levels_have_the_noises_drawn_and_those_are_log_normal(schedule):
    module = wave(schedule, sampling_sigmas=[80.0])
    s, r = module._draw_noises(20_000, torch.Generator().manual_seed(0))
    t, u = module._levels_at(s, r)
    assert abs(s.log().mean() + 1.1) < 5 * 2 / math.sqrt(len(s))
    assert abs(s.log().std() - 2) < 5 * 2 / math.sqrt(2 * len(s))
    for noise, level in ((s, t), (r[r > 0], u[r > 0])):
        scales = schedule(level)
        torch.testing.assert_close(scales.sigma / scales.alpha, noise, rtol=1e-9, atol=0)
    assert (r < s).all()


def test_noises_stay_within_the_schedule_and_those_below_it_are_none():
    schedule = EDMSchedule(sigma_max=5.0)
    module = wave(schedule, sampling_sigmas=[5.0])
    s, r = module._draw_noises(2000, torch.Generator().manual_seed(0))
    assert float(s.max()) == pytest.approx(5.0, rel=1e-12)
    assert float(module._levels_at(s, r)[0].max()) <= 1000
    schedule = CosineLogSNRSchedule(log_snr_max=4.0)  # no less noise than 0.135
    module = wave(schedule, q=256.0)
    s, r = module._draw_noises(2000, torch.Generator().manual_seed(0))
    assert s.min() == pytest.approx(math.exp(-2))
    assert {*r[r < math.exp(-2)].tolist()} == {0.0}
    assert (module._levels_at(s, r)[1] == 0).equal(r == 0)


# ---- the loss


@pytest.mark.parametrize("method", ["training", "distillation"])
@pytest.mark.parametrize("prediction", ["v", "edm"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("q", "stage"), [(2.0, 0), (2.0, 2), (256.0, 0)])
def test_the_loss_is_the_papers_in_their_units(
    schedule, prediction, method, q, stage, monkeypatch
):
    """`||D(y_s, s) - D(y_r, r)|| / (s - r)` with `y = x + s eps`, evaluated anew."""
    more = {"num_stages": 3, "stage_updates": 1} if q == 2 else {}
    module = wave(schedule, prediction=prediction, sigma_data=0.5, method=method, q=q, **more)
    monkeypatch.setattr(ConsistencyModel, "stage", stage)
    if method == "distillation":
        with torch.no_grad():
            module.teacher.scale += 0.4
    x, least = images(), float(schedule(0.0).sigma)
    found = module.loss(module.denoiser, (x,), step_generators(3, x.device))

    def function(network, y, s):
        """D, by the papers' `c_skip y + c_out F(c_in y, level)` with sigma_data."""
        n = s[:, None, None, None]
        data = 0.5 if prediction == "edm" else 1.0
        level = schedule.level_at(-2 * s.log())
        output = network(y / (0.25 + n**2).sqrt(), (level - 1).clamp(min=0).float())
        output = output if prediction == "edm" else -output
        return (data**2 * y + n * data * (data**2 + n**2).sqrt() * output) / (data**2 + n**2)

    normal, eps = drawn(x, 3)
    most = float(schedule(schedule.num_levels * 1.0).sigma / schedule(1000.0).alpha)
    s = (2 * normal - 1.1).exp().clamp(least, most)
    r = earlier_noise(s, q, stage)
    r = torch.where(r > least, r, 0.0)
    n, m = s[:, None, None, None], r[:, None, None, None]
    y = x + n * eps
    earlier = x + m * eps
    if method == "distillation":
        earlier = y + (m - n) * (y - function(module.teacher, y, s)) / n
    with torch.no_grad():
        target = torch.where(m > 0, function(module.network, earlier, r.clamp(min=1e-9)), earlier)
        expected = (function(module.network, y, s) - target).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(found.detach(), expected / (s - r), rtol=1e-4, atol=1e-6)


class Unlabelled(ExactGaussian):
    def condition(self, label):
        assert label is None
        return self


class OfTheGaussian(ConsistencyModel):
    """Distils the exact denoiser."""

    @property
    def teacher_denoiser(self):
        return Unlabelled(self.schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_exact_function_is_consistent_in_the_limit_of_short_steps(schedule):
    """An Euler step errs by the square of its length: the loss falls as the steps do."""
    function, x = ExactConsistency(schedule), images(256)
    means = []
    for q in (2.0**10, 2.0**11, 2.0**12):
        module = OfTheGaussian(Wave(), schedule, method="distillation", q=q)
        loss = module.loss(function, (x,), step_generators(0, x.device))
        means.append(float(loss.mean()))
    assert means[0] < 2e-2
    assert means[0] / means[1] == pytest.approx(2, rel=0.02)
    assert means[1] / means[2] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_target_is_exact_where_the_teachers_flow_is(schedule, monkeypatch):
    """With the exact flow, which keeps standardised states, in place of the Euler step."""

    def flow(prediction, start, end):
        start, end = ([expand_like(a, x) for a in scales] for scales in (start, end))
        z = start[0] * prediction.x + start[1] * prediction.eps
        deviations = [(0.5**2 * alpha**2 + sigma**2).sqrt() for alpha, sigma in (start, end)]
        return end[0] * 0.3 + deviations[1] / deviations[0] * (z - start[0] * 0.3)

    x = images()
    module = OfTheGaussian(Wave(), schedule, method="distillation", q=4.0)
    euler = module.loss(ExactConsistency(schedule), (x,), step_generators(0, x.device))
    monkeypatch.setattr("ddim_pl.training.consistency.ddim_step", flow)
    exact = module.loss(ExactConsistency(schedule), (x,), step_generators(0, x.device))
    assert exact.max() < 1e-9 < 1e-3 < euler.max()


def test_without_noise_the_teachers_estimate_is_the_target():
    """In a first stage of a distillation a little noise is compared with none."""
    schedule, x = EDMSchedule(), images()
    module = OfTheGaussian(Wave(), schedule, method="distillation", q=2.0, mean_log_sigma=-5.0)
    loss = module.loss(ExactGaussian(schedule), (x,), step_generators(0, x.device))
    assert loss.max() < 1e-9


class Dropping(nn.Module):
    in_channels, image_size, num_classes = 1, 4, None

    def __init__(self):
        super().__init__()
        self.init_args = {"dropout": 0.5}
        self.drop, self.weight = nn.Dropout(0.5), nn.Parameter(torch.ones(1))
        self.masks = []

    def forward(self, z, t):
        self.masks.append(self.drop(torch.ones_like(z)))
        return self.weight * self.masks[-1] * z


@pytest.mark.parametrize("method", ["training", "distillation"])
def test_both_passes_of_the_student_have_one_dropout_mask(method):
    module = ConsistencyModel(Dropping(), EDMSchedule(), method=method, dropout=0.5)
    module.train()
    x = torch.zeros(8, 1, 4, 4)
    torch.manual_seed(0)
    for _ in range(2):
        module.loss(module._denoiser(module.network), (x,), step_generators(0, x.device))
    first, second, third, fourth = module.network.masks
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)
    assert {0.0, 2.0} == {*first.unique().tolist()}


@pytest.mark.parametrize("method", ["training", "distillation"])
def test_gradients_are_those_of_the_estimate_with_more_noise_alone(method):
    """Moving the weights moves the loss as if its target stood still."""
    module, x = wave(method=method), images(16)
    loss = module.loss(module._denoiser(module.network), (x,), step_generators(1, x.device))
    loss.sum().backward()
    targets, kept = [], ConsistencyModel._target

    def shifted(by):
        fixed = iter([targets[0]]) if targets else None
        with torch.no_grad():
            module.network.scale += by
            module._target = lambda *a: next(fixed)
            value = module.loss(
                module._denoiser(module.network), (x,), step_generators(1, x.device)
            ).sum()
            module.network.scale -= by
        return float(value)

    module._target = lambda *a: targets.append(kept(module, *a)) or targets[-1]
    module.loss(module._denoiser(module.network), (x,), step_generators(1, x.device))
    slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert float(module.network.scale.grad) == pytest.approx(slope, rel=1e-5)
    assert all(p.grad is None for name, p in module.named_parameters() if name != "network.scale")


def test_an_image_without_error_has_a_gradient_that_is_finite():
    """The gradient of a root is not, at 0; the authors' code replaces it in the weights' own."""
    module, x = wave(), images(4)
    module._target = lambda denoiser, x, eps, z, t, u: denoiser(z, t).x.detach()
    loss = module.loss(module._denoiser(module.network), (x,), step_generators(0, x.device))
    loss.mean().backward()
    assert (loss == 0).all()
    assert module.network.scale.grad == 0


def test_classes_reach_both_passes_and_the_teacher():
    network = some_ddpm(network=tiny_unet(num_classes=3, dropout=0.0)).average.module
    module = ConsistencyModel(network, EDMSchedule(), method="distillation")
    seen, label = [], torch.tensor([2, 0])
    for each in (module.network, module.teacher):
        each.register_forward_hook(lambda _, arguments, output: seen.append(arguments[2]))
    denoiser = module._denoiser(module.network).condition(label)
    module.loss(denoiser, (torch.zeros(2, 1, 8, 8),), step_generators(0, torch.device("cpu")))
    assert len(seen) == 3
    assert all(torch.equal(each, label) for each in seen)
    assert not module.train().teacher.training


# ---- runs


def model(teacher=None, **arguments):
    # A run that resumes must not owe its result to the global generator.
    seed_everything(arguments.pop("global_seed", 0), verbose=False)
    settings = {"ema_decay": 0.5, "dropout": 0.2, **STAGES}
    settings["optimizer"] = functools.partial(torch.optim.RAdam, lr=1e-3)
    if teacher is None:
        settings |= {"network": tiny_unet(), "schedule": EDMSchedule(), "prediction": "edm"}
    return ConsistencyModel(**{"teacher": teacher, **settings, **arguments})


class Stages(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *arguments):
        self.seen.append(pl_module.stage)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.parametrize("method", ["distillation", "from noise"])
def test_a_run_that_stops_goes_on_to_the_bit(method, teacher, tmp_path):
    """Stopped within a stage; the rest is of another stage too, and of another process' seed."""
    given = {} if method == "from noise" else {"teacher": teacher, "method": method}
    stages = Stages()
    files = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = model(**given)
    fit(whole, tmp_path, files, stages, max_steps=7)
    assert stages.seen == [0, 0, 1, 1, 2, 2, 2]
    rest, resumed = Stages(), model(**given, global_seed=9)
    fit(resumed, tmp_path / "rest", rest, max_steps=7, ckpt_path=tmp_path / "step=3.ckpt")
    assert rest.seen == [1, 2, 2, 2]
    assert same(clone(whole), clone(resumed))
    alone = load(tmp_path / "step=3.ckpt")
    assert (alone.stage, alone.method) == (1, whole.method)
    assert load(tmp_path / "step=7.ckpt").stage == 2


def test_training_begins_from_any_checkpoint(eps_teacher, teacher, tmp_path):
    from_eps = model(eps_teacher)
    assert (from_eps.prediction, from_eps.schedule) == ("v", LinearSchedule())
    assert same(clone(from_eps.network), clone(load(eps_teacher).average.module))
    distilled = some_ddpm(prediction="v", num_steps=2, distilled_steps=2)
    from_student = model(save(distilled, tmp_path / "student.ckpt"))
    assert same(clone(from_student.network), clone(distilled.average.module))
    assert model(save(model(teacher), tmp_path / "consistency.ckpt")).network is not None
    assert not hasattr(from_eps, "teacher")


def test_an_eps_teacher_is_distilled_by_what_it_predicts(eps_teacher, tmp_path):
    module = model(eps_teacher, method="distillation")
    assert (module.prediction, module.teacher_denoiser.prediction) == ("v", "eps")
    fit(module, tmp_path, max_steps=1)
    assert same(clone(module.teacher), clone(load(eps_teacher).average.module))
    read = load(save(module, tmp_path / "model.ckpt"))
    assert (read.prediction, read.teacher_denoiser.prediction) == ("v", "eps")


def test_its_levels_have_the_noises_that_it_is_sampled_from(teacher):
    module = model(teacher)
    scales = module.schedule(module.levels[:-1])
    torch.testing.assert_close(
        scales.sigma / scales.alpha, torch.tensor([80.0, 0.821]).double(), rtol=1e-6, atol=0
    )
    assert module.levels[-1] == 0
    assert model(sampling_sigmas=[80.0]).levels.tolist() == [1000.0, 0.0]


def test_a_student_is_a_plain_checkpoint_that_knows_its_steps(teacher, tmp_path, recwarn):
    module = model(teacher)
    torch.save(averaged_checkpoint(module), tmp_path / "student.ckpt")
    student = load(tmp_path / "student.ckpt")
    assert type(student) is DDPM
    assert (student.distilled_steps, student.distilled_sampler) == (2, Consistency())
    assert torch.equal(student.sample([0, 1]), module.sample([0, 1]))
    assert torch.equal(student.sample([1]), module.sample([1]))
    levels = student.levels
    for one in (module, student):
        warn_of_student(one, Consistency(), levels)
        warn_of_student(one, Consistency(clip=False), levels[[0, 2]])  # fewer steps are fine
    assert not [each for each in recwarn if "distilled" in str(each.message)]
    more = torch.tensor([900.0, 500.0, 200.0, 0.0])
    known = re.escape("distilled to at most 2 steps of Consistency(), and knows no others")
    for sampler, steps in ((Consistency(), more), (DDIM(), levels)):
        with pytest.warns(UserWarning, match=known):
            warn_of_student(student, sampler, steps)


def test_a_student_is_no_teacher(teacher, tmp_path):
    from ddim_pl.training import LuhmanDistillation, ProgressiveDistillation

    torch.save(averaged_checkpoint(model(teacher)), tmp_path / "student.ckpt")
    path = str(tmp_path / "student.ckpt")
    with pytest.raises(ValueError, match="was distilled to 2 steps and not trained at other"):
        model(path, method="distillation")
    for make in (
        functools.partial(ProgressiveDistillation, rounds=[(1, 1)]),
        functools.partial(LuhmanDistillation, teacher_num_steps=2),
    ):
        with pytest.raises(ValueError, match=r"was distilled to 2 steps of Consistency\(\) and"):
            make(teacher=path)


# ---- wrong inputs


def test_the_sampler_of_a_students_steps_needs_the_steps():
    with pytest.raises(ValueError, match=r"left out without distilled_steps, got Consistency\(\)"):
        some_ddpm(distilled_sampler=Consistency())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ect"}, "method must be one of .* got 'ect'"),
        ({"network": None}, "network or teacher must be given"),
        ({"q": 1.0}, "q must be above 1, .* got 1.0 with 3 stages"),
        ({"q": 256.0}, "q.num_stages at most 65536, got 256.0 with 3 stages"),
        ({"q": math.nan}, "q must be above 1"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
        ({"stage_updates": 0}, "stage_updates must be at least 1, got 0"),
        ({"stage_updates": None}, "stage_updates must be given for 3 stages"),
        ({"num_stages": 1}, "stage_updates must be left out for a single stage, got 2"),
        ({"std_log_sigma": -1.0}, "std_log_sigma must be at least 0, got -1.0"),
        ({"prediction": "eps"}, "prediction must be 'v', 'both' or 'edm' .* eps says nothing"),
        ({"prediction": "x"}, "prediction must be .* got 'x': its estimate of x must become"),
        ({"prediction": "residual"}, "prediction must be .* got 'residual': its estimate"),
        ({"noise": GammaNoise()}, "noise must be Gaussian for a consistency model"),
        ({"sampling_sigmas": []}, r"sampling_sigmas must fall strictly, .* got \[\]"),
        ({"sampling_sigmas": [1.0, 1.0]}, "sampling_sigmas must fall strictly"),
        ({"sampling_sigmas": [1.0, 0.0]}, "from at most 80 to above 0"),
        ({"sampling_sigmas": [81.0]}, r"sampling_sigmas .* from at most 80 .* got \[81.0\]"),
        ({"schedule": ScaledLinearSchedule()}, "sampling_sigmas .* at most 14.6"),
        ({"sampling_sigmas": [math.nan]}, "sampling_sigmas must fall strictly"),
        ({"teacher_prediction": "v"}, "teacher_prediction must be left out for method 'training'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_a_distillation_needs_a_teacher_and_reads_it_as_what_it_is(teacher):
    with pytest.raises(ValueError, match="teacher must be given for fit"):
        model(method="distillation").check_data(None)
    with pytest.raises(ValueError, match="predicts 'v', but is read as 'eps': set teacher_pred"):
        model(teacher, method="distillation", teacher_prediction="eps")
    model().check_data(None)  # from noise
