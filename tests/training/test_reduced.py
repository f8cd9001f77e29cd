"""Drawing with a bfloat16 copy of the network, and teaching with one."""

import copy

import pytest
import torch
from ladders import clone, fit, ladder, same
from lightning.pytorch.callbacks import ModelCheckpoint
from luhman_runs import student
from tiny import some_ddpm

from ddim_pl.rng import step_generators
from ddim_pl.schedules import CosineLogSNRSchedule
from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.fingerprint import fingerprint
from ddim_pl.training.reduced import ReducedCopy

TEACHER = {
    "schedule": CosineLogSNRSchedule(),
    "prediction": "v",
    "loss_weight": "snr_plus_one",
    "time_input": "log_snr",
    "clip": False,
}


def test_the_copy_follows_the_weights_and_is_made_once():
    module = some_ddpm()
    network, reduced = module.average.module, ReducedCopy()
    first = reduced.of(network)
    assert reduced.of(network) is first
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert first.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not first.training
    before = first.conv_in.weight.clone()
    module.average.update_parameters(module.network)
    assert reduced.of(network) is first
    assert not torch.equal(first.conv_in.weight, before)
    torch.testing.assert_close(
        reduced.of(network).conv_in.weight.float(), network.conv_in.weight, rtol=8e-3, atol=1e-6
    )
    loaded = some_ddpm(seed=1)
    module.load_state_dict(loaded.state_dict())
    assert torch.equal(
        reduced.of(network).conv_out.bias, loaded.average.module.conv_out.bias.bfloat16()
    )


def test_images_are_those_of_full_precision_to_that_of_bfloat16():
    settings = {"prediction": "v", "loss_weight": "snr_plus_one", "num_steps": 3}
    module, same = some_ddpm(**settings), some_ddpm(**settings, sampling_precision="bf16")
    same.load_state_dict(module.state_dict())
    exact, drawn = module.sample(range(4)), same.sample(range(4))
    assert drawn.dtype == torch.float32
    error = (drawn - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.05
    assert torch.equal(same.denoiser.network.conv_in.weight, module.average.module.conv_in.weight)


def test_the_copy_is_in_no_checkpoint_and_in_no_deep_copy():
    module = some_ddpm(sampling_precision="bf16")
    before = set(module.state_dict())
    module.sample(range(2))
    assert set(module.state_dict()) == before
    other = copy.deepcopy(module)
    other.average.module.conv_out.bias.data.fill_(3.0)
    assert not torch.equal(other.sample(range(2)), module.sample(range(2)))
    assert module.hparams["sampling_precision"] == "bf16"


def test_gradients_pass_through_a_copy_made_in_inference_mode():
    module, reduced = some_ddpm(), ReducedCopy()
    with torch.inference_mode():
        network = reduced.of(module.average.module)
    z = torch.randn(2, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    network(z, torch.tensor([1.0, 2.0])).square().sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


def test_a_network_that_was_made_in_inference_mode_is_followed():
    """Its tensors do not say that they have changed: students of `compare` are such."""
    with torch.inference_mode():
        network, reduced = some_ddpm().average.module, ReducedCopy()
        bias = network.conv_out.bias
        assert bias.is_inference()
        first = reduced.of(network)
        bias.fill_(3.0)
        assert reduced.of(network) is first
        assert (first.conv_out.bias == 3).all()
    assert not first.conv_out.bias.is_inference()


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match=r"sampling_precision must be one of \(32, 'bf16'\)"):
        some_ddpm(sampling_precision=16)


def test_what_was_drawn_with_it_has_a_name_of_its_own():
    """Pairs and finished cells of another precision are not taken for these."""
    module, same = some_ddpm(), some_ddpm(sampling_precision="bf16")
    same.load_state_dict(module.state_dict())
    assert fingerprint(module) != fingerprint(same)
    assert averaged_checkpoint(same)["hyper_parameters"]["sampling_precision"] == "bf16"


def test_the_copy_of_a_compiled_network_is_compiled():
    network, reduced = some_ddpm().average.module, ReducedCopy()
    assert reduced.of(network)._compiled_call_impl is None
    network.compile(backend="eager")
    assert reduced.of(network)._compiled_call_impl is not None


# ---- the teacher of a ladder ------------------------------------------------------------------


def losses(module):
    """Losses of a ladder's student with the same noise every time, `(8,)`."""
    x = torch.linspace(-1, 1, 8 * 64).reshape(8, 1, 8, 8)
    with torch.no_grad():
        return module.loss(module._denoiser(module.network), (x,), step_generators(0, x.device))


def by_hand(module):
    """The same losses, the teacher a bfloat16 copy that is made here."""
    slow = copy.deepcopy(module)
    slow.teacher_precision = 32
    slow.teacher = slow.teacher.to(torch.bfloat16, memory_format=torch.channels_last)
    return losses(slow)


@pytest.mark.parametrize("conversion_updates", [0, 2])
def test_a_reduced_teacher_is_a_bfloat16_copy_and_teaches_about_the_same(
    teacher, conversion_updates
):
    module = ladder(teacher, conversion_updates=conversion_updates, teacher_precision="bf16")
    full = ladder(teacher, conversion_updates=conversion_updates)
    assert full.teacher_precision == 32
    for each in (module, full):
        each.network.eval()
        for weights in each.network.parameters():
            weights.data += 0.02  # a student that errs
    exact, reduced = losses(full), losses(module)
    torch.testing.assert_close(reduced, by_hand(module), rtol=0, atol=0)
    assert reduced.dtype == torch.float32
    assert 1e-6 < (reduced - exact).norm() / exact.norm() < 0.05
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float32}


def test_a_reduced_teacher_follows_promotion_and_loading(teacher):
    module = ladder(teacher, conversion_updates=0, teacher_precision="bf16")
    module.network.eval()
    found = [losses(module)]
    for weights in module.average.module.parameters():
        weights.data += 0.05
    module.promote()
    found.append(losses(module))
    torch.testing.assert_close(found[1], by_hand(module), rtol=0, atol=0)
    other = copy.deepcopy(module)
    for weights in other.teacher.parameters():
        weights.data += 0.05
    assert not torch.equal(losses(other), found[1])
    torch.testing.assert_close(losses(other), by_hand(other), rtol=0, atol=0)
    torch.testing.assert_close(losses(module), found[1], rtol=0, atol=0)
    module.load_weights_from(some_ddpm(**TEACHER))
    torch.testing.assert_close(losses(module), by_hand(module), rtol=0, atol=0)
    assert len({tuple(each.tolist()) for each in (*found, losses(module))}) == 3


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_ladder_with_a_reduced_teacher_resumes_bit_for_bit(teacher, tmp_path):
    settings = {"rounds": [(2, 3), (1, 3)], "conversion_updates": 0, "teacher_precision": "bf16"}
    files = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = ladder(teacher, **settings)
    fit(whole, tmp_path, files)
    held = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    assert set(held) == set(ladder(teacher).state_dict())
    full = ladder(teacher, **settings | {"teacher_precision": 32})
    fit(full, tmp_path / "full")
    assert not same(clone(whole.network), clone(full.network))
    for step in (2, 3):
        resumed = ladder(teacher, **settings, global_seed=99)
        fit(resumed, tmp_path / "again", ckpt_path=tmp_path / f"step={step}.ckpt")
        for name in ("network", "average", "teacher"):
            assert same(clone(getattr(whole, name)), clone(getattr(resumed, name)))
    loaded = type(whole).load_from_checkpoint(tmp_path / "step=6.ckpt", teacher=None)
    assert loaded.teacher_precision == "bf16"
    assert "teacher_precision" not in whole.student_checkpoint()["hyper_parameters"]


def test_an_unknown_precision_of_a_teacher_is_an_error(teacher, teacher_file):
    with pytest.raises(ValueError, match=r"teacher_precision must be one of \(32, 'bf16'\), got"):
        ladder(teacher, teacher_precision="bf16-true")
    with pytest.raises(ValueError, match=r"teacher_precision must be one of \(32, 'bf16'\), got"):
        student(teacher_file, teacher_precision=16)
