"""Distilled guidance, against the guided teacher."""

import functools
from dataclasses import replace

import pytest
import torch
from ladders import clone, fit, same, save
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import some_ddpm, tiny_unet

from ddim_pl.evaluation.cost import network_evaluations
from ddim_pl.exports.formats import make_export
from ddim_pl.guidance import Guidance, Guided
from ddim_pl.rng import step_generators
from ddim_pl.samplers import DDIM, DPMSolverPP
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule, LinearSchedule
from ddim_pl.timesteps import linear
from ddim_pl.training import (
    DDPM,
    TRACT,
    ConsistencyModel,
    GuidanceDistillation,
    LuhmanDistillation,
    ProgressiveDistillation,
)
from ddim_pl.training.ddpm import averaged_checkpoint, draw_levels
from ddim_pl.training.loading import load
from ddim_pl.transitions import q_sample

RANGE = (1.0, 4.0)
CPU = torch.device("cpu")
LABEL = torch.tensor([0, 2, 1, 1, 5])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A v-teacher on the cosine schedule that knows images without a class."""
    seed_everything(0, verbose=False)
    module = some_ddpm(
        schedule=CosineLogSNRSchedule(),
        network=tiny_unet(num_classes=10, null_class=True),
        prediction="v",
        loss_weight="snr_plus_one",
        time_input="log_snr",
        timesteps="linear",
        guidance=2.0,
    )
    return save(module, tmp_path_factory.mktemp("teacher") / "guided.ckpt")


def student(teacher, **arguments):
    seed_everything(arguments.pop("global_seed", 0), verbose=False)
    settings = {"guidance_range": RANGE, "ema_decay": 0.5, "dropout": 0.1}
    settings["optimizer"] = functools.partial(torch.optim.Adam, lr=1e-3)
    return GuidanceDistillation(**{"teacher": teacher, **settings, **arguments})


def disturbed(module):
    """The module with other weights of guidance's input: it begins as one without any."""
    generator = torch.Generator().manual_seed(3)
    for network in (module.network, module.average.module):
        weight = network.guidance_in.linear.weight
        weight.data += torch.randn(weight.shape, generator=generator)
    return module


@pytest.fixture(scope="module")
def student_file(teacher, tmp_path_factory):
    """A student that answers otherwise for each weight, as a plain checkpoint."""
    path = tmp_path_factory.mktemp("student") / "student.ckpt"
    torch.save(averaged_checkpoint(disturbed(student(teacher))), path)
    return str(path)


def images(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator).clamp(-1, 1)


# ---- the loss


@pytest.mark.parametrize("loss_weight", [None, "snr_plus_one"])
def test_the_loss_is_the_distance_to_each_images_guided_estimate(teacher, loss_weight):
    module, guided = student(teacher, loss_weight=loss_weight), load(teacher)
    assert module.loss_weight == (loss_weight or "truncated_snr")
    x, denoiser = images(), module.denoiser.condition(LABEL)
    loss = module.loss(denoiser, (x, LABEL), step_generators(7, CPU))
    generators = step_generators(7, CPU)
    weights = 1 + 3 * torch.rand(5, generator=generators.host, dtype=torch.float64)
    t = draw_levels(module.schedule, 5, "uniform", generators.host)
    scales = module.schedule(t)
    z = q_sample(x, torch.randn(x.shape, generator=generators.device), scales)
    plain = guided.denoiser.without_clipping()
    for i, weight in enumerate(weights.tolist()):
        by_two = Guided(plain, Guidance(weight), 10, clip=False).condition(LABEL[i : i + 1])
        wanted = by_two(z[i : i + 1], t[i : i + 1]).x
        own = plain.condition(LABEL[i : i + 1])(z[i : i + 1], t[i : i + 1]).x
        snr = (scales.alpha[i] / scales.sigma[i]) ** 2
        factor = snr.clamp(min=1) if loss_weight is None else snr + 1
        expected = factor * (own - wanted).square().mean()
        torch.testing.assert_close(loss[i].double(), expected.double(), rtol=1e-3, atol=1e-7)


def test_a_student_begins_as_its_teacher_without_guidance(teacher):
    module, guided = student(teacher), load(teacher)
    z, t = images(), torch.full((5,), 400.0)
    for weight in (None, 1.0, 3.3):
        denoiser = replace(module.denoiser, label=LABEL, guidance_weight=weight)
        assert torch.equal(denoiser(z, t).x, guided.denoiser.condition(LABEL)(z, t).x)
    frozen = {*module.teacher.parameters()}
    assert not any(each.requires_grad for each in frozen)
    assert not module.train().teacher.training


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_guided_teacher(teacher):
    """Of images that are guided, and of the loss of images that it was not trained on."""
    module, guided = student(teacher, dropout=0.0, ema_decay=0.0), load(teacher)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=3e-3)

    def measure():
        with torch.no_grad():
            test = loss_of(module, images(256, 10**6), 10**6)
        distances = []
        for weight in (2.0, 4.0):
            ours = module.sample(range(10), guidance=module.guidance_by(weight))
            theirs = guided.sample(range(10), guidance=Guidance(weight))
            distances.append(float((ours - theirs).square().mean()))
        return float(test), *distances

    before = measure()
    for step in range(400):
        loss = loss_of(module, images(64, step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.average.update_parameters(module.network)
    after = measure()
    assert after[0] < before[0] / 2, (before, after)
    assert max(a / b for a, b in zip(after, before, strict=True)) < 0.8, (before, after)


def loss_of(module, x, seed):
    label = torch.arange(len(x)) % 10
    denoiser = module._denoiser(module.network).condition(label)
    return module.loss(denoiser, (x, label), step_generators(seed, CPU)).mean()


# ---- sampling


def test_a_weight_is_an_input_and_costs_one_evaluation(student_file):
    model, seen = load(student_file, num_steps=3, timesteps="linear"), []
    model.average.module.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["guidance"]), with_kwargs=True
    )
    drawn = {w: model.sample(range(2), guidance=model.guidance_by(w)) for w in (1.0, 2.5)}
    assert [w.tolist() for w in seen] == 3 * [[1, 1]] + 3 * [[2.5, 2.5]]
    assert not torch.allclose(drawn[1.0], drawn[2.5])
    assert torch.equal(model.sample(range(2)), drawn[1.0])
    guidance = model.guidance_by(2.5)
    assert network_evaluations(DDIM(), model.levels, model.schedule, guidance) == 3
    again = load(student_file, num_steps=3, timesteps="linear", guidance=2.5)
    assert torch.equal(again.sample(range(2)), drawn[2.5])
    assert again.distilled_steps is None
    some = again.sample(range(2), sampler=DPMSolverPP(), levels=linear(1000, 4))
    assert some.isfinite().all()


def test_a_weight_that_was_not_distilled_is_refused(student_file):
    message = r"guidance must lie in \[1, 4\], the weights .* got 4\.5"
    with pytest.raises(ValueError, match=message):
        load(student_file, guidance=4.5)
    model = load(student_file)
    with pytest.raises(ValueError, match=r"guidance must lie in \[1, 4\].*got 0\.5"):
        model.guidance_by(0.5)
    with pytest.raises(ValueError, match="guidance_interval must be left out for a model of dist"):
        load(student_file, guidance=2.0, guidance_interval=(0.3, 3.0))


def test_only_a_checkpoint_holds_it(student_file):
    for kind in ("diffusers", "safetensors", "onnx"):
        with pytest.raises(ValueError, match=f"format must be checkpoint for a .* got {kind}"):
            make_export(load(student_file), kind)


# ---- runs


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_run_that_stops_goes_on_to_the_bit(teacher, tmp_path):
    files = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = student(teacher)
    fit(whole, tmp_path, files, max_steps=4)
    resumed = student(teacher, global_seed=9)
    fit(resumed, tmp_path / "rest", max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    assert same(clone(whole), clone(resumed))
    assert same(clone(whole.teacher), clone(load(teacher).average.module))
    read = load(tmp_path / "step=4.ckpt")
    assert type(read) is GuidanceDistillation
    assert read.denoiser.guidance_range == [*RANGE]
    assert read.origin[-1]["by"] == "GuidanceDistillation"
    assert read.origin[-1]["guidance_range"] == [*RANGE]
    fresh = student(teacher)
    fit(fresh, tmp_path / "fresh", max_steps=1)
    assert not same(clone(fresh.network), clone(student(teacher).network))


@pytest.mark.parametrize(
    "kind",
    [
        functools.partial(ProgressiveDistillation, rounds=[(2, 1), (1, 1)]),
        functools.partial(TRACT, rounds=[(2, 1), (1, 1)], teacher_num_steps=4),
        functools.partial(ConsistencyModel, method="distillation", q=2.0),
    ],
    ids=["progressive", "TRACT", "consistency"],
)
def test_students_of_few_steps_go_on_taking_the_weight(kind, student_file, tmp_path):
    """Student and teacher are told the same weights, drawn anew for each update."""
    module, seen = kind(teacher=student_file, guidance=2.0), []
    for network in module.networks:
        network.register_forward_pre_hook(
            lambda module, arguments, named: seen.append(named["guidance"]), with_kwargs=True
        )
    assert module.sampling_guidance == Guidance(2.0, is_input=True)
    for seed in (0, 1):
        denoiser = module._denoiser(module.network).condition(LABEL)
        module.loss(denoiser, (images(), LABEL), step_generators(seed, CPU))
    half = len(seen) // 2
    assert half >= 3
    assert all(torch.equal(each, seen[0]) for each in seen[:half])
    assert all(torch.equal(each, seen[half]) for each in seen[half:])
    assert not torch.equal(seen[0], seen[half])
    every = torch.cat([seen[0], seen[half]])
    assert every.unique().numel() == 10
    assert every.min() >= 1
    assert every.max() <= 4
    fit(module, tmp_path, max_steps=2)
    known = {} if isinstance(module, ConsistencyModel) else {"num_steps": 1, "distilled_steps": 1}
    torch.save(averaged_checkpoint(module, **known), tmp_path / "few.ckpt")
    few = load(tmp_path / "few.ckpt")
    assert few.distilled_steps is not None
    drawn = [few.sample(range(2), guidance=few.guidance_by(w)) for w in (1.0, 2.0, 4.0)]
    assert torch.equal(drawn[1], few.sample(range(2)))
    assert not torch.allclose(drawn[0], drawn[2])


# ---- wrong arguments


def test_a_teacher_must_know_images_without_a_class(tmp_path):
    for network in (tiny_unet(), tiny_unet(num_classes=3)):
        path = save(some_ddpm(network=network), tmp_path / f"{network.num_classes}.ckpt")
        with pytest.raises(ValueError, match="teacher must know images without a class"):
            student(path)


def test_a_teacher_that_takes_the_weight_or_knows_few_levels_is_refused(student_file, tmp_path):
    with pytest.raises(ValueError, match="takes the weight of guidance already"):
        student(student_file)
    network = tiny_unet(num_classes=3, null_class=True)
    few = save(some_ddpm(network=network, distilled_steps=5), tmp_path / "few.ckpt")
    with pytest.raises(ValueError, match=r"distilled to 5 steps .* distil its guidance first"):
        student(few)
    with pytest.raises(ValueError, match="teacher must not take the weight of guidance as an inp"):
        LuhmanDistillation(teacher=student_file)


def test_the_student_predicts_what_its_teacher_does(teacher):
    with pytest.raises(ValueError, match="prediction must be the teacher's, 'v', got 'x'"):
        student(teacher, prediction="x")


def test_an_interval_of_the_teacher_is_not_dropped(tmp_path):
    network = tiny_unet(num_classes=3, null_class=True)
    arguments = {"guidance": 2.0, "guidance_interval": (0.3, 3.0)}
    path = save(some_ddpm(network=network, **arguments), tmp_path / "interval.ckpt")
    with pytest.raises(ValueError, match=r"has guidance_interval \[0.3, 3.0\], but its student"):
        student(path)


def test_a_fit_without_a_teacher_is_refused(student_file):
    network = load(student_file).network
    arguments = {"prediction": "v", "guidance_range": RANGE, "schedule": CosineLogSNRSchedule()}
    alone = GuidanceDistillation(network, **arguments)
    with pytest.raises(ValueError, match="teacher must be given for fit"):
        alone.check_data(None)
    bare = ProgressiveDistillation(tiny_unet(), CosineLogSNRSchedule(), rounds=[(1, 1)])
    with pytest.raises(ValueError, match="teacher must be given for fit"):
        bare.check_data(None)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_another_range_would_change_what_the_weights_mean(teacher, student_file, tmp_path):
    fit(student(teacher), tmp_path, ModelCheckpoint(tmp_path, filename="one"), max_steps=1)
    (file,) = tmp_path.glob("one.ckpt")
    with pytest.raises(
        ValueError, match=r"guidance_range must be \[1.0, 4.0\], with which the ch"
    ):
        fit(student(teacher, guidance_range=(1, 9)), tmp_path, ckpt_path=file, max_steps=2)
    with pytest.raises(ValueError, match=r"guidance_range must be what the network was made with"):
        load(str(file), guidance_range=(1.0, 3.0))
    other = tiny_unet(num_classes=10, null_class=True, guidance_range=(1, 9))
    known = {"schedule": CosineLogSNRSchedule(), "time_input": "log_snr", "rounds": [(1, 1)]}
    module = ProgressiveDistillation(other, teacher=student_file, **known)
    with pytest.raises(
        ValueError, match=r"has guidance_range \[1.0, 4.0\], but the student's net"
    ):
        module.check_data(None)


def test_images_do_not_say_what_is_guided(student_file):
    with pytest.raises(ValueError, match="method must be 'distillation' for a network that takes"):
        ConsistencyModel(teacher=student_file)


def test_a_new_fit_begins_without_guidance(teacher, student_file, tmp_path):
    module = student(teacher)
    disturbed(module)
    fit(module, tmp_path, max_steps=1, limit_train_batches=0)
    weight = module.network.guidance_in.linear.weight
    module.load_weights_from(load(teacher))
    assert not weight.any()
    assert not module.average.module.guidance_in.linear.weight.any()


def test_a_guidance_of_another_kind_of_model_is_refused(teacher, student_file):
    model, guided = load(student_file, num_steps=2), load(teacher, num_steps=2)
    with pytest.raises(ValueError, match=r"guidance must lie in \[1, 4\].*got 9"):
        model.sample([0], guidance=Guidance(9.0))
    with pytest.raises(ValueError, match="guidance_interval must be left out"):
        model.sample([0], guidance=Guidance(3.0, (0.3, 3.0)))
    with pytest.raises(ValueError, match=r"guidance must be guidance_by\(3\) of the model"):
        guided.sample([0], guidance=Guidance(3.0, is_input=True))


def test_one_weight_of_all_images_may_be_a_tensor(student_file):
    denoiser = replace(load(student_file).denoiser, label=LABEL, guidance_weight=torch.tensor(2.0))
    some = denoiser.select(torch.tensor([3, 0]))
    z, t = images(), torch.full((5,), 300.0)
    every = denoiser(z, t).x
    torch.testing.assert_close(some(z[[3, 0]], t[:2]).x, every[[3, 0]], rtol=1e-4, atol=1e-5)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.5])
    each = replace(denoiser, guidance_weight=weights)
    some = each.select(torch.tensor([3, 0]))
    assert some.guidance_weight.tolist() == [4.0, 1.0]


@pytest.mark.parametrize(
    "weights",
    [(1.0,), (2.0, 4.0), (0.0, 1.0), (-1.0, 2.0), (1.0, 1e999), 3.0, None, ("a", "b"), ()],
)
def test_a_range_without_1_or_an_end_is_refused(weights, teacher):
    with pytest.raises(ValueError, match=r"guidance_range must be the lowest and the highest"):
        student(teacher, guidance_range=weights)


def test_a_network_without_classes_or_in_other_hands_has_no_range():
    with pytest.raises(ValueError, match="guidance_range must be left out for a network without"):
        tiny_unet(guidance_range=RANGE)
    network = tiny_unet(num_classes=3, null_class=True, guidance_range=RANGE)
    with pytest.raises(ValueError, match="guidance_range of the network must be left out for DDP"):
        DDPM(network, LinearSchedule(), label_dropout=0.1).check_data(None)
    with pytest.raises(ValueError, match="guidance_range must be what the network was made"):
        GuidanceDistillation(network, EDMSchedule(), prediction="edm", guidance_range=(1.0, 2.0))
