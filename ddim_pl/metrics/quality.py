"""Several metrics of sample quality from one pass over the images."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd
from torchmetrics.utilities.distributed import gather_all_tensors

from ddim_pl.metrics.frechet import FrechetDistanceSums
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.manifold import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    density_coverage,
    nearest_radii,
    precision_recall,
)
from ddim_pl.metrics.precision import full_float32

NUMBERS = {
    "fd": ("fd",),
    "kid": ("kid", "kid_std"),
    "inception_score": ("score", "score_std"),
    "precision_recall": ("precision", "recall"),
    "density_coverage": ("density", "coverage"),
}
"""The metrics that `SampleQuality` knows, and the numbers that each gives."""

OF_FEATURES = ("kid", "precision_recall", "density_coverage")
"""Those that compare single features, for which statistics are not enough."""

# Some numbers of Inception features have established names.
INCEPTION_KEYS = {"fd": "fid", "score": "inception_score", "score_std": "inception_score_std"}

# As in [KID], and in [IS].
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10


class FeatureExtractor(Protocol):
    """A frozen module from uint8 images `(B, C, H, W)` to features `(B, num_features)`."""

    name: str
    num_features: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of the images, float32."""


class ClassifyingExtractor(FeatureExtractor, Protocol):
    """A feature extractor with class logits, which the Inception score needs."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and class logits `(B, num_classes)`, float32."""


class SampleQuality:
    """Distances and other metrics of generated images, all from the same features.

    The extractor sees each image once. The metrics are

    - "fd", the Fréchet distance ([FID]), from running sums;
    - "kid", the unbiased squared MMD with the cubic kernel ([KID]), which may be negative: mean
      and standard deviation over 100 subsets of 1000 images, or of all if there are fewer. Where
      every subset would be all images of both sides there is one, and no deviation;
    - "inception_score" ([IS]): mean and standard deviation over ten splits of the generated
      images. It uses no real images and grows with the number of images;
    - "precision_recall" ([PR]), with 3 neighbours;
    - "density_coverage" ([DC]), with 5 neighbours.

    With Inception features the numbers are called "fid", "kid", "inception_score", "precision",
    "recall", "density" and "coverage". Numbers of different extractors cannot be compared, so with
    another extractor they are called "<name>_fd", "<name>_kid", "<name>_score" and so on. Standard
    deviations end in "_std".

    Memory: "fd" stores no features. "kid", "precision_recall" and "density_coverage" share the
    stored features of both sides, on each rank those of all ranks: 400 MB a side for 50,000 images
    and Inception. "kid" takes 100 MB more, for its subsets. "inception_score" stores logits.

    In a distributed run all ranks must call `compute`. The numbers are those of one process if
    rank r of w has images r, r + w, ... Subsets and splits depend on `seed` only; the global
    random state is neither used nor changed.

    Args:
        extractor: A `FeatureExtractor`, and a `ClassifyingExtractor` for "inception_score".
        metrics: Names of metrics, see above.
        seed: Seed of subsets and splits.

    Raises:
        ValueError: If a metric is unknown, there is none, the extractor is none, or it has no
            logits.
    """

    def __init__(
        self, extractor: nn.Module, metrics: Sequence[str] = ("fd",), *, seed: int = 0
    ) -> None:
        check_metrics(metrics)
        _check_extractor(extractor)
        self.metrics = tuple(dict.fromkeys(metrics))
        self.seed = seed
        self.device = torch.device("cpu")
        self._module = extractor
        self.extractor = cast(ClassifyingExtractor, extractor)
        if "inception_score" in self.metrics and not hasattr(extractor, "features_and_logits"):
            raise ValueError(
                "metrics must not have 'inception_score' without class logits, got the extractor "
                f"{self.extractor.name!r}: leave it out, or give the extractor features_and_logits"
            )
        self._fd: FrechetDistanceSums | None = None
        if "fd" in self.metrics:
            given = nn.Identity()  # `update` gets features
            given.num_features = torch.tensor(self.extractor.num_features)
            self._fd = FrechetDistanceSums(given, reset_real_features=False)
        self._keeps = bool(set(OF_FEATURES) & set(self.metrics))
        self._real, self._fake, self._logits = _Rows(), _Rows(), _Rows()
        self._real_radii: dict[int, Tensor] = {}
        self.num_real = 0
        """Number of real images that this process has seen, or of all if their sums were given."""
        self.kid_subsets: tuple[int, int] | None = None
        """Number and size of the subsets of the newest "kid"."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the numbers that `compute` can return, in the order of the metrics."""
        return tuple(self._key(number) for name in self.metrics for number in NUMBERS[name])

    @property
    def needs_real(self) -> bool:
        """Whether any of the metrics uses real images."""
        return self.metrics != ("inception_score",)

    def check_num_samples(self, num_samples: int, name: str = "num_samples") -> None:
        """Check the number of generated images over all ranks.

        Args:
            num_samples: The number.
            name: What it is called, for the error.

        Raises:
            ValueError: If the number is too small for a metric.
        """
        least = PRECISION_NEIGHBOURS + 1 if "precision_recall" in self.metrics else 2
        if "inception_score" in self.metrics:  # a split of one image always has score 1
            least = max(least, 2 * SCORE_SPLITS)
        if num_samples < least:
            raise ValueError(
                f"{name} must be at least {least} for {', '.join(self.metrics)}, got "
                f"{num_samples}: give more, or leave metrics out"
            )

    def check_num_real(self, num_real: int, name: str = "the number of real images") -> None:
        """Check the number of real images over all ranks.

        Args:
            num_real: The number.
            name: What it is called, for the error.

        Raises:
            ValueError: If the number is too small for a metric.
        """
        needed = {"precision_recall": PRECISION_NEIGHBOURS, "density_coverage": DENSITY_NEIGHBOURS}
        least = 1 + max(needed.get(name, 1) for name in self.metrics)
        if self.needs_real and num_real < least:
            raise ValueError(
                f"{name} must be at least {least} for {', '.join(self.metrics)}, got {num_real}: "
                "give more, or leave metrics out"
            )

    def warn_of_few(self, num_samples: int | None = None, num_real: int | None = None) -> None:
        """Warn if "fd" has no more images of a side than features, once all else is checked.

        Args:
            num_samples: Number of generated images; None if there is nothing to say of them.
            num_real: Number of real images, likewise.
        """
        for count, what in ((num_samples, "samples"), (num_real, "real images")):
            if "fd" in self.metrics and count and count <= self.extractor.num_features:
                rank_zero_warn(
                    f"{count} {what} give a singular covariance of "
                    f"{self.extractor.num_features} features: take the distance as a rough guide"
                )

    @torch.no_grad()
    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Try the extractor on two black images `(C, H, W)`.

        Raises:
            ValueError: If it does not take such images, or does not give what it says.
        """
        black = torch.zeros(2, *shape, dtype=torch.uint8, device=self.device)
        try:
            if "inception_score" in self.metrics:
                features, _ = self.extractor.features_and_logits(black)
            else:
                features = self.extractor(black)
            found = tuple(features.shape)
        except Exception as error:  # whatever the user's extractor raises
            raise ValueError(
                f"features must take uint8 images (B, {', '.join(map(str, shape))}) of the data, "
                f"got the extractor {self.extractor.name!r} that fails on them "
                f"({type(error).__name__}: {error}): give another"
            ) from error
        if found != (2, self.extractor.num_features):
            raise ValueError(
                f"features must have shape (B, num_features), here (2, "
                f"{self.extractor.num_features}), got {found} from the extractor "
                f"{self.extractor.name!r}: correct its num_features or its output"
            )

    def to(self, device: torch.device | str) -> Self:
        """Move the extractor and all state, to a device with float64 (not Apple's MPS)."""
        self.device = torch.device(device)
        self._module.to(self.device)
        if self._fd is not None:
            self._fd.to(self.device)
        for rows in (self._real, self._fake, self._logits):
            rows.to(self.device)
        self._real_radii = {k: radii.to(self.device) for k, radii in self._real_radii.items()}
        return self

    @property
    def needs_sums_alone(self) -> bool:
        """Whether sums are all that is used of the real images, see `real_sums`."""
        return self._fd is not None and not self._keeps

    def real_sums(self) -> dict[str, Tensor]:
        """What "fd" uses of the real images that this process has seen, to be kept.

        Returns:
            "sum" of the features `(D,)` and "outer" of their outer products `(D, D)`, float64; and
            their "count", int64.
        """
        assert self._fd is not None
        return {
            "sum": self._fd.real_features_sum,
            "outer": self._fd.real_features_cov_sum,
            "count": self._fd.real_features_num_samples,
        }

    def check_real_sums(self, sums: Mapping[str, Tensor], num_real: int) -> None:
        """Check that kept sums are of this extractor and this number of images.

        Raises:
            ValueError: If not.
        """
        for name, mine in self.real_sums().items():
            found = sums.get(name)
            if found is None or (found.dtype, found.shape) != (mine.dtype, mine.shape):
                raise ValueError(f"sums must hold {name} {mine.dtype} {tuple(mine.shape)}")
        if int(sums["count"]) != num_real:
            raise ValueError(f"sums must be of {num_real} images, got {int(sums['count'])}")

    def set_real_sums(self, sums: Mapping[str, Tensor] | None, num_real: int) -> None:
        """Take sums of real images in place of the images; nothing may have been added.

        Args:
            sums: As `real_sums` gives them, summed over the processes; None on all but one.
            num_real: Number of these images.
        """
        assert self._fd is not None
        assert self.num_real == 0
        self._fd.forget_root()
        for name, mine in self.real_sums().items():
            if sums is not None:
                mine.copy_(sums[name])
        self.num_real = num_real

    def set_moments(self, mean: Tensor, covariance: Tensor, *, real: bool) -> None:
        """Take statistics of a side for "fd" in place of those of its images.

        Args:
            mean: Of the features, `(D,)`, float64.
            covariance: `(D, D)`, float64.
            real: Which side.
        """
        assert self._fd is not None
        self._fd.give(mean, covariance, real=real)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The extractor's features of uint8 images `(B, C, H, W)` from any device, `(B, D)`.

        They are computed in float32, whatever PyTorch's switches for TF32 say.
        """
        with full_float32():
            return self.extractor(images.to(self.device))

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add uint8 images `(B, C, H, W)`, from any device, real or generated."""
        if real and not self.needs_real:
            return
        if not real and "inception_score" in self.metrics:
            with full_float32():
                features, logits = self.extractor.features_and_logits(images.to(self.device))
            self._logits.add(logits)
        else:
            features = self.features(images)
        if self._fd is not None:
            self._fd.update(features, real=real)
        if self._keeps:
            (self._real if real else self._fake).add(features)
        if real:
            if self._fd is not None:
                self._fd.forget_root()
            self._real_radii = {}
            self.num_real += len(images)

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of all ranks' images, float32 scalars, by the names in `keys`.

        The deviation of "kid" is left out where there is a single subset.

        Raises:
            RuntimeError: If a side that is needed has fewer than two images.
            ValueError: If there are too few images for one of the metrics.
        """
        compute: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "fd": self._frechet_distance,
            "kid": self._kid,
            "inception_score": self._inception_score,
            "precision_recall": partial(self._with_radii, precision_recall, PRECISION_NEIGHBOURS),
            "density_coverage": partial(self._with_radii, density_coverage, DENSITY_NEIGHBOURS),
        }
        values = [value for name in self.metrics for value in compute[name]()]
        found = {key: value.float() for key, value in zip(self.keys, values, strict=True)}
        if "kid" in self.metrics and self.kid_subsets is not None and self.kid_subsets[0] == 1:
            del found[self._key("kid_std")]
        return found

    def reset_samples(self) -> None:
        """Remove the generated images; the statistics of the real ones stay."""
        self._fake.clear()
        self._logits.clear()
        if self._fd is not None:
            self._fd.reset()

    def _key(self, number: str) -> str:
        if self.extractor.name == InceptionFeatures.name:
            return INCEPTION_KEYS.get(number, number)
        return f"{self.extractor.name}_{number}"

    def _frechet_distance(self) -> tuple[Tensor, ...]:
        assert self._fd is not None
        with _quiet():
            return (self._fd.compute(),)

    def _kid(self) -> tuple[Tensor, ...]:
        real, fake = self._real.of_all_ranks(), self._fake.of_all_ranks()
        size = min(KID_SUBSET_SIZE, len(real), len(fake))
        count = 1 if size == len(real) == len(fake) else KID_SUBSETS
        self.kid_subsets = count, size
        with self._random():
            kids = torch.stack(
                [poly_mmd(_subset(real, size), _subset(fake, size)) for _ in range(count)]
            )
        return kids.mean(), kids.std(unbiased=False)

    def _inception_score(self) -> tuple[Tensor, ...]:
        logits = self._logits.of_all_ranks().double()
        with _quiet(), self._random():
            score = InceptionScore(nn.Identity(), splits=SCORE_SPLITS, sync_on_compute=False)
            score.update(logits)
            return score.compute()

    def _with_radii(self, metric: Callable[..., tuple[Tensor, ...]], k: int) -> tuple[Tensor, ...]:
        real, fake = self._real.of_all_ranks(), self._fake.of_all_ranks()
        if k not in self._real_radii:
            self._real_radii[k] = nearest_radii(real, k)
        return metric(real, fake, k, real_radii=self._real_radii[k])

    @contextmanager
    def _random(self) -> Iterator[None]:
        """Seed the generator that torchmetrics uses, and restore its state afterwards."""
        # It is the CPU's, whatever the device of the features. `torch.manual_seed` would seed
        # those of all devices.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            yield


def check_metrics(metrics: Sequence[str]) -> None:
    """Check that there are metrics and that `SampleQuality` knows all of them.

    Raises:
        ValueError: If one is unknown, or there is none.
    """
    unknown = [name for name in metrics if name not in NUMBERS]
    if unknown or not metrics:
        got = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"metrics must be one or more of {', '.join(NUMBERS)}, got {got}")


def _check_extractor(extractor: nn.Module) -> None:
    name, width = (getattr(extractor, each, None) for each in ("name", "num_features"))
    if not (isinstance(name, str) and isinstance(width, int) and width > 0):
        raise ValueError(
            "features must make a feature extractor with a text `name` and a whole number "
            f"`num_features`, got {type(extractor).__name__} with {name!r} and {width!r}: add "
            "them, see ddim_pl.metrics.quality.FeatureExtractor"
        )


def _subset(features: Tensor, size: int) -> Tensor:
    """Some of the features `(size, D)`, drawn with the global generator.

    In float64, since the kernels' sums cancel; of these alone, since all would take gigabytes.
    """
    return features[torch.randperm(len(features))[:size]].double()


class _Rows:
    """Batches `(B, D)` of rows, gathered from all ranks on demand."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._parts: list[Tensor] = []
        self._gathered: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        self._parts.append(rows)
        self._gathered = None

    def clear(self) -> None:
        self._parts, self._gathered = [], None

    def to(self, device: torch.device) -> None:
        self._device = device
        self._parts = [part.to(device) for part in self._parts]
        self._gathered = None if self._gathered is None else self._gathered.to(device)

    def of_all_ranks(self) -> Tensor:
        """Return all rows, `(N, D)`; a collective call if the rows have changed."""
        if len(self._parts) != 1:
            self._parts = [torch.cat(self._parts or [torch.empty(0, 0, device=self._device)])]
        rows = self._parts[0]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self._gathered is None:
                self._gathered = _interleaved(gather_all_tensors(rows))
            rows = self._gathered
        if len(rows) < 2:
            raise RuntimeError(
                f"each side must have at least two images, got {len(rows)}: call update first"
            )
        return rows


def _interleaved(shares: list[Tensor]) -> Tensor:
    """Return the rows in the order of one process, where rank r of w has rows r, r + w, ..."""
    # A rank without images does not know the width of a row.
    shares = [share for share in shares if len(share)] or shares[:1]
    place = torch.cat([torch.arange(len(share), device=share.device) for share in shares])
    return torch.cat(shares)[place.argsort(stable=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torchmetrics' warnings of stored features and of a rank without images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features in buffer")
        warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before")
        yield
