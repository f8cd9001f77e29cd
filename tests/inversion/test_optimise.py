"""Latents found by gradient descent, against closed forms and the exact gradient."""

from dataclasses import replace

import pytest
import torch
from exact import ExactGaussian, ExactMixture
from tiny import some_ddpm, tiny_unet
from torch import nn

from ddim_pl.fixed_point import Anderson, Picard
from ddim_pl.inversion import Implicit, InverseJacobian, Sequential, encode, invert
from ddim_pl.inversion.optimise import broyden_adjoint, eps_chain
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM, DEQ
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.timesteps import linear
from ddim_pl.transitions import ddim_chain

LEVELS = linear(1000, 10)
TIGHT = DEQ(Anderson(tolerance=1e-9, max_sweeps=60))
METHODS = [
    Sequential(),
    Sequential(checkpointing=False),
    Implicit(TIGHT),
    Implicit(TIGHT, applications=3, damping=0.5),
    InverseJacobian(TIGHT, products=3),
    Implicit(),
]


def start(batch=4, seed=0):
    return latents(seed, range(batch), (1, 4, 4))[0].double()


# ---- gradients --------------------------------------------------------------------------------


def gradient(method, law, z, levels=LEVELS, direction=None):
    z = z.clone().requires_grad_(True)
    found = method.generate(law, z, levels, None)
    direction = torch.ones_like(z) if direction is None else direction
    return torch.autograd.grad((found.images * direction).sum(), z)[0], found.images.detach()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_sequential_gradient_is_that_of_the_whole_chain(checkpointing):
    law, z = ExactMixture(LinearSchedule()), start(1)
    method = Sequential(checkpointing)
    assert torch.autograd.gradcheck(
        lambda value: method.generate(law, value, LEVELS, None).images,
        (z.clone().requires_grad_(True),),
    )
    torch.testing.assert_close(gradient(method, law, z)[1], DDIM()(law, z, LEVELS))


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_draws_what_ddim_draws(method, schedule):
    law, z = ExactMixture(schedule), start()
    _, images = gradient(method, law, z)
    exact = DDIM()(law, z, LEVELS)
    bound = 2e-2 if method == Implicit() else 1e-6  # its solver stops at a residual of 1e-2
    assert (images - exact).norm() < bound * exact.norm()


def test_one_application_has_the_gradient_of_its_first_estimate_alone():
    """[DEQ], eq. 13 without the inverse: all later estimates are constants."""
    law, z = ExactMixture(LinearSchedule()), start()
    found, _ = gradient(Implicit(TIGHT), law, z)
    scales = law.schedule(LEVELS)
    ratio = scales.sigma / scales.alpha
    value = z.clone().requires_grad_(True)
    eps = law(value, LEVELS[0]).eps
    image = value / scales.alpha[0] + (ratio[1] - ratio[0]) * eps
    expected = torch.autograd.grad(image.sum(), value)[0] * scales.alpha[-1]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("steps", "least"), [(10, 0.999), (50, 0.99997)])
def test_one_application_has_nearly_the_gradient_of_the_papers_code(steps, least):
    """There all estimates are constants, so that the gradient is the image's error, scaled."""
    law, levels = ExactMixture(LinearSchedule()), linear(1000, steps)
    for x, z in [(start() / 3, start(seed=1)), (start(seed=2) / 3, start(seed=3))]:
        error = DDIM()(law, z, levels) - x
        found, _ = gradient(Implicit(TIGHT), law, z, levels, error)
        cosine = torch.cosine_similarity(found.flatten(1), error.flatten(1))
        assert (cosine > least).all()


def test_undamped_applications_as_many_as_steps_have_the_exact_gradient():
    law, z = ExactMixture(LinearSchedule()), start()
    exact, _ = gradient(Sequential(), law, z)
    found, _ = gradient(Implicit(TIGHT, applications=10, damping=1.0), law, z)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_the_inverse_jacobian_tends_to_the_exact_gradient(schedule):
    """And comes nearer than the 1-step and the phantom gradient of as many passes."""
    law, z = ExactMixture(schedule), start()
    exact, _ = gradient(Sequential(), law, z)

    def error(method):
        return float((gradient(method, law, z)[0] - exact).norm() / exact.norm())

    errors = [error(InverseJacobian(TIGHT, products)) for products in (4, 8, 16, 32)]
    assert errors[-1] < 1e-6
    assert errors[1] < errors[0]
    for other in (Implicit(TIGHT), Implicit(TIGHT, applications=8, damping=0.1)):
        assert errors[1] < error(other) / 5


def test_the_default_inverse_jacobian_is_the_nearest_with_a_hundred_steps():
    law, levels, z = ExactMixture(LinearSchedule()), linear(1000, 100), start()
    exact, _ = gradient(Sequential(), law, z, levels)

    def error(method):
        found, _ = gradient(method, law, z, levels)
        return float((found - exact).norm() / exact.norm())

    others = [Implicit(TIGHT), Implicit(TIGHT, applications=5), Implicit(TIGHT, 12, 1.0)]
    nearest = error(InverseJacobian(TIGHT))
    assert nearest < 0.05
    assert nearest < min(error(method) for method in others) / 5


def test_broydens_adjoint_solves_linear_systems_of_each_sample():
    """Twice as many products as dimensions solve a linear system; samples do not mix."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64) / 4
    v = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)

    def product(u, which=slice(None)):
        return (matrix[which].mT @ u.flatten(1)[..., None])[..., 0].reshape(u.shape)

    wanted = torch.linalg.solve(torch.eye(4).double() - matrix.mT, v.flatten(1)).reshape(v.shape)
    found = broyden_adjoint(product, v, 9)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    alone = broyden_adjoint(lambda u: product(u, slice(1, 2)), v[1:2], 9)
    torch.testing.assert_close(alone, found[1:2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(broyden_adjoint(product, v, 1), v + product(v))
    exact = broyden_adjoint(torch.zeros_like, v, 5)  # a solved system leaves nothing to divide by
    assert torch.equal(exact, v)


def test_the_inverse_jacobian_needs_a_product():
    with pytest.raises(ValueError, match="products must be at least 1, got 0"):
        InverseJacobian(products=0)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_both_forms_of_the_map_have_one_fixed_point(schedule):
    law, z = ExactMixture(schedule), start()
    states = torch.stack([s.z for s in DDIM().trajectory(law, z, LEVELS)], 1)
    scales = law.schedule.step_end(LEVELS)
    y = states[:, 0] / scales.alpha[1]
    torch.testing.assert_close(
        eps_chain(DEQ(), law, y, states, LEVELS), states, rtol=1e-8, atol=1e-8
    )
    inputs = torch.cat([z[:, None], states[:, :-1]], 1)
    x = DEQ().estimates(law).of_chain(inputs, LEVELS[:-1])
    torch.testing.assert_close(ddim_chain(z, x, scales), states, rtol=1e-8, atol=1e-8)


def test_the_map_with_eps_has_its_derivative():
    law = ExactMixture(LinearSchedule())
    levels = linear(1000, 4)
    states = start(4)[..., :2].reshape(1, 4, 1, 8)[..., :3].clone().requires_grad_(True)
    y = start(1)[:, :, 0, :3].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda y, states: eps_chain(DEQ(), law, y, states, levels), (y, states)
    )


# ---- descent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Sequential(), Implicit(TIGHT)], ids=["sequential", "deq"])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_a_gaussians_latents_are_those_of_the_closed_form(method, schedule):
    """Each step is affine in z, so the chain is `a z + b`, and the latent `(x - b) / a`."""
    law = ExactGaussian(schedule)
    z = start()
    b = DDIM()(law, torch.zeros_like(z), LEVELS)
    a = DDIM()(law, torch.ones_like(z), LEVELS) - b
    x = DDIM()(law, z, LEVELS)
    found = invert(law, x, LEVELS, start(seed=1), method=method, num_updates=400, lr=0.05)
    torch.testing.assert_close(found.latents, (x - b) / a, rtol=1e-2, atol=1e-2)
    assert (found.losses < 1e-3).all()
    torch.testing.assert_close(found.images, x, rtol=1e-2, atol=1e-2)


def test_the_best_latent_of_each_image_is_kept_the_first_included():
    law, z = ExactGaussian(LinearSchedule()), start(3)
    x = DDIM()(law, z, LEVELS)
    first = z.clone()
    first[1:] = start(3, seed=1)[1:]
    found = invert(law, x, LEVELS, first, method=Sequential(), num_updates=30, lr=0.3)
    torch.testing.assert_close(found.latents[0], z[0], rtol=0, atol=0)
    best = [point.best for point in found.curve]
    assert best == sorted(best, reverse=True)
    assert best[-1] == pytest.approx(float(found.losses.mean()), rel=1e-6)
    assert [point.update for point in found.curve] == list(range(31))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_image_is_inverted_by_itself(method):
    law = ExactMixture(LinearSchedule())
    x, z = start(3, seed=5) / 3, start(3)
    together = invert(law, x, LEVELS, z, method=method, num_updates=5)
    alone = invert(law, x[1:2], LEVELS, z[1:2], method=method, num_updates=5)
    torch.testing.assert_close(alone.latents[0], together.latents[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [Sequential(), Implicit()], ids=["sequential", "deq"])
def test_a_network_gets_no_gradient_and_evaluations_are_counted(method):
    model = some_ddpm(network=tiny_unet(dropout=0.0, num_classes=3))
    denoiser = replace(model.conditioned(torch.tensor([0, 2])), clip=False)
    counts = [0]

    class Counting(nn.Module):
        def forward(self, z, t, label):
            counts[0] += len(z)
            return denoiser.network(z, t, label)

    x = DDIM()(denoiser, latents(0, range(2), (1, 8, 8))[0], LEVELS)
    z, _ = latents(1, range(2), (1, 8, 8))
    counted = replace(denoiser, network=Counting())
    found = invert(counted, x, LEVELS, z, method=method, num_updates=20, lr=0.02)
    assert found.curve[-1].best < 0.7 * found.curve[0].best
    assert all(weight.grad is None for weight in denoiser.network.parameters())
    told = found.curve[-1].evaluations
    if isinstance(method, Sequential):
        assert counts[0] / 2 == told - 10  # the last images need no gradient
    else:
        assert counts[0] / 2 >= told  # samples that have converged are evaluated with the rest


def test_an_encoding_is_a_better_start_than_noise():
    law = ExactMixture(CosineLogSNRSchedule())
    x = DDIM()(law, start(), LEVELS)
    near = invert(law, x, LEVELS, encode(law, x, LEVELS), num_updates=1, method=Implicit(TIGHT))
    far = invert(law, x, LEVELS, start(seed=3), num_updates=1, method=Implicit(TIGHT))
    assert near.curve[0].loss < 0.1 * far.curve[0].loss


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
def test_a_solvers_tolerance_does_not_pass_for_a_loss(schedule):
    """From the encoding, which is better than a tolerance of 1e-2 can tell."""
    law, levels = ExactMixture(schedule), linear(1000, 30)
    x = DDIM()(law, start(), levels)
    z = encode(law, x, levels)
    first = (DDIM()(law, z, levels) - x).square().flatten(1).sum(1)
    found = invert(law, x, levels, z, method=Implicit(), num_updates=12, lr=0.05)
    true = (DDIM()(law, found.latents, levels) - x).square().flatten(1).sum(1)
    torch.testing.assert_close(found.losses, true, rtol=1e-6, atol=1e-12)
    assert found.curve[-1].best == pytest.approx(float(true.mean()), rel=1e-6)
    assert (true <= first * (1 + 1e-9)).all()


def test_chains_that_do_not_converge_are_told_of():
    law = ExactMixture(LinearSchedule())
    method = Implicit(DEQ(Picard(max_sweeps=1)))
    with pytest.warns(UserWarning, match="4 of 4 chains did not converge in 1 sweeps"):
        invert(law, start() / 3, LEVELS, start(seed=1), method=method, num_updates=1)


def test_time_limits_an_inversion():
    law = ExactGaussian(LinearSchedule())
    found = invert(law, start(), LEVELS, start(seed=1), max_seconds=0.0, num_updates=50)
    assert len(found.curve) == 1


@pytest.mark.parametrize("method", [Sequential(), Implicit()])
def test_an_inversion_stops_below_a_loss(method):
    law = ExactGaussian(LinearSchedule())
    x, z, more = start() / 3, start(seed=1), {"method": method, "lr": 0.05, "num_updates": 200}
    whole = invert(law, x, LEVELS, z, **more)
    enough = float(whole.losses.max()) * 4
    found = invert(law, x, LEVELS, z, **more, stop_below=enough)
    assert (found.losses < enough).all()
    assert 1 < len(found.curve) < len(whole.curve)
    if method == Sequential():  # judged at each update: not one too many
        before = invert(law, x, LEVELS, z, **more | {"num_updates": len(found.curve) - 2})
        assert not (before.losses < enough).all()


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_updates": -1}, "num_updates must be at least 0, got -1"),
        ({"judge_every": 0}, "judge_every must be at least 1, got 0"),
        ({"stop_below": 0.0}, "stop_below must be positive, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"z": torch.zeros(1, 1, 4, 4)}, r"z must have the images' shape .* got \(1, 1, 4, 4\)"),
        ({"denoiser": some_ddpm().denoiser}, "denoiser must not clip"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        invert(
            **{
                "denoiser": ExactGaussian(LinearSchedule()),
                "x": start(),
                "levels": LEVELS,
                "z": start(),
                **arguments,
            }
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"applications": 0}, "applications must be at least 1, got 0"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\], got 0"),
    ],
)
def test_wrong_gradients_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Implicit(**arguments)


@pytest.mark.parametrize("method", [Implicit, InverseJacobian])
def test_a_solver_that_clips_has_no_gradient(method):
    with pytest.raises(ValueError, match=r"deq must not clip, got DEQ\(.*clip=True"):
        method(DEQ(clip=True))
