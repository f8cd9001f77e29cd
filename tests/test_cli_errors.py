"""Errors of the command line: one line that names the argument, the value and the nearest name."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ddim_pl.cli import main
from ddim_pl.cli_errors import plain_warnings

ROOT = Path(__file__).parents[1]
BEGIN = ["fit", "--config", str(ROOT / "configs/digits/ddpm.yaml")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "DDMP"], "model cannot be DDMP: did you mean DDPM?"),
        (["--data", "Digits"], "data cannot be Digits: did you mean DigitsDataModule?"),
        (["--model.network", "UNett"], "network cannot be UNett: did you mean UNet?"),
        (["--model.schedule", "Linear"], "did you mean LinearSchedule?"),
        (["--model.noise", "GamaNoise"], "did you mean GammaNoise? known are GammaNoise, Gau"),
        (["--model.sampler", "Hein"], "sampler cannot be Hein: did you mean Heun?"),
        (["--model.sampler", "DEQ", "--model.sampler.solver", "Andersn"], "mean Anderson?"),
        (["--trainer.callbacks+=SampelGrid"], "did you mean SampleGrid?"),
        (["--trainer.logger", "TensorBord"], "did you mean TensorBoardLogger?"),
        (["--model.optimizer", "Adm"], "optimizer cannot be Adm: did you mean Adam?"),
        (["--model.num_step", "3"], "num_step is no argument of DDPM: did you mean num_steps?"),
        (["--model.network.chanels", "3"], "no argument of UNet: did you mean channels?"),
        (["--data.batch_sise", "3"], "no argument of DigitsDataModule: did you mean batch_size?"),
        (["--model.sampler", "DDPM"], "sampler cannot be DDPM: it is called Ancestral now"),
        (
            ["--trainer.callbacks+=no.such.Thing"],
            "cannot be no.such.Thing: known are",
        ),
        (["--data.flip", "true"], "flip is no argument of DigitsDataModule: it has batch_size"),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1 (--help"),
        (["--trainer.max_step", "3"], "max_step 3: did you mean --trainer.max_steps?"),
        (["--trainer.max_stpes=3"], "did you mean --trainer.max_steps?"),
        (["--trainr.max_steps=3"], "did you mean --trainer.max_steps?"),
        (["--mode.num_steps", "3"], "did you mean --model.num_steps?"),
        (["--seed", "3"], "unrecognized arguments: --seed 3: did you mean --seed_everything?"),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*BEGIN, *arguments])
    assert stop.value.code == 2
    text = capsys.readouterr().err.strip()
    assert message in text
    assert len(text.splitlines()) == 1
    assert len(text) < 400


PRECISIONS = """'16-mixed', 'bf16-true', 'bf16-mixed', '32-true', '64-true', 64, 32, 16, 'bf16'"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.sampling_precision", "fp16"],
            "sampling_precision must be one of 32, 'bf16', got fp16: did you mean bf16?",
        ),
        (
            ["--trainer.precision", "bf17"],
            f"{PRECISIONS} or null, got bf17: did you mean bf16?",
        ),
        (
            ["--model.noise_source", "phylox"],
            "noise_source must be one of 'generators', 'philox', got phylox: did you mean philox?",
        ),
        (["--model.compile", "x"], "compile must be 'auto' or true or false, got x\n"),
        (["--model.network.resample", "foo"], "must be one of 'conv', 'block', got foo\n"),
        (["--model.network.channels", "x"], "error: channels must be an integer, got x\n"),
        (["--model.sampler", "DDIM", "--model.sampler.eta", "x"], "eta must be a number, got x\n"),
        (["--model.image_shape", "[1, 8]"], "must be a list of 3 integers or null, got [1, 8]\n"),
        (["--model.network.attention", "[x]"], "must be a list of integers, got x in it\n"),
        (["--model.network.attention", "4"], "list of integers, got 4: write it as '[4]'\n"),
        (["--model.optimizer.lr", "x"], "lr must be a number, got x\n"),
        (["--model.optimizer.betas", "1"], "betas must be a list of 2 entries, got 1: write it"),
        (["--model.clip", "foo"], "by its full path, or true or false\n"),
        (["--trainer.max_steps", "1.5"], "trainer.max_steps must be an integer, got 1.5\n"),
        (["--seed_everything", "x"], "must be an integer or true or false, got x\n"),
        (
            ["--trainer.callbacks+=BitsPerDim", "--trainer.callbacks.variance", "lrge"],
            "variance must be one of 'small', 'large', got lrge: did you mean large?",
        ),
    ],
)
def test_a_wrong_value_is_answered_by_what_its_argument_takes(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*BEGIN, *arguments, "--print_config"])  # which a value that is taken would end in
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 1


def test_a_wrong_value_of_a_commands_own_argument_is_answered_too(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--num_images", "x", "--print_config"])
    assert "num_images must be an integer, got x\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("configs/digits/dpm.yaml", ["configs/digits/ddpm.yaml"]),
        ("luhman.yaml", ["digits/luhman", "celeba/luhman"]),
        ("configs/digit/table1.yaml", ["digits/table1", "cifar10/table1"]),
        ("configs/digits", ["configs/digits/ddim_table1.yaml"]),
        ("mine/ab.yaml", ["mine/abc.yml?"]),
        ("mine/nothing_like_it.yaml", ["configs has some"]),
    ],
)
def test_a_config_that_is_missing_is_answered_by_similar_ones(
    given, found, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "abc.yml").touch()
    with pytest.raises(SystemExit):
        main(["fit", "--config", given])
    text = capsys.readouterr().err
    assert text.startswith(f"error: config must be a file that exists, got {given}: ")
    assert all(name in text for name in found)
    assert text.index(found[0]) == min(text.index(name) for name in found)
    assert len(text.splitlines()) == 1


def test_another_package_called_callbacks_is_named(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").touch()
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
        "from ddim_pl.cli_errors import exit_if_callbacks_are_shadowed as check; check()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the package callbacks must be")
    assert str(tmp_path / "callbacks") in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_warnings_of_this_package_are_one_line_and_said_once():
    before = warnings.formatwarning
    place = (UserWarning, str(ROOT / "ddim_pl" / "x.py"), 3)
    with plain_warnings():
        assert warnings.formatwarning("two\n  lines", *place) == "warning: two lines\n"
        assert warnings.formatwarning("two\n  lines", *place) == ""
        assert warnings.formatwarning("other", *place) == "warning: other\n"
        theirs = ("theirs", UserWarning, "/elsewhere/ddim_pl/x.py", 3, "code()")
        assert warnings.formatwarning(*theirs) == before(*theirs)
        with pytest.warns(UserWarning, match="seen"):
            warnings.warn("seen", stacklevel=1)
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("arguments", "lists"),
    [
        (["import", "a"], "(--help lists what there is)"),
        (["measure", "a"], "(--help lists what there is)"),
        (["fit", "--nonsense", "1"], "(--help and --print_config list what there is)"),
    ],
)
def test_an_error_names_options_that_the_command_has(arguments, lists, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().endswith(lists)
