import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exact import Distilled, ExactGaussian, ExactMixture, two_steps
from ladders import clone, fit, ladder, same, save
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import some_ddpm, tiny_unet
from torch import nn

from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.denoiser import NetworkDenoiser
from ddim_pl.images import from_uint8
from ddim_pl.prediction import decode, eps_from_x, target, x_error_weight
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM
from ddim_pl.scales import expand_like, unsqueeze_like
from ddim_pl.schedules import CosineLogSNRSchedule, ImprovedCosineSchedule, LinearSchedule
from ddim_pl.timesteps import linear
from ddim_pl.training import DDPM, ProgressiveDistillation
from ddim_pl.training.loading import load as load_teacher
from ddim_pl.transitions import ddim_step, two_step_target

SCHEDULES = [LinearSchedule, ImprovedCosineSchedule, CosineLogSNRSchedule]


class Wave(nn.Module):
    """A network whose answer is smooth and keeps float64."""

    in_channels, image_size = 1, 2

    def __init__(self):
        super().__init__()
        self.init_args = {}

    def forward(self, z, t):
        return torch.sin(1.3 * z + t.to(z.dtype)[:, None, None, None] / 500)


def wave(schedule=None, rounds=((8, 1),), **arguments):
    """A ladder whose teacher is a `Wave`."""
    return ProgressiveDistillation(
        Wave(), schedule or LinearSchedule(), rounds=list(rounds), **arguments
    )


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def papers_target(teacher, z, t, step):
    """`(z_s - sigma_s / sigma_t z_t) / (alpha_s - sigma_s / sigma_t alpha_t)`, and `z_s`.

    At `s = 0` both are the teacher's second estimate, as in the authors' code.
    """
    schedule = teacher.schedule
    scales, mid, end = (schedule(each) for each in (t, t - step / 2, (t - step).clamp(min=0)))
    z_mid = ddim_step(teacher(z, t), scales, mid)
    second = teacher(z_mid, t - step / 2)
    z_s = ddim_step(second, mid, end)
    ratio = end.sigma / scales.sigma
    numerator = z_s - expand_like(ratio, z) * z
    quotient = numerator / expand_like(end.alpha - ratio * scales.alpha, z)
    last = unsqueeze_like(t - step <= 0, z)
    return torch.where(last, second.x, quotient), torch.where(last, second.x, z_s)


@pytest.mark.parametrize("student", ["x", "v"])
@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 8, 4096])
def test_a_student_of_the_target_lands_where_two_steps_do(schedule, steps, prediction, student):
    schedule = schedule(num_levels=8192)
    module = wave(schedule, [(steps, 1)], teacher_prediction=prediction)
    teacher, step = module.teacher_denoiser, 8192 / steps
    assert teacher.prediction == prediction
    t = step * torch.tensor([1, (steps + 1) // 2, steps], dtype=torch.float64)
    z, scales, end = noise(3, 1, 2, 2), schedule(t), schedule.step_end(t - step)
    wanted = two_steps(module.noise, teacher, z, t, step)
    output = target(student, scales, wanted, eps_from_x(scales, z, wanted))
    landed = ddim_step(decode(student, scales, z, output), scales, end)
    expected, z_s = papers_target(teacher, z, t, step)
    error = (landed - z_s).flatten(1).norm(dim=1) / z_s.flatten(1).norm(dim=1)
    assert (error < 1e-10).all(), error
    # Where a step is long, and there is signal at its end, the published quotient is exact too.
    good = (steps <= 8) & (end.alpha > 1e-3) | (t == step)
    torch.testing.assert_close(wanted[good], expected[good], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "share"), [(1, 4.5e-5), (8, 2.3e-4), (1024, 0.028), (4096, 0.096)]
)
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_last_target_is_the_teachers_second_estimate(prediction, steps, share):
    """Where level 0 has noise, the quotient would mix in this share of the first, at any length.

    The sampler too returns the estimate of x there.
    """
    module = wave(CosineLogSNRSchedule(8192), [(steps, 1)], teacher_prediction=prediction)
    teacher, t = module.teacher_denoiser, torch.tensor([8192 / steps]).double()
    z, scales, middle, end = noise(1, 1, 2, 2), *map(teacher.schedule, (t, t / 2, t * 0))
    first = teacher(z, t)
    second = teacher(ddim_step(first, scales, middle), t / 2)
    wanted = two_steps(module.noise, teacher, z, t, float(t))
    torch.testing.assert_close(wanted, second.x, rtol=1e-12, atol=0)
    mixed = two_step_target(first.x, second.x, scales, middle, end)
    expected = share * (first.x - second.x)
    torch.testing.assert_close(mixed - second.x, expected, rtol=0.02, atol=1e-12)
    drawn = DDIM()(teacher, z, [float(t), float(t / 2), 0.0])
    torch.testing.assert_close(drawn, second.x, rtol=1e-12, atol=0)


def test_the_last_target_is_the_teachers_last_estimate():
    schedule = LinearSchedule()
    x_t, x_mid = noise(2, 3, 1, 2, 2)
    for t in (1000.0, 4.0):
        scales, mid, end = schedule(t), schedule(t / 2), schedule(0.0)
        torch.testing.assert_close(
            two_step_target(x_t, x_mid, scales, mid, end), x_mid, rtol=0, atol=0
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("law", [ExactGaussian, ExactMixture])
def test_a_ladder_of_perfect_students_draws_what_the_teacher_draws(law, schedule):
    teacher = law(schedule())
    module = wave(teacher.schedule, [(8, 1), (4, 1), (2, 1), (1, 1)])
    z = noise(5, 1, 2, 2)
    expected = DDIM()(teacher, z, linear(1000, 16))
    student = teacher
    for steps in (8, 4, 2, 1):
        student = Distilled(module.noise, student, steps)
        drawn = DDIM()(student, z, linear(1000, steps))
        torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-9)
    # It is not the data that comes out, but the teacher's 16 steps: few steps differ.
    assert not torch.allclose(DDIM()(teacher, z, linear(1000, 8)), expected, rtol=1e-6)


class Reproducing(NetworkDenoiser):
    """A student whose output is the teacher's target by the paper's formula, plus `miss`."""

    def answer(self, teacher, steps, miss):
        object.__setattr__(self, "parts", (teacher, self.schedule.num_levels / steps, miss))
        object.__setattr__(self, "seen", [])
        return self

    def output(self, z, t):
        teacher, step, miss = self.parts
        self.seen.append(t)
        scales = self.schedule(t)
        x, _ = papers_target(teacher, z, t, step)
        return target(self.prediction, scales, x, eps_from_x(scales, z, x)) + miss


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one"])
@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_is_the_weighted_error_of_x_against_the_target(schedule, prediction, weight):
    module = wave(schedule(), prediction=prediction, loss_weight=weight)
    losses = []
    for miss in (0.0, 0.1):
        student = Reproducing(Wave(), module.schedule, prediction, clip=False)
        student.answer(module.teacher_denoiser, 8, miss)
        x = noise(64, 1, 2, 2).clamp(-1, 1)
        losses.append(module.loss(student, (x,), step_generators(3, x.device)))
    scales = module.schedule(student.seen[0])
    per_x = 1.0 if prediction == "x" else scales.sigma**2  # an error of v is sigma times one of x
    expected = x_error_weight(weight, scales) * per_x * 0.1**2
    assert losses[0].max() < 1e-16 * max(1, expected.max())
    torch.testing.assert_close(losses[1], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("steps", [4, 60])
def test_levels_are_the_students_own_and_equally_likely(steps):
    # 60 * (1000 / 60) is more than 1000 in floating point.
    module = wave(rounds=[(steps, 1)])
    student = Reproducing(Wave(), module.schedule, "v", clip=False)
    student.answer(module.teacher_denoiser, steps, 0.0)
    count = 20_000
    x = torch.zeros(count, 1, 2, 2, dtype=torch.float64)
    module.loss(student, (x,), step_generators(0, x.device))
    i = student.seen[0] * steps / 1000
    torch.testing.assert_close(i, i.round(), rtol=0, atol=1e-9)
    counts = torch.bincount(i.round().long(), minlength=steps + 1)
    share = 1 / steps
    assert counts[0] == 0
    assert (counts[1:] - count * share).abs().max() < 5 * (count * share * (1 - share)) ** 0.5


def test_classes_reach_the_teacher_too():
    network = some_ddpm(network=tiny_unet(num_classes=3, dropout=0.0)).average.module
    module = ProgressiveDistillation(network, rounds=[(4, 1)])
    x = torch.zeros(2, 1, 8, 8)
    seen = []
    module.teacher.register_forward_hook(lambda _, arguments, output: seen.append(arguments[2]))
    label = torch.tensor([2, 0])
    denoiser = module._denoiser(module.network).condition(label)
    module.loss(denoiser, (x,), step_generators(0, x.device))
    assert len(seen) == 2
    assert all(torch.equal(each, label) for each in seen)


def test_gradients_reach_the_student_alone():
    network = some_ddpm().average.module.requires_grad_(True)
    module = ProgressiveDistillation(network, rounds=[(4, 1)], dropout=0.3)
    module.train()
    assert module.network.training
    assert not any(part.training for part in [*module.teacher.modules(), module.average.module])
    assert {m.p for m in module.network.modules() if isinstance(m, nn.Dropout)} == {0.3}
    x = torch.zeros(4, 1, 8, 8)
    denoiser = module._denoiser(module.network)
    module.loss(denoiser, (x,), step_generators(0, x.device)).mean().backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
    assert with_gradient == {f"network.{name}" for name, _ in module.network.named_parameters()}
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in module.network.parameters()
    }


class Diary(Callback):
    """What stands when an update is about to be made, and the average after it."""

    def __init__(self):
        self.pages = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        page = SimpleNamespace(
            round=pl_module.round_index,
            steps=pl_module.student_steps,
            levels=pl_module.levels,
            rate=optimizer.param_groups[0]["lr"],
            states=len(optimizer.state),
            averaged=int(pl_module.average.n_averaged),
            prediction=pl_module.teacher_denoiser.prediction,
            teacher=clone(pl_module.teacher),
            network=clone(pl_module.network),
            teacher_trains=pl_module.teacher.training,
        )
        self.pages.append(page)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pages[-1].average = clone(pl_module.average.module)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """An unbroken ladder: module, trainer, diary, and the folder with a checkpoint per update."""
    folder = tmp_path_factory.mktemp("whole")
    diary = Diary()
    files = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = ladder(teacher, warmup_steps=1)
    return module, fit(module, folder, diary, files), diary.pages, folder


ROUND_OF_UPDATE = [-1] * 2 + [0] * 6 + [1] * 5 + [2] * 5


def test_each_update_belongs_to_a_round(teacher):
    module = ladder(teacher)
    assert module.num_updates == 18
    assert [module.round_at(update) for update in range(18)] == ROUND_OF_UPDATE
    assert module.round_at(18) == 2
    assert [module.start_of(index) for index in (-1, 0, 1, 2)] == [0, 2, 8, 13]
    steps = []
    for index in (-1, 0, 1, 2):
        module.round_index = index
        steps.append(module.student_steps)
        torch.testing.assert_close(module.levels, linear(1000, steps[-1]), rtol=0, atol=0)
    assert steps == [8, 4, 2, 1]
    assert ladder(teacher, conversion_updates=0).round_index == 0
    assert module.network.init_args["dropout"] == 0.1
    assert module.teacher.init_args["dropout"] == 0.0


def test_the_fit_ends_with_the_ladder_and_follows_its_rounds(whole):
    _, t, pages, _ = whole
    assert t.global_step == len(pages) == 18
    assert [page.round for page in pages] == ROUND_OF_UPDATE
    assert [page.steps for page in pages] == [8] * 2 + [4] * 6 + [2] * 5 + [1] * 5
    assert all(len(page.levels) == page.steps + 1 for page in pages)
    assert not any(page.teacher_trains for page in pages)


def test_the_rate_warms_up_and_falls_to_zero_in_each_round(whole):
    _, _, pages, _ = whole
    expected = []
    for updates in (2, 6, 5, 5):
        expected += [1e-3 * min(1, (k + 1) / 2) * (1 - k / updates) for k in range(updates)]
    assert [page.rate for page in pages] == pytest.approx(expected)


def test_optimizer_and_average_begin_anew_in_each_round(whole):
    module, _, pages, _ = whole
    parameters = len(list(module.network.parameters()))
    place = [k for updates in (2, 6, 5, 5) for k in range(updates)]
    assert [page.averaged for page in pages] == place
    assert [page.states for page in pages] == [parameters if k else 0 for k in place]


def test_a_promoted_teacher_is_the_averaged_student_to_the_bit(whole, teacher):
    _, _, pages, _ = whole
    first = load_teacher(teacher).average.module.state_dict()
    assert same(pages[0].teacher, first)
    for k in range(1, 18):
        if pages[k].round == pages[k - 1].round:
            assert same(pages[k].teacher, pages[k - 1].teacher)
            continue
        assert same(pages[k].teacher, pages[k - 1].average)
        assert same(pages[k].network, pages[k - 1].average)
        assert not same(pages[k].teacher, pages[k - 1].network)
        assert not same(pages[k].teacher, pages[k - 1].teacher)


def test_a_checkpoint_holds_student_average_and_teacher_once_each(whole):
    module, _, _, folder = whole
    state = torch.load(folder / "step=18.ckpt", weights_only=True)
    names = set(module.network.state_dict())
    prefixes = ("network.", "average.module.", "teacher.")
    assert set(state["state_dict"]) == {p + name for p in prefixes for name in names} | {
        "average.n_averaged",
        "_extra_state",
    }
    (optimizer,) = state["optimizer_states"]
    assert len(optimizer["state"]) == len(list(module.network.parameters()))


def test_a_checkpoint_alone_rebuilds_the_ladder(whole):
    module, _, _, folder = whole
    loaded = ProgressiveDistillation.load_from_checkpoint(
        folder / "step=18.ckpt", map_location="cpu", weights_only=True, teacher=None
    )
    assert loaded.rounds == module.rounds
    assert (loaded.round_index, loaded.student_steps, loaded.clip) == (2, 1, False)
    assert loaded.schedule == CosineLogSNRSchedule()
    assert loaded.time_input == "log_snr"
    torch.testing.assert_close(loaded.sample([0, 1]), module.sample([0, 1]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.parametrize(
    "step",
    [2, 5, 13],
    ids=lambda step: f"{step}-{'boundary' if step in (2, 8, 13) else 'inside'}",
)
def test_a_resumed_ladder_ends_in_the_same_weights_bit_for_bit(whole, teacher, tmp_path, step):
    module, _, pages, folder = whole
    diary = Diary()
    resumed = ladder(teacher, warmup_steps=1, global_seed=99)
    fit(resumed, tmp_path, diary, ckpt_path=folder / f"step={step}.ckpt")
    expected, got = module.state_dict(), resumed.state_dict()
    assert expected.pop("_extra_state") == got.pop("_extra_state") == {"round": 2}
    assert same(expected, got)
    assert [page.rate for page in diary.pages] == [page.rate for page in pages[step:]]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(
    whole, teacher, tmp_path, monkeypatch
):
    write, saves = torch.save, []

    def crash(checkpoint, file):
        saves.append(file)
        if len(saves) < 2:
            return write(checkpoint, file)
        file.write(b"half a file")
        raise InterruptedError

    monkeypatch.setattr(torch, "save", crash)
    files = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True, save_top_k=0)
    with pytest.raises(InterruptedError):  # at update 8, the end of a round
        fit(ladder(teacher, warmup_steps=1), tmp_path, files)
    monkeypatch.undo()
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    resumed = ladder(teacher, warmup_steps=1, global_seed=99)
    fit(resumed, tmp_path, ckpt_path=last)
    assert same(clone(whole[0].average.module), clone(resumed.average.module))


def test_an_eps_teacher_is_read_as_such_until_it_is_converted(eps_teacher, tmp_path):
    straight = ladder(eps_teacher, conversion_updates=0)
    assert straight.schedule == LinearSchedule()
    assert straight.teacher_denoiser.prediction == "eps"
    diary = Diary()
    module = ladder(eps_teacher, rounds=[(2, 1), (1, 1)])
    fit(module, tmp_path, diary)
    assert [page.prediction for page in diary.pages] == ["eps", "eps", "v", "v"]
    diary = Diary()
    fit(ladder(eps_teacher, rounds=[(2, 2), (1, 1)], conversion_updates=0), tmp_path, diary)
    assert [page.prediction for page in diary.pages] == ["eps", "eps", "v"]


def test_conversion_teaches_a_v_student_what_an_eps_teacher_says(eps_teacher, tmp_path):
    module = ladder(
        eps_teacher,
        rounds=[(4, 1)],
        conversion_updates=60,
        clip_teacher=True,
        dropout=0.0,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
    )
    digits, losses = DigitsDataModule(), []
    digits.setup()
    x = from_uint8(digits.train_set.images(torch.arange(256)))

    def loss():
        denoiser = module._denoiser(module.average.module)
        return module.loss(denoiser, (x,), step_generators(0, x.device)).mean()

    losses.append(loss())
    fit(module, tmp_path, max_steps=60)
    losses.append(loss())
    assert module.round_index == -1
    assert losses[1] < 0.9 * losses[0], losses


def test_a_teacher_of_both_x_and_eps_has_such_students(tmp_path):
    network = tiny_unet(out_channels=2, dropout=0.0)
    module = some_ddpm(network=network, prediction="both", loss_weight="snr_plus_one")
    path = save(module, tmp_path / "both.ckpt")
    student = ladder(path, prediction="both", rounds=[(2, 1), (1, 1)], conversion_updates=0)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 500.0, 1000.0])
    torch.testing.assert_close(student.denoiser(z, t), module.denoiser(z, t), rtol=0, atol=0)
    fit(student, tmp_path)
    assert not same(clone(student.average.module), clone(student.teacher))
    assert student.sample([0, 1]).shape == (2, 1, 8, 8)
    with pytest.raises(
        ValueError, match="'v' reads 1 channels but the network has out_channels=2"
    ):
        ladder(path)


def test_a_round_can_be_run_alone_from_a_student(whole, tmp_path):
    folder = whole[3]
    two = ProgressiveDistillation.load_from_checkpoint(folder / "step=13.ckpt", weights_only=True)
    assert (two.round_index, two.student_steps, two.distilled_steps) == (1, 2, 2)
    path = tmp_path / "student.ckpt"
    torch.save(two.student_checkpoint(), path)
    student = DDPM.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert len(student.levels) == 3
    torch.testing.assert_close(student.sample([0, 1]), two.sample([0, 1]), rtol=0, atol=0)
    alone = ladder(str(path), rounds=[(1, 3)], conversion_updates=0)
    assert alone.first_prediction == "v"
    assert (alone.schedule, alone.time_input, alone.clip) == (
        two.schedule,
        two.time_input,
        two.clip,
    )
    assert same(clone(alone.teacher), clone(two.average.module))
    first = {"by": "ProgressiveDistillation", "teacher": Path(two.teacher_path).name}
    first |= {"updates": 13, "conversion_updates": 2, "rounds": [[4, 6], [2, 5]]}
    assert student.origin == two.origin == alone.origin == (first,)
    assert fit(alone, tmp_path).global_step == 3
    last = alone.student_checkpoint()["ddim_pl_origin"]
    second = {"teacher": "student.ckpt", "updates": 3, "conversion_updates": 0, "rounds": [[1, 3]]}
    assert last == [first, first | second]
    assert not same(clone(alone.average.module), clone(alone.teacher))
    with pytest.raises(ValueError, match=r"was distilled to 2 steps .* needs 8"):
        ladder(str(path), rounds=[(4, 3), (2, 3)])


def test_a_ladder_can_be_gone_on_with_from_its_own_checkpoint(whole):
    module, _, _, folder = whole
    path = str(folder / "step=13.ckpt")
    further = ladder(path, rounds=[(1, 3)], conversion_updates=0)
    assert not same(clone(further.teacher), clone(module.average.module))
    assert further.rounds != module.rounds
    with pytest.raises(ValueError, match=r"was distilled to 1 steps .* needs 2"):
        ladder(str(folder / "step=18.ckpt"), rounds=[(1, 3)])


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_run_goes_on_without_its_teachers_file(whole, teacher, tmp_path):
    gone = shutil.copy(teacher, tmp_path / "gone.ckpt")
    begun = ladder(str(gone), warmup_steps=1)
    gone.unlink()
    fit(begun, tmp_path, ckpt_path=whole[3] / "step=9.ckpt")
    assert same(clone(begun.average.module), clone(whole[0].average.module))
    # From the command line the network comes from the checkpoint, and no teacher is read at all.
    read = ProgressiveDistillation.load_from_checkpoint(
        whole[3] / "step=9.ckpt", weights_only=True, teacher=str(gone)
    )
    fit(read, tmp_path, ckpt_path=whole[3] / "step=9.ckpt")
    assert same(clone(read.average.module), clone(whole[0].average.module))


def test_a_new_fit_of_a_finished_ladder_begins_anew(whole, tmp_path):
    again = ProgressiveDistillation.load_from_checkpoint(
        whole[3] / "step=18.ckpt", weights_only=True
    )
    assert again.round_index == 2
    diary = Diary()
    seed_everything(0, verbose=False)
    fit(again, tmp_path, diary)
    assert [page.round for page in diary.pages] == [page.round for page in whole[2]]
    assert diary.pages[0].averaged == 0


def test_conversion_evaluates_at_levels_that_exist():
    # The teacher of 600 steps would have 1200, more than there are levels.
    module = wave(rounds=[(600, 1), (300, 1)], conversion_updates=1)
    assert module.round_index == -1
    assert len(module.levels) <= 1001


def test_states_of_the_loss_are_noisy_images_at_the_students_levels():
    module = wave(rounds=[(2, 1)])
    seen = []
    module.teacher.register_forward_hook(lambda _, arguments, output: seen.append(arguments))
    x = 0.5 * torch.ones(20_000, 1, 2, 2, dtype=torch.float64)
    student = Reproducing(Wave(), module.schedule, "v", clip=False)
    student.answer(wave().teacher_denoiser, 2, 0.0)
    module.loss(student, (x,), step_generators(0, x.device))
    (z, _), (_, mid_index) = seen
    t = student.seen[0]
    assert set(t.tolist()) == {500.0, 1000.0}
    torch.testing.assert_close(mid_index.double(), t - 250 - 1)
    for each in (500.0, 1000.0):
        scales, states = module.schedule(each), z[t == each]
        bound = 5 / states.numel() ** 0.5
        assert abs(states.mean() - 0.5 * scales.alpha) < bound
        assert abs(states.std() - scales.sigma) < bound
