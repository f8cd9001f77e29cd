import pytest
import torch

from ddim_pl.metrics.precision import SWITCHES, full_float32


def state():
    older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return [switch.fp32_precision for switch in SWITCHES], older


@pytest.fixture(params=["default", "highest", "high", "medium", "no tf32"])
def switched(request):
    before = [switch.fp32_precision for switch in SWITCHES]
    if request.param == "no tf32":
        torch.backends.cudnn.allow_tf32 = False
    elif request.param != "default":
        torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = value


def test_all_switches_are_off_inside_and_as_before_outside(switched):
    before = state()
    with full_float32():
        assert {switch.fp32_precision for switch in SWITCHES} == {"ieee"}
    assert state() == before
    with pytest.raises(KeyboardInterrupt), full_float32():
        raise KeyboardInterrupt
    assert state() == before


def test_products_on_this_machine_do_not_depend_on_the_switches(switched):
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    with full_float32():
        found = x @ x
    exact = x.double() @ x.double()
    assert (found - exact).abs().max() < 1e-4  # bfloat16 is 1e-1 away


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_convolutions_on_a_gpu_do_not_depend_on_the_switches(switched):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, 9, 9, generator=generator) for _ in range(2))
    with full_float32():
        found = torch.nn.functional.conv2d(x.cuda(), w.cuda()).cpu()
    exact = torch.nn.functional.conv2d(x.double(), w.double())
    assert (found - exact).abs().max() < 1e-3  # TF32 is 1e-1 away
