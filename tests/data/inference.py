"""Loading data as commands do: inside Lightning's inference mode."""

from collections.abc import Callable

import torch

from ddim_pl.data.base import ImageDataModule


def check_loads_in_inference_mode(make: Callable[[], ImageDataModule]) -> None:
    """Both sets are those that are loaded outside, and hold nothing that is bound to the mode."""
    outside = ready(make())
    with torch.inference_mode():
        inside = ready(make())
    for expected, found in (
        (outside.train_set, inside.train_set),
        (outside.val_set, inside.val_set),
    ):
        everything = torch.arange(len(expected))
        images, labels = found.images(everything), found.labels(everything)
        torch.testing.assert_close(images, expected.images(everything), rtol=0, atol=0)
        assert torch.equal(labels, expected.labels(everything))
        held = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        assert not any(each.is_inference() for each in held)


def ready(data: ImageDataModule) -> ImageDataModule:
    data.prepare_data()
    data.setup("test")
    return data
