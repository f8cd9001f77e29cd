"""What is not finite spoils nothing."""

import copy
from unittest.mock import Mock

import pytest
import torch
import yaml
from ladders import ladder, same, save
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_trainer import trainer
from tiny import some_ddpm, tiny_config, tiny_ddpm

from ddim_pl.cli import main
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.training import DDPM
from ddim_pl.training.finite import NotFiniteError, _Flag
from ddim_pl.training.loading import load


class SpoiledDDPM(DDPM):
    """The loss of image 1 of these batches is NaN."""

    spoiled = ()

    def training_step(self, batch, batch_idx):
        if batch_idx in self.spoiled:
            self.kept = [*getattr(self, "kept", []), batch[0]]
        return super().training_step(batch, batch_idx)

    def loss(self, denoiser, batch, generators):
        losses = super().loss(denoiser, batch, generators)
        factor = torch.ones_like(losses)
        if any(batch[0] is images for images in getattr(self, "kept", [])):
            factor[1] = torch.nan
        return losses * factor


def module_of(spoiled, **arguments):
    plain = tiny_ddpm()
    module = SpoiledDDPM(plain.network, ema_decay=0.9, num_steps=5, warmup_steps=9, **arguments)
    module.spoiled = spoiled
    return module


def train(module, folder, *callbacks, **arguments):
    files = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, save_top_k=0)
    t = trainer(folder, callbacks=[*callbacks, files], max_steps=8, **arguments)
    t.fit(module, DigitsDataModule(batch_size=4, steps_per_epoch=50))
    return t


def fused(parameters):
    return torch.optim.Adam(parameters, lr=2e-4, fused=True)


@pytest.mark.parametrize("optimizer", [None, fused])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:optimizer is not stored")
def test_a_loss_that_is_nan_stops_before_the_update_and_says_where(
    tmp_path, accumulate, optimizer
):
    module = module_of([6], optimizer=optimizer)
    with pytest.raises(NotFiniteError) as error:
        train(module, tmp_path, accumulate_grad_batches=accumulate)
    last = tmp_path / "last.ckpt"
    message = str(error.value)
    image = int(module.trainer.train_dataloader.sampler.batch(6).indices[1])
    assert f"got nan or inf in update {6 // accumulate + 1}, " in message
    assert f"from image {image} of batch 6 at level " in message
    assert f"with rate {2e-4 * (6 // accumulate + 1) / 10:g}, " in message
    assert f"the last good checkpoint is {last}" in message
    assert all(value.isfinite().all() for value in module.state_dict().values())
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 6 // accumulate // 2 * 2
    if accumulate == 1:
        # The average has followed the unchanged weights once more before the host knew.
        weights = "network." if optimizer else ""
        states = (kept["state_dict"], module.state_dict())
        assert same(*({k: v for k, v in s.items() if k.startswith(weights)} for s in states))


@pytest.mark.filterwarnings("ignore:optimizer is not stored")
@pytest.mark.parametrize("last", [5, 7])
def test_a_fused_update_that_is_not_made_is_told_of_before_a_checkpoint_is_saved(tmp_path, last):
    """At update 6 a checkpoint is due; update 8 is the last."""
    module = module_of([last], optimizer=fused)
    with pytest.raises(
        NotFiniteError, match=f"got nan or inf in update {last + 1}, .* batch {last}"
    ):
        train(module, tmp_path)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == last - 1
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.filterwarnings("ignore:optimizer is not stored")
def test_after_an_update_that_was_not_made_the_module_can_train_again(tmp_path):
    module = module_of([2], optimizer=fused)
    with pytest.raises(NotFiniteError):
        train(module, tmp_path)
    copy.deepcopy(module)._update_check.finish(module)
    module.spoiled, module.kept = (), []
    assert train(module, tmp_path / "again").global_step == 8


class Spoil(Callback):
    """Gradients of which one is infinite, at this update."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 3:
            next(pl_module.network.parameters()).grad[0] = torch.inf


def test_gradients_that_are_infinite_stop_before_the_update(tmp_path):
    module = module_of([])
    with pytest.raises(NotFiniteError, match="in the gradients alone"):
        train(module, tmp_path, Spoil())
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.filterwarnings("ignore:.* 1 by now")
def test_single_bad_batches_can_be_left_out(tmp_path):
    module = module_of([2, 5], skip_bad_batches=1)
    with pytest.warns(UserWarning, match="left out, 2 by now"):
        t = train(module, tmp_path)
    assert t.global_step == 8
    assert t.callback_metrics["train/skipped_batches"] == 2
    assert module.average.n_averaged == 6
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert {int(each["step"]) for each in t.optimizers[0].state.values()} == {6}


@pytest.mark.filterwarnings("ignore:loss and gradients must be finite")
def test_bad_batches_in_a_row_stop_all_the_same(tmp_path):
    with pytest.raises(NotFiniteError, match="in update 4"):
        train(module_of([2, 3, 6], skip_bad_batches=1), tmp_path)


class Overflow(Callback):
    """An update that leaves a weight infinite, as a rate without bounds does."""

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        if trainer.global_step == 4:
            next(pl_module.network.parameters()).data[0] = torch.inf


def test_weights_that_are_infinite_are_not_saved(tmp_path):
    with pytest.raises(NotFiniteError, match=r"got nan or inf in network\."):
        train(module_of([]), tmp_path, Overflow())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


@pytest.mark.parametrize("is_cuda", [True, False])
def test_a_flag_is_copied_beside_the_host_only_where_its_copy_can_be_waited_for(
    is_cuda, monkeypatch
):
    """On Apple's devices, too, an Adam may be fused."""
    monkeypatch.setattr(torch.cuda, "Event", Mock())
    value = Mock(is_cuda=is_cuda, to=Mock(return_value=torch.tensor(True)))
    flag = _Flag(value)
    value.to.assert_called_once_with("cpu", non_blocking=is_cuda)
    assert flag.read() is True
    assert torch.cuda.Event.return_value.synchronize.call_count == is_cuda


@pytest.fixture
def spoiled(tmp_path):
    """A checkpoint of an earlier version, with NaN in its average."""
    path = tmp_path / "teacher.ckpt"
    save(some_ddpm(), path)
    checkpoint = torch.load(path, weights_only=True)
    name = next(n for n in checkpoint["state_dict"] if n.startswith("average.module."))
    checkpoint["state_dict"][name][0] = torch.nan
    torch.save(checkpoint, path)
    return str(path)


def test_a_teacher_that_is_nan_is_refused_when_it_is_loaded(spoiled):
    wanted = r"teacher.ckpt': the weights must be finite, got nan or inf in average\.module\."
    with pytest.raises(NotFiniteError, match=wanted):
        load(spoiled)
    with pytest.raises(NotFiniteError, match=wanted):
        ladder(spoiled)


def test_a_teacher_that_is_nan_makes_no_pairs(spoiled, tmp_path, capsys):
    checkpoint = torch.load(spoiled, weights_only=True)
    checkpoint["ddim_pl_config"] = yaml.safe_dump(tiny_config(tmp_path))
    torch.save(checkpoint, spoiled)
    pairs = ["--folder", str(tmp_path / "pairs"), "--num_pairs", "4"]
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "--ckpt_path", spoiled, *pairs])
    assert "error: the weights must be finite, got nan or inf in average." in str(stop.value.code)
    assert not list(tmp_path.glob("pairs/*"))
