"""What images cost, against a count of what a network is fed."""

import pytest
import torch
from tiny import some_ddpm, tiny_unet
from walk import concrete_classes

from ddim_pl.evaluation.cost import network_evaluations
from ddim_pl.guidance import Guidance
from ddim_pl.samplers import DDIM, DEQ, PNDM, Heun, ParaDiGMS, Sampler
from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.timesteps import linear

GUIDANCES = [None, Guidance(0.0), Guidance(1.0), Guidance(3.0), Guidance(3.0, (0.3, 3.0))]


def states_fed(sampler, levels, guidance):
    """States of one image that the network is fed while it is drawn."""
    network = tiny_unet(num_classes=3, null_class=True)
    model = some_ddpm(network=network, noise=sampler.noise, sampler=sampler)
    fed = []
    model.average.module.register_forward_pre_hook(lambda _, given: fed.append(len(given[0])))
    model.sample([1], levels=levels, guidance=guidance)
    return sum(fed)


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("kind", concrete_classes(Sampler))
def test_it_is_what_the_network_is_fed(kind, guidance):
    sampler, levels, schedule = kind(), linear(1000, 5), LinearSchedule()
    found = network_evaluations(sampler, levels, schedule, guidance)
    fed = states_fed(sampler, levels, guidance)
    if hasattr(sampler, "split_levels"):
        assert fed <= found
        assert found == sampler.num_evaluations(levels) * (2 if guidance in GUIDANCES[3:] else 1)
    else:
        assert found == fed


@pytest.mark.parametrize(
    ("sampler", "plain", "everywhere", "inside"),
    [
        # sigma / alpha is tan(pi / 2 t / 1000): 0 of levels 1000, 800, 600, 400, 200 is in the
        # interval but 600 (1.38) and 400 (0.73).
        (DDIM(), 5, 10, 5 + 2),
        # Four steps evaluate their end too.
        (Heun(), 9, 18, 9 + 4),
        # Runge-Kutta steps from 1000, 800 and 600 of four, then one each. Inside are 600 at the
        # second's end, 600, 500, 500 and 400 of the third, and 400.
        (PNDM("prk"), 14, 28, 14 + 6),
        (DEQ(), 1 + 4 * 30, 2 * (1 + 4 * 30), 2 * (1 + 4 * 30)),
        (ParaDiGMS(), 16, 32, 32),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sampler) else None,
)
def test_in_an_interval_two_where_it_is_guided(sampler, plain, everywhere, inside):
    levels, schedule = linear(1000, 5), CosineLogSNRSchedule()
    for guidance, wanted in {
        None: plain,
        Guidance(2.0): everywhere,
        Guidance(2.0, (0.7, 1.5)): inside,
    }.items():
        assert network_evaluations(sampler, levels, schedule, guidance) == wanted


def test_it_draws_from_no_global_generator():
    before = torch.get_rng_state()
    guidance = Guidance(2.0, (0.7, 1.5))
    network_evaluations(DDIM(1.0), linear(1000, 5), CosineLogSNRSchedule(), guidance)
    assert torch.equal(torch.get_rng_state(), before)
