"""Which steps of Gamma diffusion keep its marginals? Moments and distances, and a figure.

.venv/bin/python benchmarks/gamma_marginals.py [docs/gamma-marginals.png]

The true image stands for the network, so that the noise of a state is known: its law is the step's
own doing. Seconds on one core.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddim_pl.noise.gamma_quantiles import normal_score
from ddim_pl.prediction import Prediction, eps_from_x
from ddim_pl.samplers import GammaExact, GammaMoment, GammaQuantile, GammaReport
from ddim_pl.samplers.gamma import GammaSampler
from ddim_pl.schedules import LinearSchedule

SCHEDULE = LinearSchedule()
DRAWS = 100_000
PAIRS = [(1000, 999), (1000, 500), (500, 499), (500, 250), (120, 60), (60, 59), (60, 30)]


class Known:
    """The true image, 0, as a denoiser."""

    schedule = SCHEDULE

    def __call__(self, z: Tensor, t: Tensor) -> Prediction:
        """The image, and the noise that is left."""
        x = torch.zeros_like(z)
        return Prediction(x, eps_from_x(SCHEDULE(t), z, x))


def noise_after(sampler: GammaSampler, levels: Tensor) -> Tensor:
    """Standardised noise at the last level, from the Gamma law at the first, `(DRAWS,)`."""
    first, last = SCHEDULE(levels[0]), SCHEDULE(levels[-1])
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    z = first.sigma * sampler.noise.draw((DRAWS, 1), first, generator, like)
    return sampler(Known(), z, levels, generator=generator)[:, 0] / last.sigma


def distance(eps: Tensor, sampler: GammaSampler, level: Tensor) -> float:
    """Kolmogorov and Smirnov's distance to the Gamma law of a level."""
    shape = sampler.noise.concentration(SCHEDULE(level))
    p = torch.special.ndtr(normal_score(eps.sort().values, shape))
    steps = torch.arange(DRAWS + 1, dtype=torch.float64) / DRAWS
    return float(torch.maximum((p - steps[:-1]).abs().max(), (p - steps[1:]).abs().max()))


def table(theta_0: float) -> None:
    """Print what one step makes of mean, variance and law."""
    kinds = [
        GammaReport(theta_0, 0.0),
        GammaReport(theta_0, 1.0),
        GammaMoment(theta_0, 1.0),
        GammaExact(theta_0),
        GammaQuantile(theta_0),
    ]
    names = ["report, eta 0", "report, eta 1", "moment", "exact", "quantile"]
    print(f"\ntheta_0 = {theta_0}: mean / variance / KS distance of the noise; wanted 0 / 1 / 0\n")
    print(f"| from, to | shape K_s | {' | '.join(names)} |")
    print("|---" * (len(names) + 2) + "|")
    for t, s in PAIRS:
        levels = torch.tensor([t, s], dtype=torch.float64)
        cells = []
        for sampler in kinds:
            eps = noise_after(sampler, levels)
            ks = distance(eps, sampler, levels[-1])
            cells.append(f"{eps.mean():.3f} / {eps.var():.4g} / {ks:.3f}")
        shape = float(kinds[0].noise.concentration(SCHEDULE(levels[-1])))
        print(f"| {t}, {s} | {shape:.3g} | {' | '.join(cells)} |")


def draw(path: Path, theta_0: float = 0.1) -> None:
    """Histograms of the noise against its law, after one step and after twenty."""
    rows = {
        "one step, 120 to 60": torch.tensor([120.0, 60.0], dtype=torch.float64),
        "20 steps, 1000 to 60": torch.linspace(1000, 60, 21, dtype=torch.float64),
    }
    kinds = [GammaReport(theta_0, 0.0), GammaMoment(theta_0), GammaExact(theta_0)]
    samplers = [*kinds, GammaQuantile(theta_0)]
    noise, low = samplers[0].noise, SCHEDULE(60.0)
    grid = torch.linspace(-3, 5, 400, dtype=torch.float64)
    law = noise.log_density(grid, low).exp()
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    for (title, levels), line in zip(rows.items(), axes, strict=True):
        for sampler, axis in zip(samplers, line, strict=True):
            eps = noise_after(sampler, levels)
            ks = distance(eps, sampler, levels[-1])
            axis.hist(eps.numpy(), 120, range=(-3, 5), density=True, color="tab:blue", alpha=0.45)
            axis.plot(grid.numpy(), law.numpy(), "k", linewidth=1)
            name = type(sampler).__name__
            axis.set_title(f"{name}, {title}\nvariance {eps.var():.3g}, KS {ks:.3f}", fontsize=8)
            axis.set_ylim(0, 0.75)
            axis.tick_params(labelsize=7)
    figure.supxlabel("standardised noise of the state; line: its Gamma law", fontsize=8)
    figure.savefig(path, dpi=90)
    print(f"\nThe figure is in {path}")


def main() -> None:
    """Print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("figure", type=Path, nargs="?", help="PNG file to draw, if given")
    figure = parser.parse_args().figure
    for theta_0 in (0.001, 0.1):
        table(theta_0)
    if figure is not None:
        draw(figure)


if __name__ == "__main__":
    main()
