"""The images of `predict`, as PNG files."""

from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ddim_pl.checks import check_at_least
from ddim_pl.evaluation.manifest import write_manifest
from ddim_pl.images import PngWriter, grid, read_png, to_uint8, write_png
from ddim_pl.loggers import log_image, run_folder
from ddim_pl.training import DiffusionModule


class ImageWriter(L.Callback):
    """Write each image of `predict` as `images/<index>.png`, and a grid of the first ones.

    Every rank writes its own images; the first rank then lays out `grid.png`, apart from them,
    which the loggers get as "predict/grid".
    `manifest.json` says how they were made.

    Args:
        folder: Where to write, without images of an earlier call; by default `predict` in the
            run's folder, from which those are removed.
        grid_images: Images in the grid at most.
        columns: Images in a row; by default the grid is about square.

    Raises:
        ValueError: If `grid_images` or `columns` is less than 1; when it writes, if `folder` holds
            images.
    """

    def __init__(
        self, folder: str | None = None, *, grid_images: int = 64, columns: int | None = None
    ) -> None:
        check_at_least(1, grid_images=grid_images, columns=columns)
        self.folder = folder
        self.grid_images = grid_images
        self.columns = columns
        self._writer: PngWriter | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, the same on every rank."""
        run = run_folder(trainer)
        self._folder = Path(self.folder) if self.folder else run / "predict"
        old = sorted(self._folder.glob("images/" + "[0-9]" * 6 + ".png"))
        if old and self.folder:  # every rank finds them, because none writes before the barrier
            raise ValueError(
                f"folder must be one without images of an earlier call, got {self.folder}, which "
                f"has images/{old[0].name}: give another, or remove them"
            )
        trainer.strategy.barrier("old images found")
        if trainer.is_global_zero and old:
            # The run's own folder holds one set of images.
            for file in old:
                file.unlink()
            rank_zero_info(f"{len(old)} images of an earlier call are removed from {run}")
        num_images = _count(trainer)  # on every rank: it reduces
        if trainer.is_global_zero:
            assert isinstance(pl_module, DiffusionModule)
            file, checkpoint = self._folder / "manifest.json", cast(str | None, trainer.ckpt_path)
            write_manifest(file, trainer, pl_module, checkpoint, num_images=num_images)
        trainer.strategy.barrier("old images removed")
        self._last_index = -1
        self._writer = PngWriter()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Have the batch written while the next one is sampled."""
        assert self._writer is not None
        self._last_index = max(self._last_index, *batch.tolist())
        for index, image in zip(batch.tolist(), to_uint8(outputs).cpu(), strict=True):
            self._writer.write(image, self._path(index))

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the grid, once all ranks have written."""
        assert self._writer is not None
        self._writer.close()
        last = int(trainer.strategy.reduce(torch.tensor(self._last_index), reduce_op="max"))
        trainer.strategy.barrier("images written")
        if not trainer.is_global_zero:
            return
        files = [self._path(index) for index in range(min(self.grid_images, last + 1))]
        images = [read_png(f) for f in files if f.exists()]
        if images:
            file, module = self._folder / "grid.png", cast(DiffusionModule, pl_module)
            write_png(grid(torch.stack(images), columns=self.columns), file)
            log_image(trainer.loggers, "predict/grid", file, module.checkpoint_step)
        rank_zero_info(f"Images are in {self._folder}")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave out the images that wait to be written."""
        if self._writer is not None:
            self._writer.abandon()

    def _path(self, index: int) -> Path:
        return self._folder / "images" / f"{index:06d}.png"


def _count(trainer: L.Trainer) -> int | None:
    """Images that all ranks will generate; None if a loader does not know its length."""
    loaders = trainer.predict_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    mine = 0
    for loader, limit in zip(loaders, trainer.num_predict_batches, strict=True):
        if limit == float("inf"):
            return None
        mine += sum(len(batch) for batch in islice(loader, int(limit)))
    total = torch.tensor(mine, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(total, reduce_op="sum"))
