"""Sampling: against diffusers' pipeline, the loop without a network, DEQ against the sequence.

Stages of `speed.py` and `gpu.py`. The contenders have the same network, the same latents and the
same levels; tests/benchmarks/test_subjects.py compares the images.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from measuring import Bench, Contender, Row
from subjects import (
    Nothing,
    converted,
    diffusers_network,
    diffusers_pipeline,
    diffusers_scheduler,
    has,
    in_precision,
    lucidrains_diffusion,
    make_model,
    network_arguments,
    other_memory_format,
    precisions,
    settings,
)
from torch import Tensor, nn

from ddim_pl.fixed_point import Anderson
from ddim_pl.rng import image_generators
from ddim_pl.samplers import DDIM, DEQ
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import linear, trailing
from ddim_pl.training import DDPM

PEER = "diffusers' pipeline"
CUDA_GRAPHS = "in CUDA graphs by hand"
DEQ_SWEEPS = 10  # what 1000 steps take at most, docs/results/deq.md


def sampling(bench: Bench) -> None:
    """Images a second, ours and others', at every precision."""
    every, usual = precisions(bench.device), ("float32", "bf16")
    cases = [("digits", 64, 50, usual), ("cifar10", 8, 4, usual), ("cifar10", 32, 1, usual)]
    if bench.device == "cuda":
        cases = [("cifar10", 16, 50, usual), ("cifar10", 256, 20, every)]
        cases += [("digits", 64, 50, usual)]
    if bench.tiny:
        cases = [("digits", 2, 2, every), ("cifar10", 2, 2, every)]
    for name, batch, steps, kinds in cases:
        bench.case(
            f"{name}, batch {batch}, {steps} steps",
            partial(_sampling, bench, name, batch, steps, kinds),
        )


def _sampling(bench: Bench, name: str, batch: int, steps: int, kinds: Sequence[str]) -> list[Row]:
    contenders: dict[str, Contender] = {}
    peers: dict[str, str] = {}
    for precision in kinds:
        for label, call in _samplers(bench, name, batch, steps, precision):
            contenders[f"{label}, {precision}"] = in_that(precision, call)
            if label.startswith("ours"):
                peers[f"{label}, {precision}"] = f"{PEER}, {precision}"
    peers = {label: peer for label, peer in peers.items() if peer in contenders}
    if has(bench, "denoising-diffusion-pytorch"):
        arguments = network_arguments(name, tiny=bench.tiny)
        theirs = lucidrains_diffusion(arguments, steps).eval().to(bench.device)
        count = sum(p.numel() for p in theirs.model.parameters()) / 1e6
        label = f"denoising-diffusion-pytorch, {count:.1f} M parameters, float32"
        contenders[label] = in_that("float32", lambda: _quiet(lambda: theirs.sample(batch)))
    rows = bench.in_turn(contenders, work=batch, unit="images", peers=peers)
    return [row | {"ms for image and step": 1e3 * row["seconds"] / batch / steps} for row in rows]


def _samplers(
    bench: Bench, name: str, batch: int, steps: int, precision: str
) -> Iterator[tuple[str, Contender]]:
    """Ours, ours with each setting, ours and diffusers' in the other memory format."""
    make = partial(make_model, name, tiny=bench.tiny)
    model = converted(make(), precision).to(bench.device)
    yield "ours", partial(draw, model, batch, steps)
    for key, value in settings(bench, precision, without=[("compile", False)]):
        changed = converted(make(**{key: value}), precision).to(bench.device)
        changed.setup("predict")  # compiles
        yield f"ours {key}={value}", partial(draw, changed, batch, steps)
    if bench.compile and precision == "bf16":
        graphs = converted(make(), precision).to(bench.device)
        graphs.average.module.compile(mode="reduce-overhead")
        yield f"ours {CUDA_GRAPHS}", partial(draw, graphs, batch, steps)
    word, layout = other_memory_format(model.average.module)
    other = converted(make(), precision).to(bench.device)
    other.average.module.to(memory_format=layout)
    yield f"ours {word}", partial(draw, other, batch, steps)
    if not has(bench, "diffusers"):
        return
    arguments = network_arguments(name, tiny=bench.tiny)
    for word, layout in (("", None), (" channels_last by hand", torch.channels_last)):
        network = diffusers_network(arguments).eval().to(bench.device)
        network.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        if layout is not None:
            network.to(memory_format=layout)
        pipeline = diffusers_pipeline(model, network, clip=clips(model))
        yield f"{PEER}{word}", partial(draw_by_pipeline, pipeline, batch, steps)


def clips(model: DDPM) -> bool:
    """Whether a model's own sampler clips."""
    return bool(model.clip if model.sampler.clip is None else model.sampler.clip)


def draw(model: DDPM, batch: int, steps: int) -> Tensor:
    """Images `(B, C, H, W)` on the CPU, by the model's own sampler at trailing levels."""
    levels = trailing(model.schedule.num_levels, steps)
    return model.sample(range(batch), levels=levels).cpu()


def draw_by_pipeline(pipeline: object, batch: int, steps: int) -> Tensor:
    """The same images by diffusers, which gives them in [0, 1]."""
    images = pipeline(
        batch_size=batch,
        generator=image_generators(0, range(batch)),
        num_inference_steps=steps,
        use_clipped_model_output=True,
        output_type="pt",
        return_dict=False,
    )
    return images[0].cpu()


def in_that(precision: str, call: Contender) -> Contender:
    """The call with float32 as this precision has it."""

    def inner() -> object:
        with in_precision(precision):
            return call()

    return inner


def _quiet(call: Contender) -> object:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        return call()


# ---- the loop without a network ---------------------------------------------------------------


def loop(bench: Bench) -> None:
    """What a step costs beside the network, with the start noise."""
    cases = [(1, (1, 8, 8)), (64, (1, 8, 8)), (64, (3, 32, 32))]
    for batch, shape in cases[:1] if bench.tiny else cases:
        for eta in (0.0, 1.0):
            text = "x".join(map(str, (batch, *shape)))
            bench.case(f"{text}, eta {eta:g}", partial(_loop, bench, batch, shape, eta))


def _loop(bench: Bench, batch: int, shape: tuple[int, int, int], eta: float) -> list[Row]:
    steps = 2 if bench.tiny else 100

    def model(**changes: object) -> DDPM:
        return DDPM(Nothing(), LinearSchedule(), image_shape=shape, **changes).to(bench.device)

    levels = trailing(1000, steps)

    def ours(model: DDPM) -> Tensor:
        return model.sample(range(batch), sampler=DDIM(eta), levels=levels)

    contenders: dict[str, Contender] = {"ours": partial(ours, model())}
    for key, value in settings(bench, "float32", network=False):
        if "compile" not in key:
            contenders[f"ours {key}={value}"] = partial(ours, model(**{key: value}))
    if has(bench, "diffusers"):
        scheduler = diffusers_scheduler(model(), clip=True)
        contenders["diffusers' scheduler"] = partial(
            step_by_step, scheduler, Nothing(), (batch, *shape), steps, eta, bench.device
        )
    rows = bench.in_turn(contenders, work=steps, unit="steps")
    return [row | {"us a step": 1e6 * row["seconds"] / steps} for row in rows]


def step_by_step(
    scheduler: object,
    network: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    eta: float,
    device: str,
) -> Tensor:
    """Diffusers' loop with a generator for each image, as ours has it."""
    from diffusers.utils.torch_utils import randn_tensor

    generators = image_generators(0, range(shape[0]))
    z = randn_tensor(shape, generator=generators, device=torch.device(device))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = network(z, t.to(device).float().expand(len(z)))
        z = scheduler.step(
            output, t, z, eta=eta, use_clipped_model_output=True, generator=generators
        ).prev_sample
    return z


# ---- all steps at once ------------------------------------------------------------------------


def deq(bench: Bench) -> None:
    """DEQ-DDIM by its number of sweeps, against the sequential chain.

    The weights are random, so that the number of sweeps to a tolerance would mean nothing: it is
    fixed, at what a trained network takes at most.
    """
    bench.note(f"{DEQ_SWEEPS} sweeps of Anderson iteration, whatever the residual")
    on_gpu = bench.device == "cuda"
    cases = [("digits", 1, 100), ("digits", 16, 100)]
    if on_gpu:
        cases = [("cifar10", 1, 1000), ("cifar10", 16, 1000), ("cifar10", 64, 1000)]
    for name, batch, steps in [("digits", 2, 3)] if bench.tiny else cases:
        text = f"{name}, batch {batch}, {steps} steps"
        bench.case(text, partial(_deq, bench, name, batch, steps))


def _deq(bench: Bench, name: str, batch: int, steps: int) -> list[Row]:
    precision = "bf16" if bench.device == "cuda" else "float32"
    model = converted(make_model(name, tiny=bench.tiny), precision).to(bench.device)
    z, _ = model.latents(range(batch), model.schedule.num_levels)
    z, denoiser = z.to(bench.device), model.conditioned(model.label_of(range(batch)))
    levels = linear(model.schedule.num_levels, steps)
    sweeps = 2 if bench.tiny else DEQ_SWEEPS
    at_once = DEQ(Anderson(tolerance=0.0, max_sweeps=sweeps), max_batch=1024)
    contenders: dict[str, Contender] = {
        f"sequential DDIM, {precision}": lambda: DDIM()(denoiser, z, levels),
        f"DEQ, {precision}": lambda: at_once.solve(denoiser, z, levels),
    }
    if bench.device == "cuda" and has(bench, "diffusers"):
        network = diffusers_network(network_arguments(name, tiny=bench.tiny)).eval()
        network = network.to(bench.device, torch.bfloat16)
        pipeline = diffusers_pipeline(model, network, clip=clips(model))
        contenders[f"{PEER}, {precision}"] = partial(draw_by_pipeline, pipeline, batch, steps)
    rows = bench.in_turn(contenders, work=batch, unit="images")
    rows[1]["seconds a sweep"] = rows[1]["seconds"] / sweeps
    return rows
