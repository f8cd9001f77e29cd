"""The embedding of times against its formula."""

import torch

from ddim_pl.networks.sinusoid import sinusoidal_embedding


def test_sinusoid_is_sines_then_cosines_of_falling_frequency() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0, 250]), 6)
    angles = 250 * torch.tensor([1.0, 1e-2, 1e-4])
    expected = torch.stack(
        [torch.tensor([0.0, 0, 0, 1, 1, 1]), torch.cat([angles.sin(), angles.cos()])]
    )
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-4)  # float32 angles near 250
