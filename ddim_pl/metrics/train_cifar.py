"""Train the CIFAR-10 feature extractor: `python -m ddim_pl.metrics.train_cifar ROOT`.

ROOT is a folder of the training images with a subfolder for each class. Of each class every tenth
image is held out, and the others are shifted, mirrored and a little noisy. An hour on one core
that multiplies bfloat16; stopped, it goes on from its last epoch with the same command.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.files import replacing
from ddim_pl.metrics.cifar import NUM_CLASSES, WEIGHTS, CIFARClassifier, CIFARFeatures, folded
from ddim_pl.metrics.train_digits import shifted

NUM_EPOCHS = 40
BATCH_SIZE = 256
LEARNING_RATE = 0.2
WEIGHT_DECAY = 5e-4
# Standard deviation, on images in [-1, 1]: 1.3 of 255. More would make the features blind to the
# noise that a poor sampler leaves in its images.
NOISE = 0.01
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 3


def read_images(root: str) -> tuple[Tensor, Tensor]:
    """Return the images of a folder, uint8 (N, 3, 32, 32), and their classes, int64 (N,).

    Raises:
        ValueError: If it has not 10 subfolders of images of 32x32 pixels.
    """
    data = ImageFolderDataModule(root, 32, resize=False)
    data.setup("validate")
    found = data.train_set
    if found.num_classes != NUM_CLASSES:
        raise ValueError(
            f"root must have a subfolder for each of 10 classes, got {found.num_classes} classes "
            f"in {root!r}: give the folder that holds those of airplane, automobile and so on"
        )
    indices = torch.arange(len(found))
    return found.images(indices), found.labels(indices)


def cifar_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices, ascending, of training and held-out images: every tenth of a class.

    Args:
        labels: Classes of all images, (N,), in the order of their files.
    """
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    for number in range(NUM_CLASSES):
        heldout[(labels == number).nonzero()[9::10, 0]] = True
    return (~heldout).nonzero()[:, 0], heldout.nonzero()[:, 0]


class Training:
    """A classifier in training: its weights, optimiser and generator, as one state."""

    def __init__(self, num_steps: int, seed: int) -> None:
        # The initial weights come from torch's global random state, which is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = CIFARClassifier(norm=True)
        self.network = network.to(memory_format=torch.channels_last)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=LEARNING_RATE,
            momentum=0.9,
            weight_decay=WEIGHT_DECAY,
            nesterov=True,
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=max(num_steps, 2), pct_start=0.2
        )

    def epoch(self, images: Tensor, labels: Tensor) -> float:
        """Train on all images once, but for a batch that is not full; return the mean loss."""
        self.network.train()
        order = torch.randperm(len(images), generator=self.generator)
        total = 0.0
        batches = [b for b in order.split(BATCH_SIZE) if len(b) == BATCH_SIZE] or [order]
        for chosen in batches:
            loss = self._loss(images[chosen], labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            total += loss.item()
        return total / len(batches)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        x = shifted(images.float() / 127.5 - 1, self.generator, by=MAX_SHIFT)
        mirrored = torch.rand(len(x), 1, 1, 1, generator=self.generator) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)
        x = x + NOISE * torch.randn(x.shape, generator=self.generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])


def train(
    images: Tensor, labels: Tensor, *, num_epochs: int, seed: int = 0, kept: Path | None = None
) -> CIFARClassifier:
    """Return a trained classifier, without batch normalisation.

    Args:
        images: uint8 (N, 3, 32, 32).
        labels: int64 (N,).
        num_epochs: How often each image is seen.
        seed: Of initial weights, order and augmentation.
        kept: File of the state after each epoch, which is gone on from if it is there.
    """
    run = Training(num_epochs * max(1, len(images) // BATCH_SIZE), seed)
    begin = 0
    if kept is not None and kept.exists():
        state = torch.load(kept, weights_only=True)
        begin = state.pop("epochs")
        run.load(state)
    for epoch in range(begin, num_epochs):
        loss = run.epoch(images, labels)
        print(f"epoch {epoch + 1} of {num_epochs}: loss {loss:.4f}", flush=True)
        if kept is not None:
            with replacing(kept) as part:
                torch.save({**run.state(), "epochs": epoch + 1}, part)
    return folded(run.network)


def accuracy_on(extractor: CIFARFeatures, images: Tensor, labels: Tensor) -> float:
    """Return the share of images, uint8 (N, 3, 32, 32), that are classified correctly."""
    found = torch.cat([extractor.logits(part).argmax(1) for part in images.split(500)])
    return (found == labels).double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train, save in half precision, and print the held-out accuracy of the saved weights."""
    parser = argparse.ArgumentParser(
        description="Train the feature extractor of CIFAR-10.", allow_abbrev=False
    )
    parser.add_argument("root", help="folder of training images, a subfolder for each class")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=NUM_EPOCHS)
    options = parser.parse_args(arguments)
    images, labels = read_images(options.root)
    chosen, heldout = cifar_split(labels)
    kept = options.output.with_suffix(".state")
    network = train(
        images[chosen], labels[chosen], num_epochs=options.epochs, seed=options.seed, kept=kept
    )
    with replacing(options.output) as part:
        state = network.state_dict()
        save_file({name: value.half().contiguous() for name, value in state.items()}, part)
    kept.unlink()
    accuracy = accuracy_on(CIFARFeatures(options.output), images[heldout], labels[heldout])
    print(f"{options.output}: held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
