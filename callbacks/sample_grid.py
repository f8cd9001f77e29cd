"""A picture of the same latents at every validation, so that progress can be seen."""

from typing import cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from ddim_pl.checks import check_at_least
from ddim_pl.images import grid, to_uint8, write_png
from ddim_pl.loggers import log_image, run_folder
from ddim_pl.training import DiffusionModule


class SampleGrid(L.Callback):
    """Draw a grid with the averaged weights at each validation and at the end of `test`.

    Writes `samples/step-<updates>.png` (in `test` `samples/test.png`) into the run's folder, and
    hands it to the loggers as an image of that many updates, "samples" or "test/samples". The
    latents are those of the images 0, 1, 2, ... of the module's seed, at every validation. Only
    the first rank samples.

    Args:
        num_images: Images in the grid.
        columns: Images in a row; by default the grid is about square.
        min_side: Small images are enlarged until the picture is about this wide, in pixels.

    Raises:
        ValueError: If `num_images` or `columns` is less than 1.
    """

    def __init__(
        self, num_images: int = 64, *, columns: int | None = None, min_side: int = 512
    ) -> None:
        check_at_least(1, num_images=num_images, columns=columns)
        self.num_images = num_images
        self.columns = columns
        self.min_side = min_side

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, unless this is the check before training."""
        if not trainer.sanity_checking:
            name = f"step-{_updates(trainer, pl_module):07d}"
            self._write_grid(trainer, pl_module, name, "samples")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._write_grid(trainer, pl_module, "test", "test/samples")

    def _write_grid(
        self, trainer: L.Trainer, pl_module: L.LightningModule, name: str, tag: str
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        folder = run_folder(trainer)  # asked on every rank: it broadcasts
        if not trainer.is_global_zero:
            return
        with trainer.precision_plugin.forward_context():
            images = pl_module.sample(range(self.num_images))
        picture = grid(to_uint8(images).cpu(), columns=self.columns, min_side=self.min_side)
        file = folder / "samples" / f"{name}.png"
        write_png(picture, file)
        # TensorBoard drops what has a tag in common with a later image of fewer updates.
        log_image(trainer.loggers, tag, file, _updates(trainer, pl_module))


def _updates(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Updates that the network was trained with; a trainer counts its own, in fit alone."""
    if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is None:
        return trainer.global_step
    return cast(DiffusionModule, module).checkpoint_step
