"""Random arguments: no traceback, no hang, nothing written but in the folder of runs."""

import os
import signal

import pytest
from tiny import tiny_config, write_config

from ddim_pl.cli import main

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

COMMANDS = {
    "sample": ["num_images", "first", "label", "seed", "batch_size", "png", "npz", "columns"],
    "interpolate": ["num_pairs", "num_points", "from_data", "images", "label", "seed"],
    "reconstruct": ["num_steps", "timesteps", "images", "label", "batch_size"],
    "invert": [
        "num_steps",
        "lr",
        "max_seconds",
        "stop_below",
        "start",
        "method",
        "seed",
        "timesteps",
    ],
    "levels": ["num_steps", "batch_size"],
    "sweep": ["etas", "timesteps", "metrics", "samplers", "num_shown", "seed", "name", "features"],
    "compare": ["num_steps", "metrics", "num_shown", "batch_size", "name", "seed"],
    "fit": ["data.batch_size", "data.steps_per_epoch", "data.flip", "model.ema_decay"],
    "test": ["data.batch_size", "trainer.limit_test_batches"],
    "predict": ["data.num_predict", "data.batch_size"],
}
SHARED = [
    *("model.num_steps", "model.timesteps", "model.sampler", "model.sampler.eta", "model.clip"),
    *("model.optimizer", "model.optimizer.lr", "model.schedule", "model.noise", "data.seed"),
    *("model.network.channels", "model.network.groups", "model.image_shape", "nonsense"),
    *("trainer.precision", "trainer.devices", "trainer.accelerator", "trainer.callbacks"),
    *("trainer.logger.name", "trainer.fast_dev_run", "trainer.inference_mode"),
    *("seed_everything", "model.warmup_steps", "trainer.gradient_clip_val"),
]
VALUES = [
    *("0", "1", "2", "3", "-1", "1.5", "1e30", str(10**23), "nan", ".inf", "", "abc", "true"),
    *("null", "[]", "[2]", "[1, 2]", "[abc]", "{}", "{a: b}", "../x", "/dev/null/x", "é", "a b"),
    *("DDIM", "Heun", "DEQ", "DDPM", "Adam", "GammaNoise", "LinearSchedule", "linear", "karras"),
    *("SampleGrid", "torch.nn.Identity", "64-true", "bf16-true", "[fd]", "cpu", "[[[", "a: b: c"),
]
SMALL = {
    "sample": ["--num_images", "2"],
    "interpolate": ["--num_pairs", "1", "--num_points", "2"],
    "reconstruct": ["--num_images", "2", "--num_steps", "[2]"],
    "invert": ["--num_images", "2", "--num_steps", "2", "--num_updates", "2"],
    "levels": ["--num_images", "2", "--num_steps", "[2]"],
    "sweep": ["--num_samples", "41", "--num_steps", "[2]"],
    "compare": ["--num_samples", "41", "--num_steps", "[2]"],
    "fit": ["--trainer.limit_val_batches", "0"],
}


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    names = st.sampled_from([*COMMANDS[command], *COMMANDS[command], *SHARED])
    options = draw(st.lists(st.tuples(names, st.sampled_from(VALUES)), min_size=1, max_size=3))
    # Lightning starts the other processes with the arguments of this one, which is pytest.
    several = [("trainer.devices", number) for number in ("2", "3")]
    given = [f"--{name}={value}" for name, value in options if (name, value) not in several]
    return [command, *SMALL.get(command, []), *given]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "runs"
    folder.mkdir()
    config = tiny_config(folder, max_steps=1, limit_val_batches=0, limit_test_batches=1)
    first, *_, saving = config["trainer"]["callbacks"]
    saving["init_args"]["every_n_train_steps"] = 1
    config["trainer"]["callbacks"] = [first, saving]
    config["model"]["init_args"]["num_steps"] = 2
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


def outcome(arguments, seconds=60):
    """The last words of a command, or None if it succeeded."""

    def hangs(*_):
        raise BaseException(f"{arguments} hangs")

    # Time of the processor: a busy machine, or one that slept, is no hang.
    signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_random_arguments_end_in_one_line_or_in_images(checkpoint, monkeypatch, capsys):
    root = checkpoint.parents[4]
    monkeypatch.chdir(root)

    @hypothesis.settings(
        max_examples=int(os.environ.get("DDIM_PL_FUZZ", "300")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(command_lines())
    def check(line):
        command, *rest = line
        if command == "fit":
            rest += ["--config", "runs/config.yaml", "--trainer.max_steps", "1"]
        else:
            rest += ["--ckpt_path", str(checkpoint)]
        if command == "compare":
            rest += ["--students", f"[{checkpoint}]"]
        code = outcome([command, *rest])
        said = capsys.readouterr().err
        text = (
            code
            if isinstance(code, str)
            else "".join(
                each for each in said.splitlines(keepends=True) if each.startswith("error")
            )
        )
        if code not in (None, 0):
            assert text.startswith("error: "), (line, said)
            assert len(text.strip().splitlines()) == 1, (line, text)
            assert "this is a bug" not in text, (line, text)
        assert "Traceback" not in said, (line, said)
        assert [each.name for each in root.iterdir()] == ["runs"], line

    check()
