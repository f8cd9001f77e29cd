"""The ten claims of the report that numbers can judge: where they stand, and what judges them."""

from claim_rules import Claim
from claims_of_sampling import (
    chains,
    diversity,
    few_steps,
    interpolation,
    one_latent,
    subsequences,
)
from claims_of_training import cost, gamma, ladder, one_step
from studies import Study


def _gamma_stages(study: Study) -> tuple[str, ...]:
    steps = tuple(f"gamma-{theta}-steps" for theta in study.thetas)
    return ("short-steps", *steps, "short-students", "gamma-students")


CLAIMS = {
    1: Claim(
        "Few steps",
        "section 1.3",
        "DDIM with 20 to 100 steps draws as well as DDPM with 1000, quality rises with the number "
        "of steps, and DDPM is by far the worst with 10 to 50.",
        ("etas", "whole"),
        few_steps,
        {"The same latents, a row for each cell": "etas/grids.png"},
    ),
    2: Claim(
        "One latent, many subsequences",
        "section 1.3",
        "Images of one latent by different subsequences have the same high-level features.",
        ("latents",),
        one_latent,
        {"The same latents, a row for each choice of levels": "latents/latents.png"},
    ),
    3: Claim(
        "Interpolation and reconstruction",
        "sections 1.3 and 2.2",
        "Interpolation between latents is meaningful in image space, and an image can be encoded "
        "into its latent and drawn again.",
        ("between", "reconstruct"),
        interpolation,
        {
            "Between two latents of a class": "reconstruct/interpolate/grid.png",
            "Images and their reconstructions": "reconstruct/grid.png",
        },
    ),
    4: Claim(
        "Where the steps are (Table 1)",
        "section 3.2",
        "Quadratic steps are best; of the report's own subsequences last100 is third of all, "
        "exponential fourth, first100last100 worst; an adaptive strategy could do better.",
        ("etas", "table1"),
        subsequences,
        {"The same latents, a row for each strategy": "table1/grids.png"},
    ),
    5: Claim(
        "The chain at once (DEQ-DDIM, Figure 1)",
        "section 1.4",
        "DEQ-DDIM draws DDIM's images faster than the sequential chain, and finds latents of "
        "images with less loss in less time.",
        ("deq", "invert"),
        chains,
    ),
    6: Claim(
        "One step from pairs (Luhman & Luhman)",
        "section 2.2",
        "A student of one step is 1000 times faster than DDPM and 100 times than its teacher of "
        "100 steps, of relatively good quality, and interpolates as its teacher.",
        ("students", "pair-teacher", "between-luhman", "cost"),
        one_step,
    ),
    7: Claim(
        "Progressive distillation (Salimans & Ho)",
        "section 2.2",
        "Halving the steps again and again keeps the quality down to 4 steps.",
        ("students",),
        ladder,
        {"The same latents, a row for each student": "students/grids.png"},
    ),
    8: Claim(
        "Diversity",
        "section 2.2",
        "Stochastic sampling increases the diversity of samples.",
        ("diversity", "etas"),
        diversity,
    ),
    9: Claim(
        "Gamma noise",
        "section 2.3",
        "DDIM can be derived for Gamma noise: its backward process, eq. 18, draws images, and "
        "models of such noise are as good as Gaussian ones and can be distilled.",
        _gamma_stages,
        gamma,
    ),
    10: Claim(
        "Cost",
        "sections 1.1, 1.3 and 2.2",
        "DDIM with 20 to 100 steps is 10 to 50 times faster than DDPM, the students as many times "
        "as they take fewer network evaluations.",
        ("cost",),
        cost,
    ),
}
