"""Conformance of every sampler, found by walking the package."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
import torch
from exact import ExactGaussian
from peers import SmallNetwork

import ddim_pl.samplers
from ddim_pl import timesteps
from ddim_pl.clipping import Clipping, ClipRange, DynamicThreshold
from ddim_pl.denoiser import Denoiser, NetworkDenoiser
from ddim_pl.fixed_point import Solver
from ddim_pl.noise import latents
from ddim_pl.prediction import Prediction
from ddim_pl.samplers import DDIM, DEQ, PNDM, Ancestral, DPMSolverPP, Heun, ParaDiGMS, Sampler
from ddim_pl.schedules import LinearSchedule, ZeroTerminalSNR


def samplers() -> Iterator[type[Sampler]]:
    """Every concrete Sampler that a module of `ddim_pl.samplers` defines."""
    for module in pkgutil.iter_modules(ddim_pl.samplers.__path__):
        found = importlib.import_module(f"ddim_pl.samplers.{module.name}")
        for _, kind in inspect.getmembers(found, inspect.isclass):
            concrete = issubclass(kind, Sampler) and not inspect.isabstract(kind)
            if concrete and kind.__module__ == found.__name__:
                yield kind


SAMPLERS = list(samplers())
every_sampler = pytest.mark.parametrize("kind", SAMPLERS)
SHAPE = (3, 4, 4)


def images(kind: type[Sampler], denoiser: ExactGaussian, indices: range) -> torch.Tensor:
    z, generators = latents(0, indices, SHAPE)
    return kind()(denoiser, z, timesteps.linear(1000, 5), generator=generators)


def test_the_walk_finds_the_samplers() -> None:
    assert {DDIM, Ancestral, DPMSolverPP, Heun, PNDM} <= set(SAMPLERS)


@every_sampler
def test_a_sampler_is_a_frozen_dataclass_of_plain_numbers_and_names(kind: type[Sampler]) -> None:
    sampler = kind()
    assert dataclasses.is_dataclass(kind)
    for field in dataclasses.fields(kind):
        value = getattr(sampler, field.name)
        plain = bool | int | float | str | tuple | Sampler | Solver
        assert value is None or isinstance(value, plain)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(sampler, field.name, value)
    assert set(vars(sampler)) == {field.name for field in dataclasses.fields(kind)}
    assert kind() == sampler
    assert hash(kind()) == hash(sampler)


@every_sampler
def test_a_sampler_leaves_the_call_to_the_base(kind: type[Sampler]) -> None:
    assert kind.__call__ is Sampler.__call__
    assert kind.trajectory is Sampler.trajectory


@every_sampler
def test_a_sampler_and_its_module_say_what_they_do(kind: type[Sampler]) -> None:
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")  # the signature dataclass fills in
    assert inspect.getmodule(kind).__doc__


@every_sampler
def test_a_sampler_reproduces_its_images_under_the_same_generators(
    kind: type[Sampler], gaussian: ExactGaussian
) -> None:
    before = torch.get_rng_state()
    first, again = (images(kind, gaussian, range(4)) for _ in range(2))
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)  # no global random state


@every_sampler
def test_an_image_does_not_depend_on_its_batch(
    kind: type[Sampler], gaussian: ExactGaussian
) -> None:
    """To float32 rounding; test_ddim.py has the first samplers to the bit."""
    together = images(kind, gaussian, range(4))
    alone = torch.cat([images(kind, gaussian, range(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@every_sampler
def test_a_level_without_signal_is_the_limit_of_one_with_little_or_is_refused(
    kind: type[Sampler],
) -> None:
    """Level 1000 - 1e-9 has alpha = 6e-14; the slope of the multistep solver is 1 / log-SNR."""
    if not kind().noise.is_gaussian:
        pytest.skip("refused by the model, whose noise has no scale there")
    denoiser = ExactGaussian(ZeroTerminalSNR())
    levels = timesteps.linear(1000, 5)
    z, generators = latents(0, range(4), SHAPE)
    if kind().divides_by_signal:
        with pytest.raises(ValueError, match=r"levels must have some signal for .*got 1000"):
            kind()(denoiser, z.double(), levels, generator=generators)
        return
    at = kind()(denoiser, z.double(), levels, generator=generators)
    levels[0] -= 1e-9
    z, generators = latents(0, range(4), SHAPE)
    below = kind()(denoiser, z.double(), levels, generator=generators)
    torch.testing.assert_close(at, below, rtol=0, atol=1e-4 if kind is DPMSolverPP else 1e-9)
    if kind().encodes:
        rising = timesteps.linear(1000, 5).flip(0)
        assert kind()(denoiser, at, rising).isfinite().all()


@every_sampler
@pytest.mark.parametrize("clip", [True, False, ClipRange(-0.5, 0.5), DynamicThreshold()])
def test_a_samplers_clip_takes_the_place_of_the_models(
    kind: type[Sampler], clip: bool | Clipping
) -> None:
    """The trajectory is, to the bit, that of a model that clips so; without it the model's own."""
    network, levels = SmallNetwork(), timesteps.linear(1000, 5)

    def draw(sampler: Sampler, models: bool | Clipping) -> torch.Tensor:
        z, generators = latents(0, range(2), SHAPE)
        denoiser = NetworkDenoiser(network, LinearSchedule(), "v", clip=models)
        return sampler(denoiser, z, levels, generator=generators)

    expected = draw(kind(), clip)
    for models in (True, False):
        assert torch.equal(draw(kind(clip=clip), models), expected)
    assert not torch.equal(draw(kind(), clip is not True), expected)


@every_sampler
def test_a_samplers_name_says_its_clip_if_it_has_one(kind: type[Sampler]) -> None:
    """Cells and pairs of samplers without one keep the names of version 0.1."""
    assert "clip" not in str(kind())
    assert str(kind()) == repr(kind())
    assert str(kind(clip=False)).endswith("clip=False)")
    assert kind(clip=False) != kind()
    assert f"{DDIM(clip=True)}, {Ancestral()}" == (
        "DDIM(eta=0.0, clip=True), Ancestral(variance='small')"
    )


def test_a_denoiser_that_cannot_clip_says_so(gaussian: ExactGaussian) -> None:
    z, levels = torch.zeros(1, *SHAPE), timesteps.linear(1000, 5)
    assert DDIM(clip=False)(gaussian, z, levels).isfinite().all()
    with pytest.raises(ValueError, match="clip must be False for ExactGaussian, got True"):
        DDIM(clip=True)(gaussian, z, levels)


@every_sampler
def test_a_sampler_holds_nothing_between_calls(
    kind: type[Sampler], gaussian: ExactGaussian
) -> None:
    sampler = kind()
    levels = timesteps.linear(1000, 5)
    z, generators = latents(0, range(4), SHAPE)
    sampler(gaussian, z, levels, generator=generators)
    z, generators = latents(0, range(2), SHAPE)
    used = sampler(gaussian, z, levels, generator=generators)
    assert torch.equal(used, images(kind, gaussian, range(2)))


@every_sampler
def test_a_call_leaves_its_arguments_as_they_were(
    kind: type[Sampler], gaussian: ExactGaussian
) -> None:
    z, generators = latents(0, range(2), SHAPE)
    levels = timesteps.linear(1000, 5)
    kept = z.clone(), levels.clone()
    kind()(gaussian, z, levels, generator=generators)
    assert torch.equal(z, kept[0])
    assert torch.equal(levels, kept[1])


@every_sampler
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_sampler_counts_its_network_evaluations(
    kind: type[Sampler], num_steps: int, end: float, gaussian: ExactGaussian
) -> None:
    """None of them is at level 0, where no network is trained.

    For samplers that iterate until convergence the number is a maximum.
    """
    seen: list[float] = []

    class Counted(Denoiser):
        schedule = gaussian.schedule

        def __call__(self, z: torch.Tensor, t: torch.Tensor) -> Prediction:
            seen.extend(t.expand(len(z)).tolist())
            return gaussian(z, t)

    z, generators = latents(0, range(2), SHAPE)
    levels = torch.linspace(1000, end, num_steps + 1)
    kept = levels.clone()
    kind()(Counted(), z, levels, generator=generators)
    evaluations = len(seen) / len(z)
    if kind in (DEQ, ParaDiGMS):
        assert evaluations <= kind().num_evaluations(levels)
    else:
        assert evaluations == kind().num_evaluations(levels)
    assert torch.equal(levels, kept)
    assert 0 not in seen
