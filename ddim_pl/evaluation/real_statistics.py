"""Statistics of the real images, kept on the disk for later runs.

A Fréchet distance needs the sums of the real images' features, not the features. They are the same
in every run on the same data, and with Inception and 50,000 images they take longer than many a
distance. A file of them is named by a digest of what they depend on, to the last bit: the images,
the extractor's weights, batch size, processes, device and the version of PyTorch. It also holds
the features of the first images, so that an extractor whose code has changed is noticed.

The first worker alone looks for the file, reads and writes it, and tells the others what it found.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save
from torch import Tensor

from ddim_pl.damage import DamagedError, read_tensors, seal_of
from ddim_pl.data.base import ImageDataModule
from ddim_pl.evaluation.worker import Worker
from ddim_pl.files import cache_folder, replacing

if TYPE_CHECKING:
    from ddim_pl.evaluation.measure import MeasureSettings

FORMAT = 1
"""Of the file; another one is another name."""

NUM_FIRST = 8
"""Images whose features are compared."""

TOLERANCE = 1e-3
"""Of these features, relative to the largest: a device may round them differently each time."""


class RealStatistics:
    """A file of the real images' sums, which may not exist yet; made on every worker.

    Args:
        worker: Says how the images are shared.
        settings: How they are measured.
        data: The real images.
    """

    def __init__(self, worker: Worker, settings: "MeasureSettings", data: ImageDataModule) -> None:
        self._worker = worker
        self._quality = settings.quality
        self._data = data
        self._batch_size = settings.batch_size
        self.path: Path | None = None
        """The file; None if nothing is kept, on every worker but the first as well."""
        if worker.is_first and settings.cache and self._quality.needs_sums_alone:
            self.path = self._place(settings.extractor)
        self._is_kept = worker.broadcast(self.path is not None)

    def load(self) -> bool:
        """Give what is kept to the metrics; whether there was something, the same everywhere.

        Warns of a file that is damaged or does not fit, as if there was none.
        """
        if not self._is_kept:
            return False
        sums = self._read() if self.path is not None else None
        found = self._worker.broadcast(sums is not None)
        if found:
            # The other workers add nothing to the sums of all.
            self._quality.set_real_sums(sums, self._data.num_reference)
        return found

    def save(self) -> None:
        """Keep the sums of all workers, if all images are in them.

        Warns if they cannot be written.
        """
        if not self._is_kept:
            return
        mine = self._quality.real_sums()
        sums = {name: self._worker.all_reduce(value) for name, value in mine.items()}
        if self.path is None or int(sums["count"]) != self._data.num_reference:
            return
        sums["first"] = self._first()
        try:
            with replacing(self.path) as part:
                part.write_bytes(save(sums, metadata=seal_of(sums)))
        except OSError as error:
            rank_zero_warn(
                f"the statistics of the real images cannot be kept in {self.path.parent} "
                f"({error.strerror}): set DDIM_PL_CACHE to a folder that can be written to, or "
                "`cache: false`"
            )

    def _place(self, extractor: str) -> Path | None:
        images = self._data.reference_digest()
        if images is None:
            return None
        device = self._worker.device
        on_gpu = device.type == "cuda"
        content = {
            "format": FORMAT,
            "images": images,
            "count": self._data.num_reference,
            "shape": self._data.shape,
            "extractor": extractor,
            "batch_size": self._batch_size,
            "workers": self._worker.world_size,
            "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
            "torch": torch.__version__,
        }
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        return cache_folder() / "real-statistics" / f"{name}.safetensors"

    def _read(self) -> dict[str, Tensor] | None:
        assert self.path is not None
        try:
            if not self.path.is_file():
                return None
        except OSError:  # such as a folder that may not be read: `save` says so
            return None
        try:
            sums = read_tensors(self.path, needs_seal=True)
            first = sums.pop("first")
            self._quality.check_real_sums(sums, self._data.num_reference)
        except (DamagedError, KeyError, ValueError) as error:
            rank_zero_warn(f"{error}: the statistics of the real images are made again")
            return None
        now = self._first()
        same = first.shape == now.shape
        # Not true for NaN either.
        if not (same and (first - now).abs().max() <= TOLERANCE * now.abs().max()):
            rank_zero_warn(
                f"{self.path} holds other features than those of the extractor "
                f"{self._quality.extractor.name!r}, whose code must have changed: the statistics "
                "of the real images are made again"
            )
            return None
        return sums

    def _first(self) -> Tensor:
        """Features of the first images, on the CPU."""
        images = next(self._data.reference_images(0, 1, self._batch_size))[:NUM_FIRST]
        return self._quality.features(images).cpu()
