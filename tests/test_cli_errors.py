"""Errors of the command line: one line that names the argument, the value and the nearest name."""

import subprocess
import sys
from pathlib import Path

import pytest

from ddim_pl.cli import main

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
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
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
