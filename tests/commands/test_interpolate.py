"""`main.py interpolate`."""

from dataclasses import replace

import torch
from command_runs import close, trainer, with_classes
from tiny import some_ddpm

from ddim_pl.data.digits import DigitsDataModule, digits_arrays
from ddim_pl.images import from_uint8, read_png, to_uint8, write_png
from ddim_pl.inversion import reconstruct as reconstruction
from ddim_pl.inversion import slerp
from ddim_pl.noise import latents
from ddim_pl.samplers import DDIM


def rows_of(picture, rows, columns, side=8):
    """The images of a grid, `(rows, columns, H, W)`, made small again."""
    factor = max(1, 512 // (columns * side))
    gap = max(2, factor // 4)
    size = side * factor
    return torch.stack(
        [
            torch.stack(
                [
                    picture[0, gap + r * (size + gap) :, gap + c * (size + gap) :][
                        :size:factor, :size:factor
                    ]
                    for c in range(columns)
                ]
            )
            for r in range(rows)
        ]
    )


def test_a_row_between_latents_is_that_of_slerp(tmp_path):
    model = some_ddpm()
    trainer(tmp_path).interpolate(model, num_pairs=2, num_points=5)
    shown = rows_of(read_png(tmp_path / "interpolate" / "grid.png"), 2, 5)
    z, _ = latents(model.seed, [1, 3], model.image_shape)
    for point in range(5):
        between = slerp(z[:1], z[1:], point / 4)
        expected = to_uint8(model.sampler(model.denoiser, between, model.levels))[0, 0]
        assert close(shown[1, point], expected)
    ends = to_uint8(model.sample([1, 3]))[:, 0]
    assert close(shown[1, [0, -1]], ends)


def test_rows_between_images_end_in_their_reconstructions(tmp_path):
    model = with_classes(num_steps=6, sampler=DDIM(clip=True))  # it does not encode
    trainer(tmp_path).interpolate(
        model, DigitsDataModule(), from_data=True, num_pairs=3, num_points=4
    )
    shown = rows_of(read_png(tmp_path / "interpolate" / "grid.png"), 3, 4)
    images, labels = digits_arrays()
    for row in range(3):
        pair = torch.where(labels == row)[0][:2]
        denoiser = replace(model.conditioned(labels[pair]), clip=False)
        back = reconstruction(denoiser, from_uint8(images[pair]), model.levels)
        assert close(shown[row, [0, -1]], to_uint8(back)[:, 0])


def test_image_files_are_interpolated(tmp_path):
    images, _ = digits_arrays()
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, image in zip(files, images, strict=False):
        write_png(image, file)
    trainer(tmp_path).interpolate(with_classes(), images=list(map(str, files)), label=1)
    assert read_png(tmp_path / "interpolate" / "grid.png").shape[1] > 50
