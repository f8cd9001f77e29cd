"""What the formats take; the code on their cards is run in tests/commands/test_export.py."""

import pytest
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.exports.formats import make_export
from ddim_pl.samplers import DDIM, Ancestral, Heun

FORMATS = ("diffusers", "safetensors", "torch_export")


@pytest.mark.parametrize("format", FORMATS)
def test_a_sampler_that_a_format_lacks_is_refused(format):
    with pytest.raises(ValueError, match="sampler must be DDIM"):
        make_export(tiny_ddpm(sampler=Heun()), format)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_label_has_no_effect_where_each_image_has_one(format):
    with pytest.raises(ValueError, match="label must be left out for format"):
        make_export(tiny_ddpm(network=tiny_unet(num_classes=3)), format, 1)


def test_what_a_pipeline_cannot_say_is_refused():
    with pytest.raises(ValueError, match="patch_size must be 1"):
        make_export(tiny_ddpm(network=tiny_unet(patch_size=2, attention=[2])), "diffusers")
    with pytest.raises(ValueError, match="label must be given"):
        make_export(tiny_ddpm(network=tiny_unet(num_classes=3)), "diffusers")


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"clip": False}, "num_inference_steps=5, eta=0.0\n"),
        ({}, "num_inference_steps=5, eta=0.0, use_clipped_model_output=True\n"),
        ({"sampler": DDIM(0.5, clip=False)}, "num_inference_steps=5, eta=0.5\n"),
        ({"sampler": Ancestral()}, "num_inference_steps=5, eta=1.0, use_clipped"),
    ],
)
def test_the_call_of_a_pipeline_has_what_its_folder_cannot_hold(settings, call):
    assert call in make_export(tiny_ddpm(**settings), "diffusers").usage


def test_a_teacher_of_other_levels_says_which_steps_are_even():
    notes = make_export(tiny_ddpm(num_steps=64, timesteps="linear"), "diffusers").notes
    assert "numbers of steps that divide 1024 visit them evenly" in notes[-1]
    assert len(make_export(tiny_ddpm(num_steps=50, clip=False), "diffusers").notes) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_guidance_is_refused_and_the_plain_model_is_not(format):
    def model(**changes):
        return tiny_ddpm(network=tiny_unet(num_classes=3, null_class=True), **changes)

    label = 1 if format == "diffusers" else None
    interval = {"guidance_interval": (0.3, 3.0)}
    with pytest.raises(ValueError, match=r"guidance must be null for .*, got 2 in \(0.3, 3\]"):
        make_export(model(guidance=2.0, **interval), format, label)
    for plain in (model(), model(guidance=1.0)):
        assert "guidance" not in make_export(plain, format, label).usage
