"""The chain solved at once is the chain walked step by step."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact import ExactGaussian, ExactMixture
from tiny import some_ddpm, tiny_unet

from ddim_pl.denoiser import Denoiser, NetworkDenoiser
from ddim_pl.fixed_point import Anderson, Picard
from ddim_pl.noise import latents
from ddim_pl.prediction import Prediction
from ddim_pl.samplers import DDIM, DEQ, ParaDiGMS, deq, parallel
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.timesteps import linear, quadratic
from ddim_pl.transitions import ddim_chain, implied_x

MIXINGS = ["sample", "block", "triangular"]
LAWS = [ExactGaussian(LinearSchedule()), ExactMixture(CosineLogSNRSchedule())]


def solved(steps=30, **arguments):
    return DEQ(Anderson(**{"tolerance": 1e-10, "max_sweeps": steps + 20, **arguments}))


def start(batch=4, dtype=torch.float64):
    return latents(0, range(batch), (1, 4, 4))[0].to(dtype)


class Counted(Denoiser):
    """A denoiser that counts the states it is given."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.states, self.calls = denoiser, denoiser.schedule, 0, []

    def __call__(self, z, t):
        self.states += len(z)
        self.calls.append(len(z))
        return self.denoiser(z, t)


# ---- the map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNRSchedule()])
@pytest.mark.parametrize("end", [0.0, 5.0])
def test_the_closed_form_of_a_chain_is_its_steps(schedule, end):
    """Any estimates, also such that no state explains: clipped ones, say."""
    levels = torch.linspace(1000, end, 41, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 40, 2, 4, generator=generator, dtype=torch.float64)
    states = ddim_chain(z, x, schedule(levels))
    for k in range(40):
        t, s = schedule(levels[k]), schedule(levels[k + 1])
        stepped = s.alpha * x[:, k] + s.sigma * (z - t.alpha * x[:, k]) / t.sigma
        torch.testing.assert_close(states[:, k], stepped, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(implied_x(z, stepped, t, s), x[:, k], rtol=1e-6, atol=1e-6)
        z = stepped


def test_float32_keeps_its_digits_where_alpha_almost_vanishes():
    """With eps the sum would run over `z / alpha`, 22,026 times the state: four digits less."""
    law = ExactMixture(CosineLogSNRSchedule())
    levels = linear(1000, 100)
    z = start()
    exact = DDIM()(law, z, levels)
    drawn = DEQ(Anderson(tolerance=1e-7, max_sweeps=100))(law, z.float(), levels)
    assert (drawn - exact).abs().max() < 2e-5


@pytest.mark.parametrize("argument", ["start", "states"])
def test_the_maps_gradient_is_its_derivative(argument):
    law, levels = ExactMixture(LinearSchedule()), quadratic(1000, 4)
    z, states = start(2)[:, :, 0], start(8).reshape(2, 4, 1, 16)[..., :4]

    def h(value):
        first, rest = (value, states) if argument == "start" else (z, value)
        inputs = torch.cat([first[:, None], rest[:, :-1]], 1)
        t = levels[:-1].repeat(2)
        x = law(inputs.flatten(0, 1), t).x.unflatten(0, (2, 4))
        return ddim_chain(first, x, law.schedule(levels))

    value = (z if argument == "start" else states).clone().requires_grad_(True)
    assert torch.autograd.gradcheck(h, (value,))


# ---- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=["gaussian", "mixture"])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_the_fixed_point_is_what_ddim_draws(law, mixing, steps):
    levels, z = linear(1000, steps), start()
    drawn = solved(steps, mixing=mixing)(law, z, levels)
    torch.testing.assert_close(drawn, DDIM()(law, z, levels), rtol=1e-7, atol=1e-7)


def test_clipped_estimates_are_no_obstacle():
    model = some_ddpm(network=tiny_unet(dropout=0.0), clip=True)
    z, _ = latents(0, range(3), model.image_shape)
    levels = linear(1000, 20)
    clipped, free = (replace(model.denoiser, clip=clip) for clip in (True, False))
    exact = DDIM()(clipped, z, levels)
    assert not torch.allclose(exact, DDIM()(free, z, levels), atol=0.05)  # it does clip
    drawn = DEQ(Anderson(tolerance=1e-6, max_sweeps=60))(clipped, z, levels)
    torch.testing.assert_close(drawn, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 7])
def test_picard_is_exact_after_as_many_sweeps_as_steps(steps):
    law, levels, z = LAWS[1], linear(1000, steps), start()
    drawn = DEQ(Picard(tolerance=0, max_sweeps=steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no convergence to 0, which nothing reaches
        found = drawn(law, z, levels)
    torch.testing.assert_close(found, DDIM()(law, z, levels), rtol=1e-10, atol=1e-10)


def test_the_trajectory_is_ddims():
    law, levels, z = LAWS[1], linear(1000, 12), start()
    ours = list(solved().trajectory(law, z, levels))
    theirs = list(DDIM().trajectory(law, z, levels))
    for a, b in zip(ours, theirs, strict=True):
        assert a.t == b.t
        torch.testing.assert_close(a.z, b.z, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-5)


def test_labels_reach_every_state_of_their_sample():
    model = some_ddpm(network=tiny_unet(num_classes=3, dropout=0.0))
    denoiser = model.conditioned(torch.tensor([2, 0, 1, 1]))
    z, _ = latents(0, range(4), model.image_shape)
    levels = linear(1000, 5)
    exact = DDIM()(denoiser, z, levels)
    for sampler in (
        DEQ(Anderson(tolerance=1e-6)),
        DEQ(Anderson(tolerance=1e-6), max_batch=3),
        ParaDiGMS(3, tolerance=0),
    ):
        torch.testing.assert_close(sampler(denoiser, z, levels), exact, rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
    law, levels = LAWS[1], linear(1000, 40)
    sampler = DEQ(Anderson(tolerance=1e-3))
    z = torch.cat([start(2), 0.01 * start(2), 3 * start(2)])
    together = sampler.solve(law, z, levels)
    assert len(set(together.sweeps.tolist())) > 1
    for i in range(len(z)):
        alone = sampler.solve(law, z[i : i + 1], levels)
        assert torch.equal(alone.sweeps[0], together.sweeps[i])
        torch.testing.assert_close(alone.states[0], together.states[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first_guess", [0, 1, 4, 100])
def test_evaluations_are_counted(first_guess):
    """Of one sample: its own sweeps, each of all states but the first, and the first guess."""
    counted, levels = Counted(LAWS[1]), linear(1000, 10)
    sampler = DEQ(Anderson(tolerance=1e-6), first_guess=first_guess)
    chain = sampler.solve(counted, start(1), levels)
    assert chain.evaluations.tolist() == [counted.states]
    assert counted.states <= sampler.num_evaluations(levels)
    if first_guess == 100:  # that is the whole chain
        assert chain.sweeps.tolist() == [1]


def test_a_first_guess_and_a_start_save_sweeps():
    law, levels, z = LAWS[1], linear(1000, 100), start()
    solver = Anderson(tolerance=1e-4)
    plain = DEQ(solver).solve(law, z, levels)
    guessed = DEQ(solver, first_guess=20).solve(law, z, levels)
    assert (guessed.sweeps < plain.sweeps).all()
    near = DEQ(solver).solve(law, z + 1e-3, levels, start=plain.states)
    assert (near.sweeps < plain.sweeps).all()


def test_a_chain_in_pieces_is_the_same_chain():
    law, levels, z = LAWS[0], linear(1000, 10), start(3)
    whole = Counted(law)
    expected = solved().solve(whole, z, levels)
    pieces = Counted(law)
    found = replace(solved(), max_batch=4).solve(pieces, z, levels)
    assert torch.equal(found.states, expected.states)
    assert max(whole.calls) == 27
    assert max(pieces.calls) == 4
    assert whole.states == pieces.states


def test_what_does_not_converge_is_told_and_the_best_is_returned():
    law, levels, z = LAWS[1], linear(1000, 50), start()
    sampler = DEQ(Picard(tolerance=1e-9, max_sweeps=4))
    with pytest.warns(
        UserWarning, match=r"4 of 4 samples did not converge in 4 sweeps: .*residual"
    ):
        drawn = sampler(law, z, levels)
    chain = sampler.solve(law, z, levels)
    assert torch.equal(drawn, chain.states[:, -1])
    assert not chain.converged.any()
    assert chain.residuals.shape == (4, 4)
    assert chain.residuals.isfinite().all()


def test_states_that_do_not_fit_at_once_are_evaluated_in_halves():
    class Small(Denoiser):
        """No more than five states fit."""

        schedule = LAWS[0].schedule

        def __call__(self, z, t):
            if len(z) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return LAWS[0](z, t)

    levels, z = linear(1000, 10), start(2)
    with pytest.warns(UserWarning, match="do not fit .* at once") as told:
        drawn = solved()(Small(), z, levels)
    assert "max_batch=9" in str(told[0].message)
    assert "max_batch=5" in str(told[1].message)
    assert len(told) == 2  # not at every sweep
    torch.testing.assert_close(drawn, DDIM()(LAWS[0], z, levels), rtol=1e-7, atol=1e-7)


def test_a_chain_whose_states_do_not_fit_says_what_would(monkeypatch):
    monkeypatch.setattr(deq, "free_memory", lambda device: 300_000.0)
    with pytest.raises(
        ValueError, match=r"chain of 100 steps for 4 samples need .* at most 1 samples"
    ):
        solved()(LAWS[0], start(), linear(1000, 100))
    monkeypatch.setattr(deq, "free_memory", lambda device: 5_000.0)
    with pytest.raises(ValueError, match="are free: use ParaDiGMS"):
        solved()(LAWS[0], start(), linear(1000, 100))
    assert parallel.free_memory(torch.device("cpu")) > 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"first_guess": -1}, "first_guess must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DEQ(**arguments)


def test_levels_must_fall():
    with pytest.raises(ValueError, match="levels must decrease"):
        DEQ()(LAWS[0], start(), torch.tensor([0.0, 500, 1000]))


# ---- several processes ------------------------------------------------------------------------


def share_levels(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    counted, levels = Counted(LAWS[1]), linear(1000, 10)
    z = start(3)
    for name, sampler in {
        "deq": DEQ(Anderson(tolerance=1e-8), split_levels=True),
        "window": ParaDiGMS(4, tolerance=1e-8, split_levels=True),
    }.items():
        counted.states = 0
        drawn = sampler(counted, z, levels)
        torch.save((drawn, counted.states), f"{folder}/{name}-{rank}.pt")
    own = latents(rank, range(3), (1, 4, 4))[0].double()
    for name, sampler in {
        "other latents": DEQ(split_levels=True),
        "other latents in a window": ParaDiGMS(split_levels=True),
    }.items():
        with pytest.raises(ValueError, match="split_levels must have the same latents"):
            sampler(LAWS[1], own, levels)
        Path(folder, f"{name}-{rank}").touch()
    deq.free_memory = lambda device: 1.0 if rank else torch.inf
    with pytest.raises(ValueError, match="use ParaDiGMS"):  # though one process has the memory
        DEQ(split_levels=True)(LAWS[1], z, levels)
    with pytest.raises(ValueError, match="must be False where gradients are needed"):
        parallel.Estimates(LAWS[1], split=True).of_chain(
            z[:, None].clone().requires_grad_(True), levels[:1]
        )
    Path(folder, f"end-{rank}").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_levels_and_draw_the_same(tmp_path):
    torch.multiprocessing.spawn(share_levels, (2, str(tmp_path)), nprocs=2)
    assert len(list(tmp_path.glob("other latents*"))) == 4
    assert len(list(tmp_path.glob("end-*"))) == 2
    expected = DDIM()(LAWS[1], start(3), linear(1000, 10))
    for name in ("deq", "window"):
        found = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for drawn, _ in found:
            torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)
        alone = Counted(LAWS[1])
        sampler = {
            "deq": DEQ(Anderson(tolerance=1e-8)),
            "window": ParaDiGMS(4, tolerance=1e-8),
        }[name]
        sampler(alone, start(3), linear(1000, 10))
        for _, states in found:
            assert states < 0.7 * alone.states


# ---- a window ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=["gaussian", "mixture"])
@pytest.mark.parametrize("end", [0.0, 3.0])
@pytest.mark.parametrize("window", [1, 2, 7, 30, 100])
def test_a_window_slides_to_what_ddim_draws(law, window, end):
    levels, z = torch.linspace(1000, end, 31, dtype=torch.float64), start()
    states, sweeps, evaluations = ParaDiGMS(window, tolerance=1e-9).solve(law, z, levels)
    for k, state in enumerate(DDIM().trajectory(law, z, levels)):
        torch.testing.assert_close(states[:, k], state.z, rtol=1e-6, atol=1e-6)
    assert (sweeps <= 30).all()
    if window == 1:
        assert sweeps.tolist() == [30] * 4
        assert evaluations.tolist() == [31] * 4  # and one for a first guess


def test_a_wide_window_takes_fewer_sweeps_than_steps():
    law, levels, z = LAWS[1], linear(1000, 200), start()
    states, sweeps, _ = ParaDiGMS(40, tolerance=1e-3).solve(law, z, levels)
    assert (sweeps < 80).all()
    exact = DDIM()(law, z, levels)
    assert (
        (states[:, -1] - exact).flatten(1).norm(dim=1) < 0.02 * exact.flatten(1).norm(dim=1)
    ).all()


def test_a_windows_sample_does_not_depend_on_its_batch():
    law, levels = LAWS[1], linear(1000, 40)
    sampler = ParaDiGMS(10, tolerance=1e-3)
    z = torch.cat([start(2), 0.01 * start(2), 3 * start(2)])
    states, sweeps, evaluations = sampler.solve(law, z, levels)
    for i in range(len(z)):
        alone = sampler.solve(law, z[i : i + 1], levels)
        torch.testing.assert_close(alone[0][0], states[i], rtol=1e-12, atol=1e-12)
        assert alone[1][0] == sweeps[i]
        assert alone[2][0] == evaluations[i]


def test_no_state_is_evaluated_at_level_0():
    seen = []

    class Seen(Denoiser):
        schedule = LAWS[0].schedule

        def __call__(self, z, t):
            seen.append(torch.as_tensor(t).min())
            return LAWS[0](z, t)

    for sampler in (ParaDiGMS(7), DEQ()):
        sampler(Seen(), start(), linear(1000, 20))
    assert min(seen) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be at least 0, got -1"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
    ],
)
def test_wrong_windows_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParaDiGMS(**arguments)


def test_a_denoiser_is_asked_for_its_samples():
    label = torch.tensor([5, 6, 7])
    denoiser = NetworkDenoiser(tiny_unet(num_classes=9), LinearSchedule(), label=label)
    assert denoiser.select(torch.tensor([2, 2, 0])).label.tolist() == [7, 7, 5]
    assert replace(denoiser, label=None).select(torch.tensor([1])).label is None
    assert isinstance(LAWS[0](start(), torch.tensor(5.0)), Prediction)
