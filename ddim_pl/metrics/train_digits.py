"""Train the digits feature extractor: `python -m ddim_pl.metrics.train_digits`.

It is trained on the 1,437 training images of `ddim_pl.data.digits.digits_split`, shifted by up to
one pixel and with a little noise, and evaluated on the 360 held out. This takes about a minute on
two cores. The same seed gives the same weights on one machine.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ddim_pl.data.digits import digits_arrays, digits_split
from ddim_pl.files import replacing
from ddim_pl.metrics.digits import WEIGHTS, DigitsClassifier, DigitsFeatures

NUM_STEPS = 3000
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
# Standard deviation, on images in [-1, 1]. More noise would make the features blind to the noise
# that a poor sampler leaves in its images.
NOISE = 0.04
LABEL_SMOOTHING = 0.05


def shifted(images: Tensor, generator: torch.Generator, by: int = 1) -> Tensor:
    """Return images (B, C, H, W), each shifted by up to `by` pixels both ways; zeros enter."""
    batch, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * by + 1, (2, batch, 1), generator=generator)
    padded = F.pad(images, (by, by, by, by))
    rows = torch.arange(height) + dy
    columns = torch.arange(width) + dx
    return padded[
        torch.arange(batch)[:, None, None, None],
        torch.arange(images.shape[1])[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def train(seed: int = 0, num_steps: int = NUM_STEPS) -> DigitsClassifier:
    """Return a classifier trained on the training digits for `num_steps` batches."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits_arrays()
    train_indices, _ = digits_split()
    # The initial weights come from torch's global random state, which is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsClassifier()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(num_steps, 2), pct_start=0.1
    )
    for _ in range(num_steps):
        picks = torch.randint(len(train_indices), (BATCH_SIZE,), generator=generator)
        chosen = train_indices[picks]
        x = shifted(images[chosen], generator).float() / 127.5 - 1
        x = x + NOISE * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(network(x), labels[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network


def heldout_accuracy(extractor: DigitsFeatures) -> float:
    """Return the share of the held-out digits that the extractor classifies correctly."""
    images, labels = digits_arrays()
    _, heldout = digits_split()
    correct = extractor.logits(images[heldout]).argmax(1) == labels[heldout]
    return correct.double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train, save, and print the held-out accuracy of the saved weights."""
    parser = argparse.ArgumentParser(
        description="Train the feature extractor of 8x8 digits.", allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="batches to train on")
    options = parser.parse_args(arguments)
    network = train(options.seed, options.steps)
    with replacing(options.output) as part:
        save_file(network.state_dict(), part)
    accuracy = heldout_accuracy(DigitsFeatures(options.output))
    print(f"{options.output}: held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
