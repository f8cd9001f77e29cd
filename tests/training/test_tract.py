"""TRACT: the authors' target, perfect students, phases that go on, resuming."""

from itertools import pairwise

import pytest
import torch
from exact import ExactGaussian
from ladders import clone, fit, ladder, same
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from ddim_pl.denoiser import Denoiser
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.scales import expand_like
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.training import DDPM, TRACT
from ddim_pl.training.loading import load as load_teacher
from ddim_pl.transitions import ddim_step, implied_x

PHASES = [(2, 6), (1, 5)]  # from 8 steps, after two updates of conversion


def tract(path, **arguments):
    given = {"rounds": PHASES, "teacher_num_steps": 8, "ema_decay": None, **arguments}
    return ladder(path, TRACT, **given)


class Wave(nn.Module):
    """A network whose answer is smooth and keeps float64."""

    in_channels, image_size = 1, 2

    def __init__(self, rate=1.3):
        super().__init__()
        self.init_args = {"rate": rate}
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def forward(self, z, t):
        return torch.sin(self.rate * z + t.to(z.dtype)[:, None, None, None] / 500)


def wave(schedule, rounds, **arguments):
    """A teacher, and a student by its short average that answers something else."""
    module = TRACT(Wave(), schedule, rounds=rounds, **arguments)
    module.self_teacher.module.rate.data += 0.4
    return module


def states(module, seed=0):
    """A state at each level of the present teacher."""
    fine = module.fine_steps
    j = torch.arange(1, fine + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(fine, 1, 2, 2, generator=generator, dtype=torch.float64)
    return z, j * module.schedule.num_levels / fine


def authors_target(z, t, end, fine_step, teacher, own, schedule):
    """`train_op` of the authors' code: clipped estimates, steps, and the x between the states."""

    def gamma(level):
        return torch.sigmoid(schedule(level).log_snr).view(-1, 1, 1, 1)

    def step(z, x, g, g_end):
        x = x.clamp(-1, 1)
        return x * g_end.sqrt() + (z - x * g.sqrt()) / (1 - g).sqrt() * (1 - g_end).sqrt()

    middle = t - fine_step
    g, g_middle, g_end = gamma(t), gamma(middle.clamp(min=0)), gamma(end)
    z_middle = step(z, teacher(z, t).x, g, g_middle)
    safe = torch.where(middle > 0, middle, t)
    z_end = step(z_middle, own(z_middle, safe).x, g_middle, g_end)
    z_end = torch.where((middle <= end).view(-1, 1, 1, 1), z_middle, z_end)
    numerator = z * (1 - g_end).sqrt() - z_end * (1 - g).sqrt()
    return numerator / ((g * (1 - g_end)).sqrt() - (g_end * (1 - g)).sqrt())


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize(("fine", "coarse"), [(8, 4), (12, 3), (64, 8), (60, 1)])
def test_the_target_is_that_of_the_authors_code(prediction, fine, coarse):
    schedule = CosineLogSNRSchedule()
    module = wave(
        schedule, [(coarse, 1)], teacher_num_steps=fine, prediction=prediction, clip_teacher=True
    )
    z, t = states(module)
    teacher, own = module.teacher_denoiser, module.self_denoiser
    found = module.target_of(teacher, z, t)
    group = (torch.arange(fine) // (fine // coarse)).double()
    end = group * 1000 / coarse
    wanted = authors_target(z, t, end, 1000 / fine, teacher, own, schedule)
    inner = end > 0
    torch.testing.assert_close(found[inner], wanted[inner], rtol=1e-8, atol=1e-8)
    # At level 0 the authors' states keep noise e^-10 and the sampler's none: a share of it.
    torch.testing.assert_close(found[~inner], wanted[~inner], rtol=0, atol=2e-3)
    assert (teacher(z, t).x - found).abs().max() > 0.05
    last = (t * fine / 1000).round() % (fine // coarse) == 1
    torch.testing.assert_close(found[last], teacher(z, t).x[last], rtol=0, atol=0)
    assert last.sum() == coarse


class Chain(Denoiser):
    """The perfect student: from any level of the teacher it lands where all its steps do."""

    def __init__(self, teacher, fine, coarse):
        self.teacher, self.fine, self.coarse = teacher, fine, coarse
        self.schedule, self.label = teacher.schedule, None

    def condition(self, label):
        return self

    def __call__(self, z, t):
        most = self.schedule.num_levels
        found = []
        for state, level in zip(z, t, strict=True):
            j = level * self.fine / most
            group = int((j / (self.fine // self.coarse)).ceil()) - 1
            levels = [level]
            while (
                round(float(levels[-1] * self.fine / most), 6) > group * self.fine // self.coarse
            ):
                lower = (levels[-1] * self.fine / most).ceil() - 1
                levels.append(lower * most / self.fine)
            found.append(self._one(state[None], levels))
        x = torch.cat(found)
        return Prediction(x, eps_from_x(self.schedule(t), z, x))

    def _one(self, z, levels):
        first = z
        for level, lower in pairwise(levels):
            here, there = self.schedule(level), self.schedule.step_end(lower)
            prediction = self.teacher(z, level)
            z = ddim_step(prediction, here, there)
        if levels[-1] == 0:
            return prediction.x
        return implied_x(first, z, self.schedule(levels[0]), self.schedule(levels[-1]))


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize(("fine", "coarse"), [(8, 2), (12, 4), (20, 1)])
def test_a_perfect_student_is_its_own_target(schedule, fine, coarse, monkeypatch):
    exact = ExactGaussian(schedule, 0.3, 0.5)
    perfect = Chain(exact, fine, coarse)
    monkeypatch.setattr(TRACT, "self_denoiser", property(lambda self: perfect))
    module = wave(schedule, [(coarse, 1)], teacher_num_steps=fine)
    z, t = states(module)
    found = module.target_of(exact, z, t)
    torch.testing.assert_close(found, perfect(z, t).x, rtol=1e-9, atol=1e-9)


def test_levels_are_those_of_the_teacher_and_equally_likely():
    module = wave(LinearSchedule(), [(4, 1), (2, 1)], teacher_num_steps=12)
    generator = torch.Generator().manual_seed(0)
    for index, fine in enumerate((12, 4)):
        module.round_index = index
        assert module.fine_steps == fine
        t = module.draw_levels(12000, generator)
        levels, counts = t.unique(return_counts=True)
        expected = torch.arange(1, fine + 1).double() * 1000 / fine
        torch.testing.assert_close(levels, expected, rtol=1e-12, atol=0)
        assert (counts - 12000 / fine).abs().max() < 5 * (12000 / fine) ** 0.5


# ---- a fit ------------------------------------------------------------------------------------


class Diary(Callback):
    """What stands when an update is about to be made, and the averages after it."""

    def __init__(self):
        self.pages = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.pages.append(
            {
                "round": module.round_index,
                "rate": optimizer.param_groups[0]["lr"],
                "states": len(optimizer.state),
                "decay": module.average.decay,
                "averaged": int(module.average.n_averaged),
                "teacher": clone(module.teacher),
                "network": clone(module.network),
                "before": clone(module.self_teacher.module),
            }
        )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.pages[-1] |= {
            "average": clone(module.average.module),
            "own": clone(module.self_teacher.module),
            "after": clone(module.network),
        }


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """An unbroken fit: module, diary, and the folder with a checkpoint per update."""
    folder = tmp_path_factory.mktemp("whole")
    diary = Diary()
    files = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = tract(teacher, warmup_steps=1)
    t = fit(module, folder, diary, files)
    assert t.global_step == 13
    return module, diary.pages, folder


def test_the_rate_may_fall_in_each_phase(teacher):
    phases = {"rounds": [(4, 4), (1, 2)], "teacher_num_steps": 8, "conversion_updates": 0}
    falls = tract(teacher, **phases, linear_decay=True, warmup_steps=1)
    assert [falls.rate_at(n) for n in range(7)] == [0.5, 0.75, 0.5, 0.25, 1.0, 0.5, 0.0]
    stays = tract(teacher, **phases, warmup_steps=1)
    assert [stays.rate_at(n) for n in range(7)] == [0.5, *[1.0] * 6]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_the_rate_may_begin_to_fall_when_a_run_goes_on(teacher, tmp_path):
    phases = {"rounds": [(4, 4), (1, 2)], "teacher_num_steps": 8, "conversion_updates": 0}
    files = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tract(teacher, **phases), tmp_path, files, max_steps=2)
    diary = Diary()
    falls = tract(teacher, **phases, linear_decay=True)
    fit(falls, tmp_path / "rest", diary, ckpt_path=tmp_path / "step=2.ckpt", max_steps=4)
    assert [page["rate"] for page in diary.pages] == pytest.approx([5e-4, 2.5e-4])


def test_the_student_goes_on_from_one_phase_to_the_next(whole, teacher):
    module, pages, _ = whole
    assert [page["round"] for page in pages] == [-1] * 2 + [0] * 6 + [1] * 5
    assert [page["rate"] for page in pages] == pytest.approx([5e-4] + [1e-3] * 12)
    parameters = len(list(module.network.parameters()))
    assert [page["states"] for page in pages] == [0] + [parameters] * 12
    assert [page["averaged"] for page in pages] == list(range(13))
    kept = [1e-3 ** (1 / 2)] * 2 + [1e-3 ** (1 / 6)] * 6 + [1e-3 ** (1 / 5)] * 5
    assert [page["decay"] for page in pages] == pytest.approx(kept)
    assert same(pages[0]["teacher"], load_teacher(teacher).average.module.state_dict())
    for k in range(1, 13):
        assert same(pages[k]["network"], pages[k - 1]["after"])
        before = pages[k - 1]
        begins = pages[k]["round"] != before["round"]
        assert same(pages[k]["teacher"], before["average" if begins else "teacher"])
        assert begins or same(pages[k]["teacher"], before["teacher"])


def test_the_short_average_follows_the_student(whole):
    _, pages, _ = whole
    name = "conv_in.weight"
    for n, page in enumerate(pages):
        keep = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        expected = keep * page["before"][name] + (1 - keep) * page["after"][name]
        torch.testing.assert_close(page["own"][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_resumed_fit_ends_in_the_same_weights_bit_for_bit(whole, teacher, tmp_path, step):
    module, pages, folder = whole
    diary = Diary()
    resumed = tract(teacher, warmup_steps=1, global_seed=99)
    fit(resumed, tmp_path, diary, ckpt_path=folder / f"step={step}.ckpt")
    expected, got = module.state_dict(), resumed.state_dict()
    assert expected.pop("_extra_state") == got.pop("_extra_state") == {"round": 1}
    assert same(expected, got)
    assert [page["decay"] for page in diary.pages] == [page["decay"] for page in pages[step:]]


def test_a_checkpoint_alone_rebuilds_it_and_its_student_is_a_plain_model(whole, tmp_path):
    module, _, folder = whole
    loaded = TRACT.load_from_checkpoint(folder / "step=13.ckpt", weights_only=True, teacher=None)
    assert (loaded.rounds, loaded.teacher_steps) == (module.rounds, 8)
    assert (loaded.student_steps, loaded.distilled_steps, loaded.fine_steps) == (1, 1, 2)
    assert loaded.average.decay == pytest.approx(1e-3 ** (1 / 5))
    torch.testing.assert_close(loaded.sample([0, 1]), module.sample([0, 1]), rtol=0, atol=0)
    two = TRACT.load_from_checkpoint(folder / "step=8.ckpt", weights_only=True, teacher=None)
    torch.save(two.student_checkpoint(), tmp_path / "student.ckpt")
    student = DDPM.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    assert (student.distilled_steps, len(student.levels)) == (2, 3)
    torch.testing.assert_close(student.sample([0]), two.sample([0]), rtol=0, atol=0)
    (origin,) = student.origin
    assert origin["by"] == "TRACT"
    assert (origin["teacher_num_steps"], origin["rounds"]) == (8, [[2, 6]])


def test_gradients_reach_the_student_alone_and_the_optimiser_knows_no_other(whole):
    module = whole[0]
    names = {name for name, each in module.named_parameters() if each.requires_grad}
    assert names == {f"network.{name}" for name, _ in module.network.named_parameters()}


def test_a_given_decay_holds_in_every_phase(teacher, tmp_path):
    diary = Diary()
    fit(tract(teacher, ema_decay=0.25), tmp_path, diary)
    assert {page["decay"] for page in diary.pages} == {0.25}


class Labelled(Wave):
    num_classes = 3

    def forward(self, z, t, label):
        return super().forward(z + label.to(z.dtype)[:, None, None, None], t)


def test_classes_reach_both_teachers():
    seen = []
    module = TRACT(Labelled(), rounds=[(2, 1)], teacher_num_steps=8)
    for network in (module.teacher, module.self_teacher.module):
        network.register_forward_hook(lambda _, inputs, __: seen.append(inputs[2].tolist()))
    z, t = states(module)
    labels = torch.arange(8) % 3
    module.target_of(module.teacher_denoiser.condition(labels), z, t)
    assert seen == [labels.tolist()] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": [(3, 1)], "teacher_num_steps": 8}, "divisor of the steps before, which are 8"),
        ({"rounds": [(4, 1), (4, 1)]}, "which are 4, got 4"),
        ({"rounds": [(2, 1), (4, 1)]}, "which are 2, got 4"),
        ({"rounds": []}, "rounds must hold at least one pair"),
        ({"rounds": [(1, 0)]}, "of at least 1"),
        ({"teacher_num_steps": 0}, "teacher_num_steps must be at least 1"),
        ({"self_decay": 1.0}, "self_decay must lie in"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"prediction": "eps"}, "prediction must be 'v', 'x'"),
        ({"conversion_updates": -1}, "conversion_updates must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    given = {"rounds": [(2, 1)], "teacher_num_steps": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        TRACT(Wave(), LinearSchedule(), **given)


def test_a_student_of_other_steps_is_no_teacher(whole, tmp_path):
    two = TRACT.load_from_checkpoint(whole[2] / "step=8.ckpt", weights_only=True, teacher=None)
    path = tmp_path / "student.ckpt"
    torch.save(two.student_checkpoint(), path)
    with pytest.raises(ValueError, match=r"was distilled to 2 steps .* needs 8"):
        tract(str(path))
    assert tract(str(path), rounds=[(1, 3)], teacher_num_steps=2).first_prediction == "v"


def test_each_image_has_its_own_group():
    """Levels on the host, states of another shape: the broadcast is by image."""
    module = wave(LinearSchedule(), [(2, 1)], teacher_num_steps=8)
    z, t = states(module)
    wide = z.expand(8, 1, 2, 2)[:, :, :, :1].expand(8, 1, 2, 5)
    found = module.target_of(module.teacher_denoiser, wide, t)
    alone = torch.cat(
        [
            module.target_of(module.teacher_denoiser, wide[k : k + 1], t[k : k + 1])
            for k in range(8)
        ]
    )
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
    assert expand_like(t, wide).shape == (8, 1, 1, 1)
