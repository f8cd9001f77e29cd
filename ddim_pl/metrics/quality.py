"""Several numbers of one sample's quality from one pass over its images."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.distributed import gather_all_tensors

from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.manifold import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    density_coverage,
    nearest_radii,
    precision_recall,
)

NUMBERS = {
    "fd": ("fd",),
    "kid": ("kid", "kid_std"),
    "inception_score": ("score", "score_std"),
    "precision_recall": ("precision", "recall"),
    "density_coverage": ("density", "coverage"),
}
"""The metrics that `SampleQuality` knows, and the numbers that each gives."""

# Of Inception features, some numbers have a name of their own.
INCEPTION_KEYS = {"fd": "fid", "score": "inception_score", "score_std": "inception_score_std"}

# As in Binkowski et al. 2018, and in Salimans et al. 2016.
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10


class FeatureExtractor(Protocol):
    """A frozen module from uint8 images `(B, C, H, W)` to features `(B, num_features)`."""

    name: str
    num_features: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features of the images, float32."""


class ClassifyingExtractor(FeatureExtractor, Protocol):
    """A feature extractor that can also tell classes, which the Inception score needs."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and class logits `(B, num_classes)`, float32, of the same pass."""


class SampleQuality:
    """How near drawn images are to real ones, by any of several metrics of the same features.

    The extractor sees each image once, however many metrics are asked for. The metrics are

    - "fd", the Fréchet distance (Heusel et al. 2017), from running sums;
    - "kid", the unbiased squared MMD with the cubic kernel (Binkowski et al. 2018), which may be
      negative: its mean and deviation over subsets of 1000, or of all images if they are fewer;
    - "inception_score" (Salimans et al. 2016): its mean and deviation over ten parts of the drawn
      images; real ones play no part. It grows with the number of images;
    - "precision_recall" (Kynkäänniemi et al. 2019), with 3 neighbours;
    - "density_coverage" (Naeem et al. 2020), with 5 neighbours.

    Of Inception features the numbers are called "fid", "kid", "inception_score", "precision",
    "recall", "density" and "coverage"; of any other extractor "<name>_fd", "<name>_kid",
    "<name>_score" and so on, since the numbers of two extractors cannot be compared. Deviations
    end in "_std".

    "fd" keeps no features. "kid", "precision_recall" and "density_coverage" share what they keep,
    the features of both sides: 400 MB a side for 50,000 images and Inception, on each rank those
    of all; "kid" takes 800 MB a side more while it is computed. "inception_score" keeps the logits
    of the drawn images. In a distributed run all ranks must call `compute`; the numbers are those
    of one process if rank r of w has images r, r + w, ...

    Subsets and parts are random, the same ones every time. No global random state is touched.

    Args:
        extractor: A `FeatureExtractor`, and a `ClassifyingExtractor` for "inception_score".
        metrics: Names of metrics; see above.
        seed: Seed of what is random.

    Raises:
        ValueError: If a metric is unknown, there is none, or the extractor lacks the logits.
    """

    def __init__(
        self, extractor: nn.Module, metrics: Sequence[str] = ("fd",), *, seed: int = 0
    ) -> None:
        check_metrics(metrics)
        self.metrics = tuple(dict.fromkeys(metrics))
        self.seed = seed
        self.device = torch.device("cpu")
        self._module = extractor
        self.extractor = cast(ClassifyingExtractor, extractor)
        if "inception_score" in self.metrics and not hasattr(extractor, "features_and_logits"):
            raise ValueError(
                f"metrics has 'inception_score', which needs class logits: {self.extractor.name} "
                "features have none; leave it out, or give the extractor features_and_logits"
            )
        self._fd: FrechetInceptionDistance | None = None
        if "fd" in self.metrics:
            self._fd = FrechetInceptionDistance(
                _Given(self.extractor.num_features), reset_real_features=False, normalize=False
            )
        self._keeps = bool({"kid", "precision_recall", "density_coverage"} & set(self.metrics))
        self._real, self._fake, self._logits = _Rows(), _Rows(), _Rows()
        self._real_radii: dict[int, Tensor] = {}
        self._num_real = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the numbers that `compute` returns, those of the first metric first."""
        return tuple(self._key(number) for name in self.metrics for number in NUMBERS[name])

    @property
    def needs_real(self) -> bool:
        """Whether any of the metrics looks at real images."""
        return self.metrics != ("inception_score",)

    @property
    def num_real(self) -> int:
        """Real images that this process has seen."""
        return self._num_real

    def check_num_samples(self, num_samples: int) -> None:
        """See that so many drawn images, over all ranks, are enough.

        Warns where "fd" has no more images than features, and so is a rough guide.

        Raises:
            ValueError: If a metric cannot be computed of so few.
        """
        if "fd" in self.metrics and num_samples <= self.extractor.num_features:
            rank_zero_warn(
                f"{num_samples} samples give a singular covariance of "
                f"{self.extractor.num_features} features: take the distance as a rough guide"
            )
        least = PRECISION_NEIGHBOURS + 1 if "precision_recall" in self.metrics else 2
        if num_samples < least:
            raise ValueError(
                f"num_samples is {num_samples}; it must be at least {least} for "
                f"{', '.join(self.metrics)}"
            )

    def to(self, device: torch.device | str) -> Self:
        """Move the extractor and all that is kept; Apple's devices lack the float64 needed."""
        self.device = torch.device(device)
        self._module.to(self.device)
        if self._fd is not None:
            self._fd.to(self.device)
        for rows in (self._real, self._fake, self._logits):
            rows.to(self.device)
        self._real_radii = {k: radii.to(self.device) for k, radii in self._real_radii.items()}
        return self

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Take in uint8 images `(B, C, H, W)`, from any device, real or drawn."""
        if real and not self.needs_real:
            return
        images = images.to(self.device)
        if not real and "inception_score" in self.metrics:
            features, logits = self.extractor.features_and_logits(images)
            self._logits.add(logits)
        else:
            features = self.extractor(images)
        if self._fd is not None:
            self._fd.update(features, real=real)
        if self._keeps:
            (self._real if real else self._fake).add(features)
        if real:
            self._real_radii = {}
            self._num_real += len(images)

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of all ranks' images, float32 scalars, by the names in `keys`.

        Raises:
            RuntimeError: If there are not at least two images of each side that is needed.
            ValueError: If there are too few for one of the metrics.
        """
        compute = {
            "fd": self._frechet_distance,
            "kid": self._kid,
            "inception_score": self._inception_score,
            "precision_recall": self._precision_recall,
            "density_coverage": self._density_coverage,
        }
        values = [value for name in self.metrics for value in compute[name]()]
        return {key: value.float() for key, value in zip(self.keys, values, strict=True)}

    def reset_samples(self) -> None:
        """Forget the drawn images; what is known of the real ones stays."""
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
        # In float64, where the kernels' sums keep their digits and no GPU rounds products.
        real, fake = self._real.of_all_ranks().double(), self._fake.of_all_ranks().double()
        size = min(KID_SUBSET_SIZE, len(real), len(fake))
        with _quiet(), self._random():
            kid = KernelInceptionDistance(
                nn.Identity(), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
            )
            kid.update(real, real=True)
            kid.update(fake, real=False)
            return kid.compute()

    def _inception_score(self) -> tuple[Tensor, ...]:
        logits = self._logits.of_all_ranks().double()
        with _quiet(), self._random():
            score = InceptionScore(nn.Identity(), splits=SCORE_SPLITS, sync_on_compute=False)
            score.update(logits)
            return score.compute()

    def _precision_recall(self) -> tuple[Tensor, ...]:
        real, fake, k = self._real.of_all_ranks(), self._fake.of_all_ranks(), PRECISION_NEIGHBOURS
        return precision_recall(real, fake, k, real_radii=self._radii(k))

    def _density_coverage(self) -> tuple[Tensor, ...]:
        real, fake, k = self._real.of_all_ranks(), self._fake.of_all_ranks(), DENSITY_NEIGHBOURS
        return density_coverage(real, fake, k, real_radii=self._radii(k))

    def _radii(self, k: int) -> Tensor:
        if k not in self._real_radii:
            self._real_radii[k] = nearest_radii(self._real.of_all_ranks(), k)
        return self._real_radii[k]

    @contextmanager
    def _random(self) -> Iterator[None]:
        """Seed the generator that torchmetrics draws from, and put its state back afterwards."""
        # It is that of the CPU, on whatever device the features are. `torch.manual_seed` would
        # seed those of all devices.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            yield


def check_metrics(metrics: Sequence[str]) -> None:
    """See that the names are among the metrics that `SampleQuality` knows.

    Raises:
        ValueError: If one is not, or there is none.
    """
    unknown = [name for name in metrics if name not in NUMBERS]
    if unknown or not metrics:
        problem = f"has {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise ValueError(f"metrics {problem}; known are {', '.join(NUMBERS)}")


class _Given(nn.Module):
    """Features of features: themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Rows:
    """Batches `(B, D)` of rows, and those of all ranks once they are asked for."""

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
        """All rows, `(N, D)`; the first call after a change gathers them, so all ranks must."""
        if len(self._parts) != 1:
            self._parts = [torch.cat(self._parts or [torch.empty(0, 0, device=self._device)])]
        rows = self._parts[0]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self._gathered is None:
                self._gathered = _interleaved(gather_all_tensors(rows))
            rows = self._gathered
        if len(rows) < 2:
            raise RuntimeError("There are not yet two real and two drawn images; call update.")
        return rows


def _interleaved(shares: list[Tensor]) -> Tensor:
    """Rows in the order of one process, of which rank r of w has rows r, r + w, ..."""
    # A rank without images does not know how long a row is.
    shares = [share for share in shares if len(share)] or shares[:1]
    place = torch.cat([torch.arange(len(share), device=share.device) for share in shares])
    return torch.cat(shares)[place.argsort(stable=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Do without torchmetrics' warnings of kept features and of a rank without images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features in buffer")
        warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before")
        yield
