"""Drawing with a bfloat16 copy of the network."""

import copy

import pytest
import torch
from tiny import some_ddpm

from ddim_pl.training.ddpm import averaged_checkpoint
from ddim_pl.training.fingerprint import fingerprint
from ddim_pl.training.reduced import ReducedCopy


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
