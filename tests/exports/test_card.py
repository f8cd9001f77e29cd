"""The model card says what is there, and no number without what it is of."""

import json
import os

import pytest
import torch
import yaml
from tiny import tiny_ddpm, tiny_unet

from ddim_pl.evaluation.manifest import sampling_of
from ddim_pl.exports.card import _flat, card, metrics_of_run, read_metrics
from ddim_pl.exports.formats import make_export
from ddim_pl.samplers import Consistency

MEASURED = {
    "fid": 3.25,
    "a": {"source": "/home/me/samples", "num_images": 50000},
    "extractor": "inception",
    "precision": "features in float32, statistics in float64",
    "sha256": "0" * 64,
}


def results(model, **changes):
    return {
        "checkpoint": "runs/x/version_0/checkpoints/last.ckpt",
        **sampling_of(model),
        "precision": "32-true",
        "test/digits_fd": 0.25,
        **changes,
    }


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_card_has_metadata_and_all_that_was_asked_for():
    model = tiny_ddpm(num_steps=4, distilled_steps=4)
    text = card(
        make_export(model, "diffusers"),
        model,
        name="me/student",
        metrics={"test/digits_fd": 0.123456, "digits_fd num_samples": 50000},
        config={"data": {"class_path": "Digits"}, "model": {"class_path": "DDPM"}, "trainer": {}},
        license="apache-2.0",
    )
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddim", "diffusers"],
    }
    assert body.startswith(
        "\n# student\n\nA diffusion model distilled to 4 steps; images are 1x8x8"
    )
    for part in (
        'DDIMPipeline.from_pretrained("me/student")',
        "num_inference_steps=4, eta=0.0, use_clipped_model_output=True",
        "It was distilled to 4 steps; others are worse.",
        "| levels | 1000, 750, 500, 250, 0 |",
        "| sampler | DDIM(eta=0.0) |",
        "| prediction | eps |",
        "| weights | averaged, ema_decay 0.9, float32 |",
        "| test/digits_fd | 0.1235 |",
        "| digits_fd num_samples | 50000 |",
        "class_path: Digits",
        "class_path: DDPM",
        "## Licence\n\napache-2.0",
    ):
        assert part in body, part


def test_without_metrics_data_and_licence_it_says_so():
    text = card(make_export(tiny_ddpm(), "safetensors"), tiny_ddpm(), name="here")
    assert "license: unknown" in text
    assert "library_name" not in text
    assert "None are given." in text
    assert "Not stated: ask" in text
    assert "## Data\n\nNot stated." in text


def test_measurements_are_flat_and_hold_no_paths(tmp_path):
    found = read_metrics(write(tmp_path / "measured.json", MEASURED), tiny_ddpm())
    assert found == {
        "fid": 3.25,
        "a source": "samples",
        "a num_images": 50000,
        "extractor": "inception",
        "precision": MEASURED["precision"],
    }
    model = tiny_ddpm()
    found = read_metrics(write(tmp_path / "results.json", results(model)), model)
    assert found["checkpoint"] == "last.ckpt"
    assert found["test/digits_fd"] == 0.25


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "Heun()"},
        {"network evaluations": 50},
        {"timesteps": "leading"},
        {"levels": [1000.0, 0.0]},
        {"clip": "None"},
        {"prediction": "v"},
        {"schedule": "LinearSchedule(beta_end=0.04)"},
        {"weights": "of another fit"},
    ],
)
def test_results_of_another_sampling_are_refused(change, tmp_path):
    path = write(tmp_path / "results.json", results(tiny_ddpm(), **change))
    with pytest.raises(
        ValueError, match=f"metrics must be of the sampling .* {next(iter(change))} "
    ):
        read_metrics(path, tiny_ddpm())


def test_results_of_guided_images_are_those_of_a_guided_model(tmp_path):
    """Files of before have no entry for it, and were not guided."""

    def model(**changes):
        return tiny_ddpm(network=tiny_unet(num_classes=3, null_class=True), **changes)

    torch.manual_seed(0)
    plain, guided = model(), model(guidance=1.5)
    guided.load_state_dict(plain.state_dict())
    for name, own, other in (("plain", plain, guided), ("guided", guided, plain)):
        path = write(tmp_path / f"{name}.json", results(own))
        assert read_metrics(path, own)["test/digits_fd"] == 0.25
        with pytest.raises(ValueError, match=r"metrics must be of the sampling .* guidance "):
            read_metrics(path, other)
    read_metrics(write(tmp_path / "measured.json", MEASURED), guided)


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}", '{"fid": 1}'])
def test_what_is_no_such_file_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="metrics must be a JSON file of"):
        read_metrics(tmp_path / "x.json", tiny_ddpm())


def test_the_results_of_a_run_are_those_of_this_file_and_sampling(tmp_path):
    model, run = tiny_ddpm(), tmp_path / "version_0"
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("")
    before = {name: results(model)[name] for name in ("sampler", "timesteps")}
    write(run / "test-results.json", {"checkpoint": str(checkpoint), **before})
    os.utime(checkpoint, ns=(0, 0))
    assert metrics_of_run(checkpoint, model) is None  # of a version that did not say more
    (run / "test-results.json").unlink()
    other = checkpoint.with_name("other.ckpt")
    other.write_text("")
    assert metrics_of_run(checkpoint, model) is None
    path = write(run / "test-results.json", results(model, checkpoint=str(checkpoint)))
    os.utime(checkpoint, ns=(0, 0))
    os.utime(other, ns=(0, 0))
    assert metrics_of_run(checkpoint, model)["test/digits_fd"] == 0.25
    assert metrics_of_run(other, model) is None
    assert metrics_of_run(checkpoint, tiny_ddpm(num_steps=7)) is None
    os.utime(path, ns=(0, 0))  # the fit went on after the test
    assert metrics_of_run(checkpoint, model) is None


def test_the_origin_is_shown_and_a_source_on_the_hub_is_the_base_model():
    model = tiny_ddpm()
    text = card(make_export(model, "safetensors"), model, name="x")
    assert "## Origin\n\nNot stated." in text
    assert "base_model" not in text
    model.origin = (
        {"by": "import", "source": "google/ddpm-cifar10-32", "on_hub": True},
        {"by": "ProgressiveDistillation", "teacher": "teacher.ckpt", "rounds": [[8, 20]]},
    )
    _, metadata, body = card(make_export(model, "safetensors"), model, name="x").split("---\n", 2)
    assert yaml.safe_load(metadata)["base_model"] == ["google/ddpm-cifar10-32"]
    code = body.partition("## Origin")[2].split("```")[1].removeprefix("yaml")
    assert yaml.safe_load(code) == [*model.origin]


def test_classes_are_in_the_code_and_the_text():
    model = tiny_ddpm(network=tiny_unet(num_classes=3))
    text = card(make_export(model, "safetensors"), model, name="x")
    assert "images are 1x8x8 (channels, height, width), of 3 classes" in text
    assert "sample(load(folder), z, torch.arange(16) % 3)" in text
    text = card(make_export(model, "safetensors"), model, name="me/weights")
    assert "`hf download me/weights --local-dir weights`" in text
    assert 'folder = "weights"' in text
    text = card(make_export(model, "diffusers", 2), model, name="x")
    assert "Class 2 alone: a pipeline takes no labels." in text


def test_results_of_all_classes_are_not_those_of_one():
    model = tiny_ddpm(network=tiny_unet(num_classes=3))
    measured = {"extractor": "inception", "fid": 3.0}
    text = card(make_export(model, "diffusers", 2), model, name="x", metrics=measured)
    assert "of 3 classes, of which this is class 2 alone" in text
    assert "They are not of class 2 alone" in text
    assert "not compared with this model" in text


def test_steps_that_a_student_does_not_know_are_said():
    model = tiny_ddpm(num_steps=8)
    model.distilled_steps = 4
    text = card(make_export(model, "safetensors"), model, name="x")
    assert "| steps | 8, but it was distilled to 4 |" in text
    text = card(make_export(model, "diffusers"), model, name="x")
    assert "It was distilled to 4 steps; others are worse." in text
    model = tiny_ddpm(num_steps=1, distilled_steps=2, distilled_sampler=Consistency())
    text = card(make_export(model, "safetensors"), model, name="x")
    assert "| steps | 1 |" in text  # a consistency model also takes fewer


def test_what_a_file_says_cannot_break_the_table():
    measured = {"extractor": "a|b\nc", "places": ["/home/me/x", 3]}
    assert "| extractor | a\\|b c |" in card(
        make_export(tiny_ddpm(), "safetensors"), tiny_ddpm(), name="x", metrics=measured
    )
    assert _flat(measured)["places"] == "x, 3"
