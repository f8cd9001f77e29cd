"""Is the report's eq. 20 the weighted loss of Gaussian noise? And where do its shapes explode?

.venv/bin/python benchmarks/gamma_objective.py [docs/gamma-objective.png]

The divergence of a step as a function of the estimate's error, over DDPM's, averaged over the
noise; and eq. 18 with shapes that double. Seconds on one core.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddim_pl.noise import GammaNoise
from ddim_pl.noise.gamma_divergences import thinning_divergence
from ddim_pl.prediction import Prediction
from ddim_pl.samplers import GammaReport
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import doubling

SCHEDULE = LinearSchedule()
STEPS = [(1000, 900), (500, 400), (250, 200), (120, 100), (80, 60)]
THETAS = [0.001, 0.01, 0.1]
SHARE = 1e-3


def ratio(theta_0: float, t: float, s: float, errors: Tensor, share: float) -> Tensor:
    """Mean divergence over DDPM's for errors in units of the noise, sigma / alpha, `(N,)`."""
    noise, high, low = GammaNoise(theta_0), SCHEDULE(float(t)), SCHEDULE(float(s))
    like = torch.empty(0, dtype=torch.float64)
    draw = noise.draw((400, 1), high, torch.Generator().manual_seed(0), like)
    scaled = errors * high.sigma / high.alpha
    eps, error = torch.broadcast_tensors(draw, scaled)
    nats = thinning_divergence(eps, error, noise, high, low, gaussian_share=share).mean(0)
    floor = thinning_divergence(eps, error * 0, noise, high, low, gaussian_share=share).mean(0)
    return (nats - floor) / ((low.snr - high.snr) / 2 * scaled.square())


def weights() -> None:
    """Print the ratio for errors below and above the image."""
    errors = torch.tensor([-0.5, -0.05, 0.05, 0.5], dtype=torch.float64)
    print("divergence over DDPM's; error of xhat in units of sigma / alpha")
    print("| theta_0 | from, to | K_s | -0.5 | -0.05 | 0.05 | 0.5 | 0.5, without the Gaussian |")
    print("|---" * 8 + "|")
    for theta_0 in THETAS:
        for t, s in STEPS:
            shape = float(GammaNoise(theta_0).concentration(SCHEDULE(float(s))))
            cells = [f"{v:.4g}" for v in ratio(theta_0, t, s, errors, SHARE).tolist()]
            pure = float(ratio(theta_0, t, s, errors[-1:], 0.0))
            print(f"| {theta_0} | {t}, {s} | {shape:.3g} | {' | '.join(cells)} | {pure:.3g} |")


def shapes() -> None:
    """Print what eq. 18 makes of the variance with doubling shapes, and where these end."""
    levels = doubling(SCHEDULE)
    print("\nvariance after one step from K_t = 2 K_s; wanted 1")
    print("| from | to | sigma 0 | sigma 0.5 | alpha_s / alpha_t |\n|---|---|---|---|---|")
    for i in (0, 5, 9, 13, 17, 21, 26):
        t, s = levels[i], levels[i + 1]
        high, low = SCHEDULE(t), SCHEDULE(s)
        cells = []
        for sigma in (0.0, 0.5, float(low.alpha / high.alpha)):
            sampler = replace(GammaReport(0.01), sigma=sigma)
            x = torch.zeros(100_000, 1, dtype=torch.float64)
            eps = sampler.noise.draw(x.shape, high, torch.Generator().manual_seed(0), x)
            z = sampler.step(Prediction(x, eps), high, low, torch.Generator().manual_seed(1))
            cells.append(f"{float((z / low.sigma).var()):.3f}")
        print(f"| {t:.1f} | {s:.1f} | {' | '.join(cells)} |")
    first = float(GammaNoise(0.001).concentration(SCHEDULE(1.0)))
    print(f"\nfrom K_1 = {first:.3g} (theta_0 = 0.001), one doubling a level:")
    for count in (28, 60, 127, 999):
        print(f"  level {count + 1}: K = {first * 2.0**count:.3g}")


def draw(path: Path) -> None:
    """The ratio against the error, a panel for each theta_0."""
    errors = torch.cat([-torch.logspace(0, -2, 60), torch.logspace(-2, 0, 60)]).double()
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for theta_0, axis in zip(THETAS, figure.subplots(1, 3, sharey=True), strict=True):
        for t, s in STEPS:
            values = ratio(theta_0, t, s, errors, SHARE)
            axis.plot(errors.numpy(), values.numpy(), label=f"{t} to {s}", linewidth=1.2)
        axis.axhline(1, color="k", linewidth=0.6)
        axis.set(title=f"theta_0 = {theta_0}", yscale="log", xlabel="(xhat - x) alpha / sigma")
        axis.grid(alpha=0.25)
    axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("divergence over DDPM's")
    figure.savefig(path, dpi=90)
    print(f"\nThe figure is in {path}")


def main() -> None:
    """Print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("figure", type=Path, nargs="?", help="PNG file to draw, if given")
    figure = parser.parse_args().figure
    weights()
    shapes()
    if figure is not None:
        draw(figure)


if __name__ == "__main__":
    main()
