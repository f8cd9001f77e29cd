"""What `reproduce.py` measures the report's claims on: a data set, its fits, and how much of each.

A study says which config each model is trained with, how many images are drawn, with which steps,
and why its numbers came out as they did. Stages and claims are functions of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

FIXED_POINT = "one sweep of Picard's iteration for each update, from ten sequential steps on"


@dataclass(frozen=True)
class Fit:
    """A training run.

    Args:
        config: File of its settings.
        options: What differs from the file, as arguments of `main.py fit`.
        teacher: The fit that it is distilled from, if it is.
        pairs: Whether it trains on pairs of the teacher, which need a folder.
        passes: Network passes of an image in an update, a backward pass counted as two.
    """

    config: str
    options: tuple[str, ...] = ()
    teacher: str | None = None
    pairs: bool = False
    passes: int = 3


LADDER = 5
"""Passes of an update of the ladder: two of the teacher, one forward and one backward."""


@dataclass(frozen=True)
class Study:
    """A data set, and what is measured on it.

    Args:
        name: Of the data, in titles and folders.
        fits: By role: "eps" (linear schedule, eps), "teacher" (of the students), "ladder",
            "luhman", "short" and "gamma-THETA" for each scale (fits of one length that differ in
            their noise), "short-ladder", "gamma-ladder".
        features: Class of the feature extractor.
        extractor: Its name, with which the columns of its metrics begin.
        passes: Network passes of an image in the training of "ladder" and "luhman", a backward
            pass counted as two.
        num_samples: Images of a measurement.
        root: Folder of the images, `$ROOT` on the page; empty if they are in a package.
        images: That each of the long fits sees, if it was asked for.
        seeds: By default.
        num_shown: Of these, images on a page.
        batch_size: Images at once.
        steps: Numbers of steps of the quadratic levels, the last one that of Table 1.
        full: Steps of the whole chain.
        adaptive_steps: Network evaluations that adaptive levels are searched for: those of the
            quadratic levels of the first and the last of `steps`, and of the exponential ones.
        num_latents: Latents that are drawn in many ways, and pairs that are interpolated.
        num_reconstructed: Images that are encoded and drawn again.
        reconstruct_steps: With how many steps.
        diverse_steps: Steps at which diversity is measured.
        num_halves: Half samples that give the scatter over images.
        teacher_steps: Steps of the distillation teacher; the first ones are its best.
        pair_steps: Steps of DPM-Solver++ that draw the pairs.
        thetas: Scales of the Gamma noise.
        gamma_steps: Steps of models of Gamma noise.
        deq_steps: Steps of chains that are solved at once.
        deq_batch: Images of those.
        invert_steps: Steps and seconds of inversions.
        invert_rates: Rates of Adam, of the sequential gradient and the fixed point's.
        num_inverted: Images of those.
        cost_images: Images whose time is taken.
        cost_rounds: Rounds of the methods, one after the other.
        published: Tables of papers that are shown beside the numbers, by claim.
        why: What the numbers mean, by claim.
    """

    name: str
    fits: Mapping[str, Fit]
    features: str
    extractor: str
    passes: Mapping[str, int]
    num_samples: int
    root: str = ""
    images: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 600
    num_shown: int = 10
    steps: tuple[int, ...] = (10, 20, 50, 100)
    full: int = 1000
    adaptive_steps: tuple[int, ...] = (10, 12, 96)
    num_latents: int = 200
    num_reconstructed: int = 64
    reconstruct_steps: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000)
    diverse_steps: int = 50
    num_halves: int = 20
    teacher_steps: tuple[int, ...] = (256, 32, 16, 8, 4, 2, 1)
    pair_steps: int = 20
    thetas: tuple[float, ...] = (0.001, 0.01, 0.1)
    gamma_steps: tuple[int, ...] = (10, 50)
    deq_steps: tuple[int, ...] = (10, 100)
    deq_batch: int = 16
    invert_steps: Mapping[int, float] = field(default_factory=lambda: {10: 15.0, 100: 60.0})
    invert_rates: Mapping[int, tuple[float, float]] = field(
        default_factory=lambda: {10: (0.1, 0.1), 100: (0.3, 0.1)}
    )
    num_inverted: int = 16
    cost_images: int = 16
    cost_rounds: int = 3
    published: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    why: Mapping[int, str] = field(default_factory=dict)


def _gamma(theta: float) -> tuple[str, ...]:
    return (f"--model.init_args.noise.init_args.theta_0={theta}", *THIRD)


THIRD = (
    "--trainer.max_epochs=2",
    "--model.init_args.lr_scheduler.init_args.total_iters=2000",
)
SHORT_LADDER = "--model.init_args.rounds=[[8,200],[4,200],[2,300],[1,300]]"

DIGITS = Study(
    name="digits",
    fits={
        "eps": Fit("configs/digits/ddpm_linear.yaml"),
        "teacher": Fit("configs/digits/teacher.yaml"),
        "ladder": Fit("configs/digits/progressive.yaml", teacher="teacher", passes=LADDER),
        # As many network passes as the ladder: 5,800 updates in place of 3,000.
        "luhman": Fit(
            "configs/digits/luhman.yaml",
            (
                "--data.init_args.steps_per_epoch=580",
                "--trainer.max_epochs=10",
                "--model.init_args.lr_scheduler.init_args.total_iters=5800",
            ),
            teacher="teacher",
            pairs=True,
        ),
        "short": Fit("configs/digits/teacher.yaml", THIRD),
        **{
            f"gamma-{theta}": Fit("configs/digits/gamma_ddpm.yaml", _gamma(theta))
            for theta in (0.001, 0.01, 0.1)
        },
        "short-ladder": Fit(
            "configs/digits/progressive.yaml", (SHORT_LADDER,), teacher="short", passes=LADDER
        ),
        "gamma-ladder": Fit(
            "configs/digits/gamma_progressive.yaml",
            (SHORT_LADDER,),
            teacher="gamma-0.1",
            passes=LADDER,
        ),
    },
    features="ddim_pl.metrics.digits.DigitsFeatures",
    extractor="digits",
    passes={"ladder": 4000 * 128 * LADDER, "luhman": 5800 * 128 * 3 + 16_000 * 20},
    num_samples=1797,
    why={
        1: "The noise of DDPM costs the most where steps are few: with 10 sigma-hat is far behind "
        "every eta. From 50 quadratic steps on all kinds of noise are within the scatter of the "
        "seeds, and noise does no harm: images of 64 pixels need fewer steps than the paper's.",
        3: "A mixture of two images of a class at a quarter is nearly the nearer of them, and a "
        "blurred digit of 64 pixels is still a digit, so that pixels mix as well as latents do. "
        "Look at the rows: mixtures of latents are whole digits.",
        4: "At level 100 a digit of 64 pixels is nearly decided, so that a leap from the noise to "
        "it leaves little to put right; and the leap of last100 begins where an error of eps "
        "counts 157 times in the image, that of first100last100 where it counts 61 times: see "
        "`docs/results/sampling.md`.",
        5: "A sweep evaluates all levels. Many devices do that at once; one thread takes as many "
        "times longer, so that fewer sweeps than steps save no time here. What the fixed point "
        "saves in an inversion is the backward pass through the chain: see "
        "`docs/results/deq.md`.",
        8: "Noise makes these images better, not more diverse: with eta precision and density "
        "rise and recall falls, as if each image were drawn nearer to where most of the data are. "
        "What rises of coverage is within its scatter.",
        9: "Eq. 18 keeps the mean of the Gamma law but not its variance: its derivation needs "
        "shapes that double from step to step, and equates variables that are equal in law alone. "
        "See `docs/gamma.md`; DDIM's own step and the quantile step have no such condition.",
    },
)

# ---- CIFAR-10 ---------------------------------------------------------------------------------

IMAGES_OF_AN_EPOCH = 64_000
"""In the `quick*.yaml` of configs/cifar10."""


def cifar10(root: str, images: int) -> Study:
    """CIFAR-10 by the small networks of configs/cifar10/quick*.yaml.

    Args:
        root: Folder of the training images, a subfolder for each class.
        images: That each of the two long fits sees; those of claim 9 see a quarter.
    """
    folder = ("--data=ImageFolderDataModule", f"--data.root={root}", "--data.image_size=32")
    of_pairs = tuple(option.replace("--data", "--data.images") for option in folder)
    long = (*folder, f"--trainer.max_epochs={max(1, images // IMAGES_OF_AN_EPOCH)}")
    short = (*folder, f"--trainer.max_epochs={max(1, images // 4 // IMAGES_OF_AN_EPOCH)}")
    teacher, ladder = ("configs/cifar10/quick.yaml", "configs/cifar10/quick_progressive.yaml")
    few = (*folder, "--model.init_args.rounds=[[8,250],[4,250],[2,500],[1,500]]")
    gamma = ("--model.noise=ddim_pl.noise.GammaNoise", "--model.sampler=null")
    # As many network passes as the ladder: 7,332 updates.
    pairs = (*of_pairs, "--data.init_args.steps_per_epoch=611", "--trainer.max_epochs=12")
    return Study(
        name="cifar10",
        root=root,
        images=images,
        seeds=(0,),
        fits={
            "eps": Fit("configs/cifar10/quick_ddpm.yaml", long),
            "teacher": Fit(teacher, long),
            "ladder": Fit(ladder, folder, teacher="teacher", passes=LADDER),
            "luhman": Fit("configs/cifar10/quick_luhman.yaml", pairs, "teacher", pairs=True),
            "short": Fit(teacher, short),
            **{
                f"gamma-{theta}": Fit(teacher, (*short, *gamma, f"--model.noise.theta_0={theta}"))
                for theta in (0.001, 0.01, 0.1)
            },
            "short-ladder": Fit(ladder, few, teacher="short", passes=LADDER),
            "gamma-ladder": Fit(ladder, few, teacher="gamma-0.1", passes=LADDER),
        },
        features="ddim_pl.metrics.cifar.CIFARFeatures",
        extractor="cifar",
        passes={"ladder": 6000 * 64 * LADDER, "luhman": 7332 * 64 * 3 + 32_000 * 16},
        num_samples=1000,
        batch_size=250,
        num_latents=100,
        num_reconstructed=32,
        teacher_steps=(64, 32, 16, 8, 4, 2, 1),
        pair_steps=16,
        deq_batch=4,
        invert_steps={10: 60.0, 100: 300.0},
        num_inverted=4,
        cost_images=4,
        # [DDIM], table 2, errors of each dimension scaled to [0, 1].
        published={
            3: {
                10: 0.014,
                20: 0.0065,
                50: 0.0023,
                100: 0.0009,
                200: 0.0004,
                500: 0.0001,
                1000: 0.0001,
            }
        },
    )


STUDIES = ("digits", "cifar10")
