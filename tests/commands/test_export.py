"""A model to give to others: the same images, nothing of this machine."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from foreign import random_unet, save_pipeline
from safetensors.torch import load_file
from tiny import tiny_config, write_config
from without_ddim_pl import PIPELINES, run

import ddim_pl
from ddim_pl.cli import main
from ddim_pl.commands.export import without_paths
from ddim_pl.schedules import LinearSchedule
from ddim_pl.timesteps import save_levels

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-account")
    config = tiny_config(folder, max_epochs=1)
    levels = folder / "levels.json"
    save_levels(levels, LinearSchedule(), [torch.tensor([1000.0, 500.0, 0.0])])
    config["model"]["init_args"] |= {"timesteps": str(levels), "num_steps": 2}
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    last = folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    output = folder / "out" / "model.ckpt"
    main(["export", "--ckpt_path", str(last), "--output", str(output)])
    return last, output


def test_an_exported_checkpoint_draws_the_same_images(shared):
    last, output = shared
    ours, theirs = ddim_pl.load(last), ddim_pl.load(output)
    assert type(theirs) is ddim_pl.DDPM
    assert theirs.timesteps == [1000.0, 500.0, 0.0]
    assert torch.equal(ours.sample([0, 1]), theirs.sample([0, 1]))
    assert output.stat().st_size < last.stat().st_size / 2


def test_it_holds_no_path_of_this_machine(shared):
    last, output = shared
    assert b"secret-account" in last.read_bytes()
    assert b"secret-account" not in output.read_bytes()


def test_it_works_from_the_command_line(shared, tmp_path, monkeypatch):
    _, output = shared
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "model.ckpt"
    moved.write_bytes(output.read_bytes())
    main(["sample", "--ckpt_path", "model.ckpt", "--num_images", "2"])
    assert list(tmp_path.glob("model-run/**/000001.png"))
    main(["test", "--ckpt_path", "model.ckpt"])


def test_nothing_is_written_over(shared, capsys):
    last, output = shared
    before = output.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["export", "--ckpt_path", str(last), "--output", str(output)])
    assert "output must be a new file" in str(stop.value.code)
    assert output.read_bytes() == before


def test_a_link_to_nothing_is_kept(shared, tmp_path):
    last, _ = shared
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stop:
        main(["export", "--ckpt_path", str(last), "--output", str(tmp_path / "link")])
    assert "output must be a new file" in str(stop.value.code)
    assert (tmp_path / "link").is_symlink()


def test_paths_are_left_out_wherever_they_stand():
    data = {"a": {"root": "/home/me", "b": ["~/x", "y", {"c": "/z", "d": 1}]}, "e": "data"}
    assert without_paths(data) == {"a": {"b": ["y", {"d": 1}]}, "e": "data"}


# Formats of other programs


def exported(checkpoint, output, *more):
    main(["export", "--ckpt_path", str(checkpoint), "--output", str(output), *more])
    return output


READ_PICTURE = """
from PIL import Image

size = Image.open("images.png").size
assert size[0] * size[1] == 16 * 8 * 8
"""


def code_of(card):
    """The code that a card gives, for another place, with its result where `run` looks for it."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert f'"{card.parent.name}' in code
    code = code.replace(f'"{card.parent.name}', f'"{card.parent}')
    return f"{code}\n{READ_PICTURE}\nresult = images\n"


def test_a_folder_of_diffusers_has_a_card_with_what_was_measured(shared, tmp_path, capsys):
    last, _ = shared
    main(["test", "--ckpt_path", str(last), *QUIET])
    folder = exported(last, tmp_path / "new" / "folder", "--format", "diffusers", *QUIET)
    assert "format diffusers, 2 steps" in capsys.readouterr().out
    names = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()}
    assert names == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert [each.name for each in folder.parent.iterdir()] == ["folder"]
    text = (folder / "README.md").read_text()
    assert "secret-account" not in text
    assert str(tmp_path) not in text
    assert "DigitsDataModule" in text
    assert re.search(r"\| test/digits_fd \| [\d.e+-]+ \|", text)


def test_the_card_of_an_imported_teacher_names_no_data_that_it_never_saw(tmp_path):
    save_pipeline(tmp_path / "theirs", random_unet())
    teacher = str(tmp_path / "teacher.ckpt")
    main(["import", str(tmp_path / "theirs"), "--output", teacher])
    folder = exported(teacher, tmp_path / "folder", "--format", "safetensors", *QUIET)
    text = (folder / "README.md").read_text()
    assert "LinearSchedule" in text
    assert "ImageFolderDataModule" not in text


def test_weights_and_their_code_draw_the_images_of_the_model(shared, tmp_path):
    last, _ = shared
    given = ["--format", "safetensors", "--model.num_steps", "3", "--model.timesteps", "linear"]
    folder = exported(last, tmp_path / "folder", *given, "--license", "mit", *QUIET)
    model = ddim_pl.load(last, num_steps=3, timesteps="linear")
    assert len(json.loads((folder / "config.json").read_text())["steps"]) == 3
    z, _ = model.latents(range(16), model.levels[0])
    code = code_of(folder / "README.md").replace("torch.randn(16, 1, 8, 8)", "given")
    torch.testing.assert_close(run(code, z), model.sample(range(16)), rtol=1e-5, atol=1e-5)
    assert "license: mit" in (folder / "README.md").read_text()
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["conv_in.weight"], model.average.module.conv_in.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter to ONNX
@pytest.mark.parametrize("format", ["torch_export", "onnx"])
def test_graphs_have_a_card_whose_code_draws_the_images(format, shared, tmp_path):
    places = []
    if format == "onnx":
        pytest.importorskip("onnxscript")
        places.append(Path(pytest.importorskip("onnxruntime").__file__).parents[1])
    last, _ = shared
    folder = exported(last, tmp_path / "folder", "--format", format, *QUIET)
    model = ddim_pl.load(last)
    z, _ = model.latents(range(16), model.levels[0])
    code = code_of(folder / "README.md").replace("torch.randn(16, 1, 8, 8)", "given")
    code = code.replace('draw((16, 1, 8, 8), "float32")', "given.numpy()")
    code = code.replace("result = images", "result = torch.as_tensor(images)")
    found = run(code, z, places=places)
    torch.testing.assert_close(found, model.sample(range(16)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "format"),
        (["--label", "1"], "label must be left out for format checkpoint"),
        (["--license", "mit"], "license must be left out for format checkpoint"),
        (["--push_to_hub", "a/b"], "push_to_hub must be left out for format checkpoint"),
        (["--format", "diffusers", "--push_to_hub", "b"], "push_to_hub must be owner/name"),
        (["--format", "diffusers", "--label", "1"], "label must be left out for a model without"),
        (["--format", "diffusers", "--model.sampler", "Heun"], "sampler must be DDIM"),
        (["--format", "safetensors", "--metrics", "no.json"], "metrics must be a JSON file"),
        (["--format", "safetensors", "--license", "Apache 2.0"], "license must be an identifier"),
        (["--format", "safetensors", "--output", 'a"b'], "a name without quotes"),
        (["--output", "/dev/null/model.ckpt"], "output must be in a folder that can be written"),
    ],
)
def test_bad_input_writes_nothing(words, message, shared, tmp_path, monkeypatch, capsys):
    last, _ = shared
    monkeypatch.chdir(tmp_path)
    before = {each.name for each in last.parents[1].iterdir()}
    with pytest.raises(SystemExit) as stop:
        main(["export", "--ckpt_path", str(last), "--output", "new/folder", *words, *QUIET])
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
    assert not [*tmp_path.iterdir()]
    assert {each.name for each in last.parents[1].iterdir()} == before


def test_a_folder_goes_to_the_hub_once_it_is_whole(shared, tmp_path, monkeypatch, capsys):
    last, _ = shared
    pushed = []
    monkeypatch.setattr("ddim_pl.commands.export.check_hub", pushed.append)
    monkeypatch.setattr(
        "ddim_pl.commands.export.push",
        lambda folder, name: pushed.append((name, (folder / "README.md").read_text())) or "there",
    )
    given = ["--format", "diffusers", "--push_to_hub", "me/model", *QUIET]
    exported(last, tmp_path / "folder", *given)
    first, (name, text) = pushed
    assert first == name == "me/model"
    assert 'from_pretrained("me/model")' in text
    assert "there: the same" in capsys.readouterr().out


def test_a_folder_that_exists_is_kept(shared, tmp_path):
    last, _ = shared
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as stop:
        exported(last, tmp_path, "--format", "diffusers")
    assert "output must be a new folder" in str(stop.value.code)
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


SMALL = {  # what the README says, and what a test can do
    "google/ddpm-cifar10-32": "teacher",
    "cifar10/quick_progressive": "digits/progressive",
    "cifar10-quick-progressive": "digits-progressive",
    "updates 1000": "updates 1",
    "[[8,2000],[4,2000]]": "[[8,1],[4,1]]",
}
MORE = {"fit": ["--data.batch_size", "4", "--trainer.limit_val_batches", "0"]}
MORE["test"] = ["--trainer.limit_test_batches", "1"]
NO_DISTANCES = ["--trainer.callbacks", "callbacks.Students"]


def commands_of_the_readme():
    """The five under "From a diffusers checkpoint to a 4-step student", made small."""
    text = (ROOT / "README.md").read_text().partition("to a 4-step student\n")[2]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
    for theirs, small in SMALL.items():
        assert theirs in block
        block = block.replace(theirs, small)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_a_pipeline_to_a_pipeline_of_four_steps(tmp_path, monkeypatch):
    """The README's five lines: import, two rounds, test, export, and drawing elsewhere."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(tmp_path / "teacher", random_unet())
    *ours, (python, option, code) = commands_of_the_readme()
    assert [words[:2] for words in ours] == [
        ["ddim-pl", name] for name in ("import", "fit", "test", "export")
    ]
    assert (python, option) == ("python", "-c")
    for _, command, *words in ours:
        quiet = [*QUIET, *NO_DISTANCES] if command in ("fit", "test") else []
        main([command, *words, *MORE.get(command, []), *quiet])
    (student,) = (tmp_path / "runs").rglob("student-0004-steps.ckpt")
    model = ddim_pl.load(student)
    assert model.distilled_steps == 4
    z, _ = model.latents([0, 1, 2], model.levels[0])
    folder, call = str(tmp_path / "student"), {"use_clipped_model_output": True}
    code = code.replace("'student'", repr(folder)) + "\nfrom PIL import Image\n"
    code += "assert Image.open('image.png').size == (8, 8)\n"
    code += code_of(Path(folder, "README.md"))
    assert "| test/loss |" in Path(folder, "README.md").read_text()
    code += "assert len(images) == 16\n"
    origin = Path(folder, "README.md").read_text().partition("## Origin")[2]
    imported, distilled = yaml.safe_load(origin.split("```")[1].removeprefix("yaml"))
    assert imported == {"by": "import", "source": "teacher"}
    assert distilled["teacher"] == "teacher.ckpt"
    assert [steps for steps, _ in distilled["rounds"]] == [8, 4]
    given = {folder: (z, {"num_inference_steps": 4, **call}, [])}
    theirs = run(code + PIPELINES, given)[folder]
    wanted = (model.sample([0, 1, 2]) / 2 + 0.5).clamp(0, 1)
    assert wanted.std() > 0.1
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-4)
