import io
import os
import threading

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from ddim_pl.images import NUM_WRITERS, PngWriter, read_png, write_png


def pictures(count, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, 9, 7), dtype=torch.uint8, generator=generator)


def write_all(images, folder):
    with PngWriter() as writer:
        for index, image in enumerate(images):
            writer.write(image, folder / f"{index}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_as_pil_writes_and_reads_them(tmp_path, channels):
    image = pictures(1, channels)[0].mT  # not contiguous
    write_png(image, tmp_path / "new" / "x.png")
    theirs = io.BytesIO()
    to_pil_image(image).save(theirs, format="png")
    with Image.open(theirs) as expected, Image.open(tmp_path / "new" / "x.png") as found:
        assert found.format == "PNG"
        assert (found.mode, found.size) == (expected.mode, expected.size)
        assert found.tobytes() == expected.tobytes()
    assert torch.equal(read_png(tmp_path / "new" / "x.png"), image)


def test_all_pictures_are_on_the_disk_at_the_end(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    images = pictures(100)
    write_all(images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 100
    assert len(synced) >= 100
    for index, image in enumerate(images):
        assert torch.equal(read_png(tmp_path / f"{index}.png"), image)


def test_writing_goes_on_beside_the_caller_but_not_far_behind(tmp_path, monkeypatch):
    go, waiting, written = threading.Event(), threading.Event(), []

    def slow(image, path):
        assert go.wait(60)
        written.append(path)

    monkeypatch.setattr("ddim_pl.images.write_png", slow)
    started = []

    def call():
        with PngWriter(2) as writer:
            for index, image in enumerate(pictures(40)):
                if index == 18:  # 2 threads, and 8 that wait for each
                    waiting.set()
                writer.write(image, tmp_path / f"{index}.png")
                started.append(index)

    caller = threading.Thread(target=call)
    caller.start()
    assert waiting.wait(60)
    assert len(started) == 18
    assert not written
    go.set()
    caller.join(60)
    assert len(written) == 40


@pytest.mark.parametrize("bad", [0, 50, 99])
def test_a_picture_that_cannot_be_written_is_the_callers_error(tmp_path, monkeypatch, bad):
    def full(image, path):
        if path.name == f"{bad}.png":
            raise OSError(28, "No space left on device", str(path))
        write_png(image, path)

    monkeypatch.setattr("ddim_pl.images.write_png", full)
    threads = threading.active_count()
    with pytest.raises(OSError, match=f"No space left on device.*{bad}.png"):
        write_all(pictures(100), tmp_path)
    assert threading.active_count() == threads
    assert all(path.suffix == ".png" for path in tmp_path.iterdir())  # whole or not at all


def test_an_error_of_the_caller_ends_the_threads_and_stays(tmp_path, monkeypatch):
    go = threading.Event()
    written = []

    def slow(image, path):
        assert go.wait(60)
        written.append(path)

    monkeypatch.setattr("ddim_pl.images.write_png", slow)
    timer = threading.Timer(0.2, go.set)

    def interrupted():
        with PngWriter() as writer:
            for index, image in enumerate(pictures(2 * NUM_WRITERS)):
                writer.write(image, tmp_path / f"{index}.png")
            timer.start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    timer.join()
    assert len(written) <= NUM_WRITERS
