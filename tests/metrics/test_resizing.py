import numpy as np
import torch
from PIL import Image

from ddim_pl.metrics.resizing import pil_bicubic, pil_bicubic_rounded


def cubic(x):
    """The kernel of bicubic interpolation with a = -1/2, which is PIL's."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(size, side):
    """Antialiased: the kernel is as wide as the output's pixels where these are larger."""
    scale = max(size / side, 1)
    centres = (np.arange(side) + 0.5) * size / side
    found = cubic((np.arange(size) + 0.5 - centres[:, None]) / scale)
    return found / found.sum(1, keepdims=True)


def test_bicubic_is_that_of_the_formula_up_and_down():
    images = torch.randint(0, 256, (2, 3, 20, 14), dtype=torch.uint8)
    for side in (9, 31):
        rows, columns = weights(20, side), weights(14, side)
        expected = np.einsum("ih,bchw,jw->bcij", rows, images.double().numpy(), columns)
        found = pil_bicubic(images, side)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected.clip(0, 255), atol=1e-3)
        assert side == 9 or (expected < 0).any()  # it is limited to the pixels' range


def test_the_rounded_one_is_that_of_a_picture():
    images = torch.randint(0, 256, (2, 3, 10, 12), dtype=torch.uint8)
    found = pil_bicubic_rounded(images, 8)
    picture = Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize((8, 8), Image.BICUBIC)
    assert np.array_equal(found[1].permute(1, 2, 0), np.array(picture))
    assert found.shape == (2, 3, 8, 8)
    assert found.dtype == torch.uint8
