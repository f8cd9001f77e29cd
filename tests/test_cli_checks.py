"""Wrong arguments of every command: one line that names the argument, and nothing is written."""

import shlex

import pytest
import torch
from tiny import tiny_config, write_config

from ddim_pl.cli import _takes_data, main
from ddim_pl.cli_checks import has_effect
from ddim_pl.cli_errors import run_message
from ddim_pl.commands import COMMANDS

HUGE = 10**23

REDUCED = "--model.sampling_precision bf16"

WRONG = [
    # What is wrong, and the argument that the one line names.
    ("fit --trainer.precision 12", "trainer.precision"),
    ("fit --trainer.precision transformer-engine", "trainer.precision=transformer-engine"),
    ("fit --trainer.accelerator tpu", "trainer.accelerator"),
    ("fit --trainer.accelerator foo", "trainer.accelerator"),
    ("fit --trainer.strategy foo", "trainer.strategy"),
    ("fit --trainer.devices 0", "trainer.devices"),
    ("fit --trainer.devices -1", "trainer.devices"),
    ("fit --trainer.devices abc", "trainer.devices"),
    ("fit --trainer.devices 1.5", "trainer.devices"),
    ("fit --trainer.num_nodes 0", "trainer.num_nodes"),
    ("fit --trainer.val_check_interval 0", "trainer.val_check_interval"),
    ("fit --trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch"),
    ("fit --trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches"),
    ("fit --trainer.log_every_n_steps -1", "trainer.log_every_n_steps"),
    ("fit --trainer.gradient_clip_val -1", "trainer.gradient_clip_val"),
    ("fit --trainer.gradient_clip_algorithm foo", "trainer.gradient_clip_algorithm"),
    ("fit --trainer.max_steps -5", "trainer.max_steps"),
    ("fit --trainer.max_epochs -5", "trainer.max_epochs"),
    ("fit --trainer.limit_val_batches -1", "trainer.limit_val_batches"),
    ("fit --trainer.fast_dev_run -1", "trainer.fast_dev_run"),
    ("fit --trainer.profiler foo", "trainer.profiler"),
    ("fit --trainer.max_time abc", "trainer.max_time=abc"),
    ("fit --trainer.enable_checkpointing false", "trainer.enable_checkpointing=False"),
    ("fit --seed_everything -1", "seed_everything"),
    (f"fit --seed_everything {HUGE}", "seed_everything"),
    ("fit --trainer.logger.name ../../x", "trainer.logger.name"),
    ("fit --trainer.logger.version ../x", "trainer.logger.version"),
    ("fit --trainer.callbacks+=SampleGrid --trainer.callbacks.columns -3", "columns"),
    ("fit --trainer.callbacks+=ImageWriter --trainer.callbacks.columns 0", "columns"),
    ("fit --trainer.callbacks+=FrechetDistance --trainer.callbacks.metrics [foo]", "metrics"),
    (
        "fit --trainer.callbacks+=FrechetDistance --trainer.callbacks.features torch.nn.Identity",
        "features",
    ),
    ("fit --model.optimizer torch.optim.SparseAdam", "optimizer"),
    ("fit --model.optimizer.lr -1", "optimizer"),
    ("fit --model.optimizer.lr 1e30", "optimizer.lr"),
    ("fit --model.optimizer.lr nan", "lr must be a number"),
    ("fit --model.optimizer.betas [2,3]", "optimizer"),
    ("fit --model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau", "lr_scheduler"),
    (f"fit --model.warmup_steps {HUGE}", "model.warmup_steps"),
    ("fit --model.sampler GammaQuantile", "sampler"),
    ("fit --model.image_shape [1,8]", "image_shape"),
    ("fit --model.ema_decay 2", "ema_decay"),
    ("fit --model.ema_decay HalfLife --model.ema_decay.images 0", "images of a HalfLife"),
    ("fit --model.clip ClipRange --model.clip.low 3", "high must be above low"),
    ("fit --model.level_mean 0", "level_mean must be None"),
    ("fit --model.sampler Heun --model.sampler.s_noise 1.1", "s_noise must be 1.0"),
    ("fit --model.num_steps 0", "num_steps"),
    ("fit --model.network.channels 0", "channels"),
    (f"fit --data.batch_size {HUGE}", "data.batch_size"),
    ("fit --data.batch_size 0", "batch_size"),
    ("test --ckpt_path CK --trainer.limit_test_batches -1", "trainer.limit_test_batches"),
    ("test --ckpt_path nowhere", "ckpt_path"),
    ("validate --ckpt_path CK --trainer.devices abc", "trainer.devices"),
    ("predict --ckpt_path CK --data.num_predict -1", "num_predict"),
    ("sample", "ckpt_path"),
    ("sample --ckpt_path CK --columns -1", "columns"),
    ("sample --ckpt_path CK --columns 0", "columns"),
    ("sample --ckpt_path CK --num_images 0", "num_images"),
    ("sample --ckpt_path CK --num_images abc", "num_images"),
    (f"sample --ckpt_path CK --num_images {HUGE}", "num_images"),
    (f"sample --ckpt_path CK --first {HUGE}", "first"),
    (f"sample --ckpt_path CK --seed {HUGE}", "seed"),
    ("sample --ckpt_path CK --label 10", "label"),
    ("sample --ckpt_path CK --output /dev/null/x", "output"),
    ("sample --ckpt_path CK --model.sampler GammaQuantile", "sampler"),
    ("sample --ckpt_path CK --model.timesteps nowhere.json", "timesteps"),
    ("interpolate --ckpt_path CK --num_points 1", "num_points"),
    (f"interpolate --ckpt_path CK --num_pairs {HUGE}", "num_pairs"),
    ("interpolate --ckpt_path CK --images [a.png]", "images"),
    ("interpolate --ckpt_path CK --images []", "images"),
    ("interpolate --ckpt_path CK --model.sampler DDIM --model.sampler.eta 1", "sampler"),
    ("reconstruct --ckpt_path CK --num_steps [0]", "num_steps"),
    ("reconstruct --ckpt_path CK --num_steps []", "num_steps"),
    ("reconstruct --ckpt_path CK --num_steps 5", "num_steps"),
    ("reconstruct --ckpt_path CK --timesteps foo", "timesteps"),
    ("invert --ckpt_path CK --max_seconds -1", "max_seconds"),
    ("invert --ckpt_path CK --stop_below 0", "stop_below"),
    ("invert --ckpt_path CK --stop_below nan", "stop_below"),
    ("invert --ckpt_path CK --lr 1e30", "lr"),
    ("invert --ckpt_path CK --lr inf", "lr"),
    ("invert --ckpt_path CK --start foo", "start"),
    (f"invert --ckpt_path CK --num_updates {HUGE}", "num_updates"),
    ("levels --ckpt_path CK --output x.txt", "output"),
    (f"reconstruct --ckpt_path CK {REDUCED}", "sampling_precision must be 32 for reconstruct"),
    (f"invert --ckpt_path CK {REDUCED}", "sampling_precision must be 32 for invert"),
    (f"forward --ckpt_path CK {REDUCED}", "sampling_precision must be 32 for forward"),
    (
        f"export --ckpt_path CK --output x --format safetensors {REDUCED}",
        "sampling_precision must be 32 for export to safetensors",
    ),
    (f"interpolate --ckpt_path CK --from_data true {REDUCED}", "between images, which works with"),
    (
        "sample --ckpt_path CK --model.guidance 2",
        "guidance must be left out for a network without",
    ),
    ("sample --ckpt_path CK --model.guidance nan", "guidance must be a number or null, got nan"),
    ("sample --ckpt_path CK --model.guidance_interval [0.1,2]", "left out without guidance"),
    ("sample --ckpt_path CK --model.guidance abc", "guidance must be a number or null, got abc"),
    ("sweep --ckpt_path CK --guidances []", "guidances"),
    ("sweep --ckpt_path CK --guidances [2]", "guidance must be left out for a network without"),
    ("reconstruct --ckpt_path CK --model.guidance 2", "guidance must be left out for reconstruct"),
    ("invert --ckpt_path CK --model.guidance 2", "guidance must be left out for invert"),
    ("forward --ckpt_path CK --model.guidance 2", "guidance must be left out for forward"),
    (
        "interpolate --ckpt_path CK --from_data true --model.guidance 2",
        "guidance must be left out for interpolate between images",
    ),
    ("sample --ckpt_path CK --model.label_dropout 0.1", "model.label_dropout must be left out"),
    ("fit --model.label_dropout 0.1", "label_dropout must be 0 for a network without a null"),
    ("fit --model.network.null_class true", "label_dropout must be positive"),
    ("levels --ckpt_path CK --num_steps [0]", "num_steps"),
    ("pairs --ckpt_path CK", "folder"),
    ("pairs --ckpt_path CK --folder o --num_pairs 2 --shard_size 0", "shard_size"),
    ("pairs --ckpt_path CK --folder /dev/null/x --num_pairs 2", "folder"),
    ("sweep --ckpt_path CK --num_steps []", "num_steps"),
    ("sweep --ckpt_path CK --etas []", "etas"),
    ("sweep --ckpt_path CK --metrics []", "metrics"),
    ("sweep --ckpt_path CK --features torch.nn.Identity", "features"),
    (
        "sweep --ckpt_path CK --features foo",
        "known are CIFARFeatures, DINOv2Features, DigitsFeatures, InceptionFeatures",
    ),
    ("sweep --ckpt_path CK --name ../../x", "name must"),
    ("compare --ckpt_path CK --students []", "students"),
    ("compare --ckpt_path CK --students [nowhere]", "students"),
    ("compare --ckpt_path CK --students [CK] --num_steps [1001]", "num_steps"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, max_steps=1, limit_val_batches=0)
    first, *_, saving = config["trainer"]["callbacks"]
    saving["init_args"]["every_n_train_steps"] = 1
    config["trainer"]["callbacks"] = [first, saving]
    config["model"]["init_args"]["network"]["init_args"]["num_classes"] = 10
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


def test_sampling_precision_that_has_no_effect_is_an_error_where_it_is_given(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """Of a checkpoint it is said to have none, and nothing fails."""
    monkeypatch.chdir(tmp_path)
    reduced, given = str(tmp_path / "reduced.ckpt"), "sampling_precision"
    main(["export", "--ckpt_path", str(checkpoint), "--output", reduced, *REDUCED.split()])
    few = ["--num_images", "2", "--num_steps", "[2]", "--ckpt_path", reduced]
    config = write_config({"model": {"init_args": {given: "bf16"}}}, tmp_path / "mine.yaml")
    for arguments in (["--config", config], [f"--model.init_args.{given}=bf16"]):
        message = error_of(["reconstruct", *few, *arguments], capsys)
        assert f"{given} must be 32 for reconstruct" in message
        assert "got 'bf16': leave it out" in message
    assert not list(tmp_path.glob("*-run"))
    told: list[str] = []
    monkeypatch.setattr("ddim_pl.cli_checks.rank_zero_info", told.append)
    for place, arguments in enumerate(([], [f"--model.{given}", "32"])):
        main(["reconstruct", *few, *arguments, "--output", f"{place}"])
        assert len(told) == 1
    assert "sampling_precision bf16 of the checkpoint has no effect" in told[0]
    written = [(tmp_path / f"{place}" / "reconstruct.md").read_text() for place in (0, 1)]
    assert written[0] == written[1]
    assert "precision 32-true" in written[0]
    drawn = ["interpolate", "--num_pairs", "1", "--num_points", "2", "--output", "between"]
    main([*drawn, "--ckpt_path", str(checkpoint), *REDUCED.split()])


def error_of(arguments, capsys):
    """What a command that must fail says on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    code = stop.value.code
    assert code not in (0, None)
    # Python prints a text that a program exits with.
    return capsys.readouterr().err + (f"{code}\n" if isinstance(code, str) else "")


READ_DATA = {"interpolate", "invert", "inpaint", "forward", "reconstruct", "sweep", "compare"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "but"),
    [
        ("trainer.max_steps", ()),
        ("trainer.logger.save_dir", ()),
        ("trainer.limit_test_batches", ()),
        ("trainer.callbacks+", ("sweep", "compare")),
        ("trainer.callbacks.num_samples", ("sweep", "compare")),
        ("trainer.precision", {*COMMANDS} - {"export"}),
        ("model.optimizer.lr", ()),
        ("model.ema_decay", ()),
        ("model.loss_weight", ("export",)),
        ("model.dropout", ()),
        ("model.teacher", ()),
        ("model.teacher_num_steps", ()),
        ("model.compile", {*COMMANDS} - {"export"}),
        ("data.batch_size", READ_DATA),
        ("data", READ_DATA),
    ],
)
def test_an_option_has_an_effect_on_these_commands_alone(command, name, but):
    assert has_effect(command, name, takes_data=_takes_data(command)) == (command in but)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_devices_and_sampling_have_one(command):
    names = ["model", "model.num_steps", "model.sampler.eta", "model.rounds", "trainer"]
    names += ["trainer.devices", "trainer.inference_mode", "trainer.profiler", "ckpt_path"]
    for name in [*names, "seed_everything", "output", "batch_size"]:
        assert has_effect(command, name, takes_data=False)


def test_an_option_without_effect_is_one_line_that_names_its_variable_too(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = ["--ckpt_path", str(checkpoint)]
    message = error_of(["sample", *given, "--trainer.max_steps=3"], capsys)
    assert "trainer.max_steps must be left out for sample, on which it has no effect" in message
    message = error_of(["export", *given, "--output=x", "--data.batch_size", "7"], capsys)
    assert "data.batch_size must be left out for export" in message
    monkeypatch.setenv("DDIM_PL_SAMPLE__TRAINER__MAX_STEPS", "3")
    message = error_of(["sample", *given], capsys)
    assert "has no effect (set by DDIM_PL_SAMPLE__TRAINER__MAX_STEPS)" in message
    monkeypatch.delenv("DDIM_PL_SAMPLE__TRAINER__MAX_STEPS")
    for mapping, name in [
        (["--trainer", '{"max_steps":3}'], "trainer.max_steps"),
        (["--trainer={devices: 1, callbacks: []}"], "trainer.callbacks"),
        (["--model", "{class_path: DDPM, init_args: {ema_decay: 0.5}}"], "model.ema_decay"),
    ]:
        message = error_of(["sample", *given, *mapping], capsys)
        assert f"{name} must be left out for sample" in message
    assert not list(tmp_path.iterdir())


def test_a_sweep_measures_by_the_callback_that_it_is_given(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = "ddim_pl.metrics.digits.DigitsFeatures"
    given = ["--trainer.callbacks+=callbacks.FrechetDistance"]
    given += ["--trainer.callbacks.features", features, "--trainer.callbacks.num_samples", "50"]
    more = ["--num_steps=[1]", "--num_shown", "2", "--output", "swept"]
    main(["sweep", "--ckpt_path", str(checkpoint), *given, *more])
    (table,) = (tmp_path / "swept").glob("*.md")
    assert "50" in table.read_text()


def test_a_config_may_hold_what_other_commands_use(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"model": {"init_args": {"ema_decay": 0.5}}, "trainer": {"max_steps": 3}}
    given = ["--config", write_config(config, tmp_path / "mine.yaml"), "--num_images", "1"]
    main(["sample", "--ckpt_path", str(checkpoint), *given, "--output", "drawn"])


CASES = [
    # One of three each time: reading a command line takes half a second.
    pytest.param(*case, id=case[0], marks=[pytest.mark.slow] if place % 3 else [])
    for place, case in enumerate(WRONG)
]


@pytest.mark.parametrize(("arguments", "named"), CASES)
def test_a_wrong_argument_is_one_line_that_names_it(
    arguments, named, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = checkpoint.parents[1]
    before = sorted(run.rglob("*"))
    given = [argument.replace("CK", str(checkpoint)) for argument in shlex.split(arguments)]
    if given[0] == "fit":
        given[1:1] = ["--config", str(run.parents[1] / "config.yaml")]
        given += ["--trainer.logger.save_dir", "runs"]
    text = error_of(given, capsys)
    assert text.startswith("error: "), text
    assert len(text.splitlines()) == 1, text
    assert len(text) < 500, text
    assert named in text.replace(str(checkpoint), ""), text
    assert "bug" not in text, text
    assert not list(tmp_path.iterdir())
    assert sorted(run.rglob("*")) == before


def test_an_error_that_nobody_foresaw_is_one_line_or_with_the_variable_a_traceback(
    checkpoint, monkeypatch, capsys
):
    def fails(*args, **kwargs):
        raise KeyError("two\nlines")

    monkeypatch.setattr("ddim_pl.commands.sample.to_uint8", fails)
    text = error_of(["sample", "--ckpt_path", str(checkpoint), "--num_images", "1"], capsys)
    assert "KeyError" in text
    assert "bug: set DDIM_PL_TRACEBACK=1" in text
    assert len(text.splitlines()) == 1
    monkeypatch.setenv("DDIM_PL_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["sample", "--ckpt_path", str(checkpoint), "--num_images", "1"])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing"),
        OSError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_no_bug_whoever_writes(error):
    assert run_message(error).startswith("a file cannot be written (")
    assert "bug" not in run_message(error)


def test_a_full_disk_is_one_line_that_names_the_argument(
    checkpoint, tmp_path, monkeypatch, capsys
):
    def full(image, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ddim_pl.images.write_png", full)
    given = ["--ckpt_path", str(checkpoint), "--num_images", "1", "--output", str(tmp_path)]
    text = error_of(["sample", *given], capsys)
    assert text.startswith(
        f"error: output: {tmp_path}/images/000000.png cannot be used (no space left"
    )
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize(
    "arguments",
    [
        "interpolate --num_pairs 1 --num_points 2 --output out",
        "compare --students [CK] --num_steps [2] --output out",
    ],
)
def test_commands_run_in_true_precision(arguments, precision, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = shlex.split(arguments.replace("CK", str(checkpoint)))
    main([*given, "--ckpt_path", str(checkpoint), "--trainer.precision", precision])
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_fit_trains_in_true_precision(precision, tmp_path):
    config = tiny_config(tmp_path, max_steps=1, limit_val_batches=1, precision=precision)
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1
    main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    (file,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(file, weights_only=True)["state_dict"]["network.conv_in.weight"]
    assert weights.dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)
