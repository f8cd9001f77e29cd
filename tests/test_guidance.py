"""Guidance, against other ways to compute it."""

import importlib
import math
from dataclasses import dataclass, replace

import pytest
import torch
from foreign import OWN_DEFAULTS
from tiny import some_ddpm, tiny_unet
from torch import Tensor
from walk import concrete_classes

from ddim_pl.clipping import DynamicThreshold
from ddim_pl.denoiser import Denoiser
from ddim_pl.fixed_point import Anderson
from ddim_pl.guidance import Guidance, Guided
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.networks.songunet import SongUNet
from ddim_pl.networks.unet import UNet
from ddim_pl.noise import latents
from ddim_pl.prediction import Prediction, coefficients
from ddim_pl.samplers import DDIM, DEQ, ParaDiGMS, Sampler
from ddim_pl.scales import expand_like
from ddim_pl.schedules import CosineLogSNRSchedule, EDMSchedule, LinearSchedule, NoiseSchedule
from ddim_pl.timesteps import linear
from ddim_pl.transitions import q_sample

SONG = {"image_size": 8, "in_channels": 1, "channels": 8, "multipliers": [1, 2], "num_blocks": 1}
LABEL = torch.tensor([0, 2, 1, 1])


def guided_ddpm(**changes):
    network = tiny_unet(num_classes=3, null_class=True)
    return some_ddpm(**{"network": network, "guidance": 2.5, "clip": False, **changes})


def states(count=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator).to(dtype)


def with_and_without(model, z, t):
    """The two estimates of a model, by a call each."""
    plain = model.denoiser.without_clipping()
    return plain.condition(LABEL)(z, t), plain.condition(torch.full((4,), 3))(z, t)


# Networks


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: UNet(**SONG, attention=[4], groups=4, **more),
        lambda **more: SongUNet(**SONG, attention=[4], **more),
    ],
    ids=["UNet", "SongUNet"],
)
def test_a_null_class_leaves_the_answers_to_the_others_as_they_are(make):
    torch.manual_seed(0)
    plain, more = make(num_classes=3).eval(), make(num_classes=3, null_class=True).eval()
    assert (plain.null_class, more.null_class, more.num_classes) == (False, True, 3)
    generator = torch.Generator().manual_seed(0)
    for value in plain.state_dict().values():
        value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    for name, value in more.state_dict().items():
        old = plain.state_dict()[name]
        value[: len(old)] = old
    z, t = states(3), torch.tensor([1.0, 2.0, 3.0])
    label = torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(more(z, t, label), plain(z, t, label))
        answers = [more(z[:1], t[:1], torch.tensor([each]))[0] for each in range(4)]
    for one in range(3):
        assert not torch.allclose(answers[one], answers[3])


def test_the_null_class_of_songunet_is_a_label_of_zeros():
    """As in EDM's code, whose `label_dropout` multiplies one-hot labels by 0."""
    torch.manual_seed(0)
    network = SongUNet(**SONG, attention=[4], num_classes=3, null_class=True)
    assert network.class_in.in_features == 3
    t, label = torch.tensor([0.3, -1.0]), torch.tensor([3, 1])
    with torch.no_grad():
        one_hot = torch.nn.functional.one_hot(label, 4)[:, :3].float()
        wide = network.time(t) + network.class_in(one_hot * math.sqrt(3))
        silu = torch.nn.functional.silu
        expected = silu(network.emb_out(silu(network.emb_in(wide))))
        torch.testing.assert_close(network._embedding(t, label, None), expected)


def test_the_null_class_of_diffusers_network_is_its_last():
    network = DiffusersUNet({**OWN_DEFAULTS, "num_class_embeds": 4}, null_class=True)
    assert (network.num_classes, network.null_class) == (3, True)
    assert DiffusersUNet(**network.init_args).num_classes == 3
    assert network(states(1), torch.ones(1), torch.tensor([3])).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="num_class_embeds must be at least 2, got 1"):
        DiffusersUNet({**OWN_DEFAULTS, "num_class_embeds": 1}, null_class=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_unet(null_class=True),
        lambda: SongUNet(**SONG, attention=[4], null_class=True),
        lambda: DiffusersUNet(OWN_DEFAULTS, null_class=True),
    ],
)
def test_a_network_without_classes_has_no_null_class(make):
    with pytest.raises(ValueError, match="null_class must be False for a network without classes"):
        make()


# The estimates


@pytest.mark.parametrize("one_level", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "x", "v", "residual", "edm"])
def test_guiding_x_is_guiding_what_the_network_predicts(prediction, one_level):
    """[CFG], eq. 6, with `w' = w - 1`: of eps as written there, and of any linear estimate."""
    settings = {"sigma_data": 0.5, "time_input": "log_sigma"} if prediction == "edm" else {}
    settings |= {"loss_weight": "edm"} if prediction == "edm" else {}
    settings |= {} if prediction in ("eps", "edm") else {"loss_weight": "snr_plus_one"}
    model = guided_ddpm(prediction=prediction, schedule=CosineLogSNRSchedule(), **settings)
    z = states()
    t = torch.tensor(600.0) if one_level else torch.tensor([40.0, 900.0, 500.0, 300.0])
    with torch.no_grad():
        x, eps = model.conditioned(LABEL, sampling=True)(z, t)
        plain = model.denoiser
        outputs = [plain.condition(each).output(z, t) for each in (LABEL, torch.full((4,), 3))]
    output = (1 + 1.5) * outputs[0] - 1.5 * outputs[1]
    scales = model.schedule(t)
    a, b = coefficients(prediction, scales, sigma_data=model.sigma_data)
    found = expand_like(a, z) * x + expand_like(b, z) * eps
    torch.testing.assert_close(found, output.double(), rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(q_sample(x, eps, scales), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True, DynamicThreshold(0.9)])
def test_one_call_of_a_doubled_batch_equals_two_calls(clip):
    model = guided_ddpm(clip=clip, schedule=CosineLogSNRSchedule())
    z, t = states(), torch.tensor([100.0, 900.0, 500.0, 300.0])
    sizes = []
    model.average.module.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.no_grad():
        x, eps = model.conditioned(LABEL, sampling=True)(z, t)
        assert sizes == [8]
        one, other = with_and_without(model, z, t)
    expected = other.x + 2.5 * (one.x - other.x)
    scales = model.schedule(t)
    alpha, sigma = (expand_like(each, z) for each in scales)
    if clip is True:
        assert (expected.abs() > 1).any()
        expected = expected.clamp(-1, 1)
    elif clip:
        expected = clip(expected)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    wanted = ((z - alpha * x) / sigma).float()
    torch.testing.assert_close(eps, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("t", [torch.tensor(500.0), torch.tensor([40.0, 900.0, 500.0, 1.0])])
def test_weight_1_is_the_class_to_the_bit_and_weight_0_no_class(clip, t):
    z = states()
    for weight, label in ((1.0, LABEL), (0.0, torch.full((4,), 3))):
        model = guided_ddpm(guidance=weight, clip=clip)
        sizes = []
        hook = model.average.module.register_forward_pre_hook(
            lambda _, given, sizes=sizes: sizes.append(len(given[0]))
        )
        with torch.no_grad():
            found = model.conditioned(LABEL, sampling=True)(z, t)
            assert sizes == [4]
            hook.remove()
            expected = model.denoiser.condition(label)(z, t)
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.eps, expected.eps)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_outside_the_interval_the_class_alone_is_evaluated_once(weight):
    schedule = CosineLogSNRSchedule()
    t = torch.tensor([40.0, 900.0, 500.0, 300.0])
    scales = schedule(t)
    ratios = scales.sigma / scales.alpha
    interval = (float(ratios[3]), float(ratios[2]))  # the lower end is excluded
    model = guided_ddpm(guidance=weight, guidance_interval=interval, schedule=schedule)
    z, sizes = states(), []
    model.average.module.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    denoiser = model.conditioned(LABEL, sampling=True)
    with torch.no_grad():
        found = denoiser(z, t)
        alone = denoiser(z, t[1])
        assert sizes == [4 if weight == 0 else 5, 4]
        one, other = with_and_without(model, z, t)
        assert torch.equal(alone.x, model.denoiser.condition(LABEL)(z, t[1]).x)
    expected = one.x.clone()
    expected[2] = other.x[2] + weight * (one.x[2] - other.x[2])
    torch.testing.assert_close(found.x, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.x[2], one.x[2], rtol=1e-3)
    eps = one.eps.clone()
    eps[2] = other.eps[2] + weight * (one.eps[2] - other.eps[2])
    torch.testing.assert_close(found.eps, eps, rtol=1e-4, atol=1e-5)


def test_the_interval_is_of_edms_sigma():
    """Whose schedule has levels at any sigma; the first end is excluded, the last included."""
    guidance, schedule = Guidance(2.0, (0.28, 2.9)), EDMSchedule()
    sigma = torch.tensor([0.002, 0.279, 0.281, 1.0, 2.89, 2.91, 80.0], dtype=torch.float64)
    t = schedule.level_at(-2 * sigma.log())
    assert guidance.applies(schedule(t)).tolist() == [False, False, True, True, True, False, False]
    assert Guidance(2.0).applies(schedule(t)).all()


# Two classes whose scores are known


@dataclass(frozen=True)
class TwoGaussians(Denoiser):
    """Every entry of z is a sample of its class `N(mean, std^2)`; both are equally frequent."""

    schedule: NoiseSchedule
    means: tuple[float, float] = (-0.6, 0.5)
    stds: tuple[float, float] = (0.3, 0.5)
    label: Tensor | None = None

    def log_densities(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of states given the class, and of all states."""
        scales = self.schedule(t)
        alpha, sigma = expand_like(scales.alpha, z), expand_like(scales.sigma, z)
        each = []
        for mean, std in zip(self.means, self.stds, strict=True):
            variance = alpha**2 * std**2 + sigma**2
            each.append(-((z - alpha * mean) ** 2) / (2 * variance) - variance.log() / 2)
        both = torch.stack(each)
        own = both.gather(0, expand_like(self.label, z).long().expand(1, *z.shape))[0]
        return own, both.logsumexp(0) - math.log(2)

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        """In closed form; label 2 is no class."""
        scales = self.schedule(t)
        alpha, sigma = expand_like(scales.alpha, z), expand_like(scales.sigma, z)
        xs, weights = [], []
        for mean, std in zip(self.means, self.stds, strict=True):
            variance = alpha**2 * std**2 + sigma**2
            centred = z - alpha * mean
            xs.append(mean + alpha * std**2 / variance * centred)
            weights.append(torch.exp(-(centred**2) / (2 * variance)) / variance.sqrt())
        mixed = (weights[0] * xs[0] + weights[1] * xs[1]) / (weights[0] + weights[1])
        label = expand_like(self.label, z)
        x = torch.where(label == 2, mixed, torch.where(label == 0, xs[0], xs[1]))
        return Prediction(x, (z - alpha * x) / sigma)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 4.0])
def test_the_guided_noise_is_the_score_of_the_tilted_density(weight):
    """`eps = -sigma d/dz log(p(z | c)^w p(z)^(1 - w))` ([CFG], section 3.2), by autograd."""
    exact = TwoGaussians(LinearSchedule())
    label = torch.tensor([0, 1, 1])
    t = torch.tensor([700.0, 300.0, 40.0], dtype=torch.float64)
    z = states(3, torch.float64).requires_grad_()
    denoiser = Guided(exact, Guidance(weight), null_class=2, clip=False).condition(label)
    own, every = replace(exact, label=label).log_densities(z, t)
    (score,) = torch.autograd.grad((weight * own + (1 - weight) * every).sum(), z)
    sigma = expand_like(exact.schedule(t).sigma, z)
    torch.testing.assert_close(denoiser(z, t).eps, -sigma * score, rtol=1e-9, atol=1e-9)


# With samplers


@pytest.mark.parametrize("kind", [*concrete_classes(Sampler)])
def test_every_sampler_draws_with_guidance(kind):
    """As with a denoiser that makes the two estimates by two calls."""
    sampler = kind()
    model = guided_ddpm(noise=sampler.noise, sampler=sampler, schedule=LinearSchedule())
    levels = linear(1000, 4)
    images = model.sample(range(3), levels=levels)

    @dataclass(frozen=True)
    class ByHand(Denoiser):
        schedule: NoiseSchedule
        label: Tensor | None = None

        def __call__(self, z, t):
            plain, null = model.denoiser, torch.full((len(z),), 3)
            one, other = (plain.condition(each)(z, t) for each in (self.label, null))
            return Prediction(*(b + 2.5 * (a - b) for a, b in zip(one, other, strict=True)))

    z, generators = model.latents(range(3), levels[0])
    by_hand = ByHand(model.schedule).condition(torch.tensor([0, 1, 2]))
    expected = sampler(by_hand, z, levels, generator=generators)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    plain = model.sample(range(3), levels=levels, guidance=Guidance(1.0))
    assert not torch.allclose(images, plain, rtol=1e-2)


@pytest.mark.parametrize(
    "sampler", [DEQ(Anderson(tolerance=1e-5)), ParaDiGMS(window=3, tolerance=1e-6)]
)
@pytest.mark.parametrize("max_batch", [None, 3])
def test_solvers_of_the_chain_guide_the_levels_of_the_interval(sampler, max_batch):
    interval = (0.3, 2.0)
    model = guided_ddpm(clip=True, schedule=CosineLogSNRSchedule(), guidance_interval=interval)
    levels = linear(1000, 8)
    expected = model.sample(range(4), sampler=DDIM(), levels=levels)
    found = model.sample(range(4), sampler=replace(sampler, max_batch=max_batch), levels=levels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    everywhere = model.sample(range(4), sampler=DDIM(), levels=levels, guidance=Guidance(2.5))
    assert not torch.allclose(everywhere, expected, rtol=1e-2)


def test_a_samplers_clipping_is_that_of_the_guided_estimate():
    model = guided_ddpm(schedule=CosineLogSNRSchedule())
    levels = linear(1000, 3)
    z, _ = latents(0, range(4), (1, 8, 8))
    free, clipped = (
        [*DDIM(clip=clip).trajectory(model.conditioned(LABEL, sampling=True), z, levels)]
        for clip in (None, True)
    )
    assert (free[0].x.abs() > 1).any()
    torch.testing.assert_close(clipped[0].x, free[0].x.clamp(-1, 1), rtol=0, atol=0)
    assert not torch.allclose(clipped[-1].z, free[-1].z)


def test_a_denoiser_for_some_of_the_samples_has_their_classes():
    model = guided_ddpm()
    z, t, some = states(), torch.tensor(500.0), torch.tensor([3, 1])
    denoiser = model.conditioned(LABEL, sampling=True)
    with torch.no_grad():
        found = denoiser.select(some)(z[some], t).x
        torch.testing.assert_close(found, denoiser(z, t).x[some], rtol=1e-4, atol=1e-4)


def test_guided_estimates_are_differentiable():
    model = guided_ddpm(guidance_interval=(0.1, 100.0))
    z = states().requires_grad_()
    t = torch.tensor([5.0, 500.0, 500.0, 900.0])
    (found,) = torch.autograd.grad(model.conditioned(LABEL, sampling=True)(z, t).x.sum(), z)
    one, other = with_and_without(model, z, t)
    applies = torch.tensor([0.0, 1, 1, 1])[:, None, None, None]
    by_hand = one.x + applies * 1.5 * (one.x - other.x)
    (expected,) = torch.autograd.grad(by_hand.sum(), z)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


# A model


def test_only_what_draws_images_is_guided():
    model = guided_ddpm()
    guided = model.conditioned(LABEL, sampling=True)
    assert isinstance(guided, Guided)
    assert guided.estimates_noise_of_clean_data
    for plain in (model.conditioned(LABEL), model.denoiser, model.sampling_denoiser):
        assert not isinstance(plain, Guided)
    assert guided.clip == model.clip == guided.denoiser.clip
    assert guided_ddpm(clip=True).conditioned(LABEL, sampling=True).clip is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": math.nan}, "guidance must be at least 0 and finite, got nan"),
        ({"guidance": math.inf}, "guidance must be at least 0 and finite, got inf"),
        ({"guidance": -0.5}, "guidance must be at least 0 and finite, got -0.5"),
        ({"guidance_interval": (2.0, 1.0)}, r"guidance_interval must be two .* got \[2.0, 1.0\]"),
        ({"guidance_interval": (-1.0, 1.0)}, r"guidance_interval must be two .* got \[-1.0, 1.0"),
        ({"guidance_interval": (1.0,)}, r"guidance_interval must be two .* got \[1.0\]"),
        ({"guidance_interval": (0.0, math.nan)}, "guidance_interval must be two"),
        ({"guidance": None, "guidance_interval": (0.0, 1.0)}, "must be left out without guidance"),
        ({"distilled_steps": 4}, "guidance must be left out for a model distilled to 4 steps"),
        ({"network": None}, "guidance must be left out for a network without a null class"),
        (
            {"network": tiny_unet(num_classes=3)},
            "guidance must be left out for a network without a null class, got 2.5: train one",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_guided_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        guided_ddpm(**arguments)
    assert "\n" not in str(error.value)


def test_a_denoiser_that_clips_is_not_guided():
    denoiser = guided_ddpm(clip=True).denoiser
    with pytest.raises(ValueError, match=r"denoiser must not clip, .* what is guided is clipped"):
        Guided(denoiser, Guidance(2.0), null_class=3)
    free = Guided(denoiser.without_clipping(), Guidance(2.0), null_class=3)
    with pytest.raises(ValueError, match="label must be given for guidance"):
        free(states(), torch.tensor(3.0))


def test_guidance_given_to_a_call_is_not_left_aside():
    for network in (tiny_unet(), tiny_unet(num_classes=3)):
        model = some_ddpm(network=network)
        with pytest.raises(ValueError, match="guidance must be left out for a network without a"):
            model.sample([0], guidance=Guidance(2.0))


def test_its_words_name_all_that_it_is():
    assert str(Guidance(2.0)) == "2"
    assert str(Guidance(2.25, (0.28, 2.9))) == "2.25 in (0.28, 2.9]"
    assert str(Guidance(1.0, (0.28, 2.9))) == "1"
    assert importlib.import_module("ddim_pl").Guidance is Guidance
