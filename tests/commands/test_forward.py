"""`main.py forward`."""

import pytest
import torch
from command_runs import table, trainer
from tiny import some_ddpm

from ddim_pl.commands.forward import path
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.images import read_png
from ddim_pl.noise import GammaNoise
from ddim_pl.rng import image_generators
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import linear
from ddim_pl.transitions import transition_variance

SCHEDULE = LinearSchedule()


def states(eta, count=40_000, steps=4):
    """Noise of many images 0.3 at the levels of a path, `(S + 1, N)`, and the levels' scales."""
    levels = linear(1000, steps)
    x = torch.full((count, 1), 0.3, dtype=torch.float64)
    found = list(path(x, levels, SCHEDULE, eta, torch.Generator().manual_seed(0)))
    return torch.stack([z[:, 0] for z, _ in found]), [SCHEDULE(t) for t in levels], x[:, 0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_state_has_the_law_of_its_level(eta):
    z, scales, x = states(eta)
    for state, each in zip(z, scales, strict=True):
        bound = 5 * float(each.sigma) / len(x) ** 0.5
        assert abs(state.mean() - each.alpha * 0.3) <= bound + 1e-12
        assert abs(state.std() - each.sigma) <= bound + 1e-12
    assert torch.equal(z[-1], x)


def test_at_eta_1_the_steps_are_ddpms_markov_chain_and_at_eta_0_there_is_no_new_noise():
    z, scales, _ = states(1.0)
    for k in range(len(scales) - 2):
        t, s = scales[k], scales[k + 1]
        step = z[k] - t.alpha / s.alpha * z[k + 1]
        assert float(step.var()) == pytest.approx(float(transition_variance(t, s)), rel=0.04)
        for earlier in range(k + 1, len(scales) - 1):  # independent of what was before
            assert abs(torch.corrcoef(torch.stack([step, z[earlier]]))[0, 1]) < 0.03
    z, scales, x = states(0.0, count=3)
    eps = (z[0] - scales[0].alpha * x) / scales[0].sigma
    for state, each in zip(z, scales, strict=True):
        torch.testing.assert_close(state, each.alpha * x + each.sigma * eps)


def test_an_image_has_the_same_path_in_any_batch():
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    levels = linear(1000, 3)
    whole = list(path(x, levels, SCHEDULE, 0.5, image_generators(1, range(3))))
    alone = list(path(x[2:], levels, SCHEDULE, 0.5, image_generators(1, [2])))
    for (z, _), (other, _) in zip(whole, alone, strict=True):
        torch.testing.assert_close(z[2:], other, rtol=0, atol=0)


def test_it_writes_a_table_and_a_row_for_each_image_and_eta(tmp_path):
    arguments = {"num_images": 9, "num_steps": 20, "num_points": 5, "etas": [0.0, 1.0]}
    trainer(tmp_path).forward(some_ddpm(), DigitsDataModule(), **arguments)
    folder = tmp_path / "forward"
    rows = table(folder / "forward.csv")
    assert [float(row["level"]) for row in rows] == 2 * [250.0, 500.0, 750.0, 1000.0]
    assert all(float(row["correlation"]) == pytest.approx(1) for row in rows[:4])
    assert abs(float(rows[4]["correlation"])) < 0.5
    assert read_png(folder / "grid.png").shape[1] == 4 * 50
    assert "9 images on DDIM's forward paths of 20 steps" in (folder / "forward.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"etas": [2.0]}, r"etas must be one or more numbers in \[0, 1\], got \[2.0\]"),
        ({"etas": []}, "etas must be one or more"),
        ({"num_points": 1}, "num_points must be at least 2"),
        ({"num_steps": 2000}, "num_steps must lie in"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).forward(some_ddpm(), DigitsDataModule(), **arguments)
    assert not (tmp_path / "forward").exists()


def test_gamma_noise_has_other_paths(tmp_path):
    with pytest.raises(ValueError, match="noise must be Gaussian for forward, got GammaNoise"):
        trainer(tmp_path).forward(some_ddpm(noise=GammaNoise(0.1), sampler=None))
