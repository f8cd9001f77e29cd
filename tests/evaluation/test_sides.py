import numpy as np
import pytest
import torch
from PIL import Image

from ddim_pl.evaluation.sides import open_side
from ddim_pl.images import write_png


def picture(channels=3, height=6, width=4):
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)


def test_a_folder_gives_its_images_in_order_in_batches(tmp_path):
    images = [picture() for _ in range(5)]
    for index, image in enumerate(images):
        write_png(image, tmp_path / ("ab"[index > 2]) / f"{index}.png")
    side = open_side("a", str(tmp_path))
    assert (side.num_images, side.size) == (5, (6, 4))
    batches = list(side.batches(2, 3))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), torch.stack(images))
    known = {"source": str(tmp_path), "num_images": 5, "size": [6, 4], "channels": 3}
    assert side.record() == known


def test_a_side_is_gray_if_all_its_images_are(tmp_path):
    write_png(picture(1), tmp_path / "a.png")
    assert open_side("a", str(tmp_path)).record()["channels"] == 1
    write_png(picture(3), tmp_path / "b.png")
    assert open_side("a", str(tmp_path)).record()["channels"] == 3
    for channels in (1, 3):
        np.savez(tmp_path / "x.npz", np.zeros((2, 6, 4, channels), np.uint8))
        assert open_side("a", str(tmp_path / "x.npz")).record()["channels"] == channels


def test_grey_images_are_repeated_and_jpegs_are_upright(tmp_path):
    write_png(picture(1), tmp_path / "a.png")
    lying = Image.fromarray(picture(3, 4, 6).permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "b.jpg", exif=exif)
    (batch,) = open_side("a", str(tmp_path)).batches(9, 3)
    assert batch.shape == (2, 3, 6, 4)
    assert torch.equal(batch[0, 0], batch[0, 2])
    np.savez(tmp_path / "x.npz", np.zeros((2, 6, 4, 1), np.uint8))
    (batch,) = open_side("a", str(tmp_path / "x.npz")).batches(9, 3)
    assert batch.shape == (2, 3, 6, 4)


def test_a_reference_batch_has_images_and_statistics(tmp_path):
    images = np.zeros((2, 6, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    side = open_side("b", str(tmp_path / "x.npz"))
    assert side.num_images == 2
    assert side.statistics.mean.shape == (3,)
    assert side.record()["statistics"]["extractor"] == "not named in the file"


def test_bad_sides_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"a must be a folder of images, or an NPZ .*nowhere"):
        open_side("a", str(tmp_path / "nowhere"))
    write_png(picture(), tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"^a must .* got the single image .*give the folder"):
        open_side("a", str(tmp_path / "one.png"))
    torch.save({}, tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=r"^b must .*x.ckpt', an archive without arrays: .*sample"
    ):
        open_side("b", str(tmp_path / "x.ckpt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^a must hold images, got .*empty' without any"):
        open_side("a", str(tmp_path / "empty"))
    write_png(picture(), tmp_path / "mixed" / "0.png")
    write_png(picture(3, 6, 5), tmp_path / "mixed" / "1.png")
    with pytest.raises(ValueError, match=r"one size, got 4x6 pixels in .*0.png and 5x6 in .*1.p"):
        open_side("a", str(tmp_path / "mixed"))
    write_png(picture(), tmp_path / "broken" / "0.png")
    (tmp_path / "broken" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png cannot be read"):
        open_side("a", str(tmp_path / "broken"))
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"x.npz must hold mu and sigma, got mu: sigma missing"):
        open_side("a", str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"Python objects as 'arr_0'"):
        open_side("a", str(tmp_path / "x.npz"))
