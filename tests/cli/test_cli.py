import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny import NETWORK, tiny_config, write_config

from ddim_pl.cli import main
from ddim_pl.images import read_png
from ddim_pl.metrics.statistics import FeatureStatistics

ROOT = Path(__file__).parents[2]
UNET = "ddim_pl.networks.unet.UNet"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished fit: its config, its folder and its last checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(tiny_config(folder), folder / "config.yaml")
    main(["fit", "--config", config])
    version = folder / "tiny" / "version_0"
    return config, version, version / "checkpoints" / "last.ckpt"


def fails(arguments, capsys):
    """Run a command that must fail, and return its one line of error."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    # Either sys.exit(message), which Python prints with status 1, or the parser's own exit.
    code = exit_info.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (0, None)
    lines = [line for line in text.strip().splitlines() if line.startswith("error")]
    assert len(lines) == 1, text
    assert len(lines[0]) < 400
    return lines[0]


def test_fit_writes_checkpoints_config_grid_and_logs(run):
    _, version, last = run
    assert last.exists()
    assert (version / "config.yaml").exists()
    assert sorted(f.name for f in (version / "samples").iterdir()) == [
        "step-0000010.png",
        "step-0000020.png",
    ]
    assert len(list(version.glob("events.out.tfevents*"))) == 1
    assert [f.name for f in version.parent.iterdir()] == ["version_0"]


def test_every_file_of_a_run_loads_with_weights_only(run):
    _, version, _ = run
    files = [f for f in version.rglob("*") if f.suffix in (".ckpt", ".pt", ".pth")]
    assert len(files) >= 4
    for file in files:
        torch.load(file, weights_only=True)
    others = {f.suffix for f in version.rglob("*") if f.is_file() and f not in files}
    assert not others & {".pkl", ".pickle", ".npy", ".npz"}


def test_the_written_config_holds_no_path_of_the_package(run):
    _, version, _ = run
    assert str(ROOT) not in (version / "config.yaml").read_text()


def test_test_prints_a_table_from_the_checkpoint_alone(run, capsys):
    _, version, last = run
    main(["test", "--ckpt_path", str(last), "--model.num_steps", "3"])
    out = capsys.readouterr().out
    assert re.search(r"network evaluations\s+3\b", out)
    assert re.search(r"test/digits_fd\s+\d", out)
    assert "DDIM(eta=0.0)" in out
    results = json.loads((version / "test-results.json").read_text())
    assert results["test/digits_fd"] > 0
    assert results["digits_fd num_samples"] == 41
    assert results["digits_fd num_real"] == 1797
    assert results["digits_fd extractor"] == "digits"
    assert re.search(r"digits_fd num_samples\s+41\b", out)
    assert (version / "samples" / "test.png").exists()
    assert [f.name for f in version.parent.iterdir()] == ["version_0"]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_predict_writes_every_image_and_a_grid(run, tmp_path):
    _, _, last = run
    moved = tmp_path / "somewhere-else.ckpt"
    moved.write_bytes(last.read_bytes())
    out = tmp_path / "out"
    main(
        [
            *("predict", "--ckpt_path", str(moved)),
            *("--data.num_predict", "7", "--data.batch_size", "3"),
            *("--trainer.callbacks=callbacks.ImageWriter", f"--trainer.callbacks.folder={out}"),
            f"--trainer.logger.save_dir={tmp_path}",
        ]
    )
    assert sorted(f.name for f in out.iterdir()) == ["grid.png", "images", "manifest.json"]
    assert sorted(f.name for f in (out / "images").iterdir()) == [f"{i:06d}.png" for i in range(7)]


def test_last_is_the_newest_checkpoint_of_the_experiment(run, tmp_path, monkeypatch, capsys):
    config, _, last = run
    monkeypatch.chdir(tmp_path)
    for age, place in enumerate(("mine/version_1", "mine/version_0", "other/version_0")):
        file = tmp_path / "runs" / place / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.write_bytes(last.read_bytes())
        os.utime(file, (1000 + age, 1000 + age))
    logger = ["--trainer.logger.save_dir=runs", "--trainer.logger.name=mine"]
    main(["validate", "--config", config, *logger, "--ckpt_path", "last"])
    assert str(Path("mine/version_0/checkpoints/last.ckpt")) in capsys.readouterr().out
    main(["validate", "--ckpt_path", "last"])
    assert str(Path("other/version_0/checkpoints/last.ckpt")) in capsys.readouterr().out


def test_predicting_fewer_images_leaves_none_of_an_earlier_set(run):
    _, version, last = run
    for count in (9, 4):
        main(["predict", "--ckpt_path", str(last), "--data.num_predict", str(count)])
    files = sorted(f.name for f in (version / "predict" / "images").iterdir())
    assert files == [f"{i:06d}.png" for i in range(4)]


@pytest.mark.slow
def test_a_moved_checkpoint_of_a_resumed_run_begins_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tiny_config(tmp_path / "runs"), tmp_path / "config.yaml")
    main(["fit", "--config", config, "--trainer.max_epochs", "1"])
    main(["fit", "--config", config, "--ckpt_path", "last"])
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes())
    main(["fit", "--ckpt_path", str(moved), "--trainer.max_epochs", "3"])
    assert sorted(f.name for f in (tmp_path / "runs/tiny").iterdir()) == ["version_0", "version_1"]


def test_fit_goes_on_in_the_same_run(tmp_path):
    config = write_config(tiny_config(tmp_path), tmp_path / "config.yaml")
    main(["fit", "--config", config, "--trainer.max_epochs", "1"])
    main(["fit", "--config", config, "--ckpt_path", "last"])
    version = tmp_path / "tiny" / "version_0"
    state = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 20
    assert (version / "config-resumed.yaml").exists()
    assert [f.name for f in version.parent.iterdir()] == ["version_0"]


def test_going_on_says_what_is_other_than_before_and_that_nothing_is_left(tmp_path, caplog):
    config = write_config(tiny_config(tmp_path), tmp_path / "config.yaml")
    more = ["fit", "--config", config]
    main([*more, "--trainer.max_epochs", "1"])
    logger = "lightning.pytorch.utilities.rank_zero"
    caplog.set_level("INFO", logger=logger)

    def said(*arguments):
        caplog.clear()
        main([*more, "--ckpt_path", "last", *arguments])
        return [each.getMessage() for each in caplog.records if each.name == logger]

    other = said("--trainer.max_epochs", "2", "--data.batch_size", "24", "--model.clip", "false")
    note = next(each for each in other if each.startswith("goes on with other settings"))
    assert "data.batch_size: 32 -> 24" in note
    assert "model.clip: True -> False" in note
    assert "max_epochs" not in note
    same = said("--data.batch_size", "24", "--model.clip", "false", "--trainer.max_epochs", "2")
    assert not any(each.startswith("goes on") for each in same)
    left = next(each for each in same if each.startswith("nothing was left to train"))
    assert "at update 20, the end by trainer.max_epochs=2;" in left


@pytest.mark.slow
def test_two_processes_train_and_measure_what_one_process_does(run, tmp_path):
    config, _, last = run
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, ROOT / "main.py", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fresh = yaml.safe_load(Path(config).read_text())
    fresh["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    fresh = write_config(fresh, tmp_path / "config.yaml")
    command("fit", "--config", fresh, "--trainer.devices", "2")
    version = tmp_path / "tiny" / "version_0"
    assert [f.name for f in version.parent.iterdir()] == ["version_0"]
    assert len(list(version.glob("events.out.tfevents*"))) == 1
    state = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(v.isfinite().all() for v in state["state_dict"].values())
    mean, covariance = torch.zeros(32).double(), torch.eye(32).double()
    FeatureStatistics(mean, covariance, extractor="digits").write(tmp_path / "real.npz")
    by_file = ["--trainer.callbacks+=callbacks.FrechetDistance"]
    by_file += ["--trainer.callbacks.statistics", "real.npz"]
    values = []
    for devices, more in product(("1", "2"), ([], by_file)):
        common = ["--ckpt_path", str(last), "--trainer.devices", devices]
        out = command("test", *common, "--trainer.limit_test_batches", "1.0", *more)
        values.append(
            {
                name: float(re.search(rf"{name}\s+(\S+)", out).group(1))
                for name in ("test/digits_fd", "test/loss")
            }
        )
    # The features are summed in another order, and printed with four digits.
    distances = [each["test/digits_fd"] for each in values]
    assert distances[:2] == pytest.approx(distances[2:], rel=2e-3)
    assert distances[0] != pytest.approx(distances[1], rel=0.1)
    # Each process has its own noise for the loss.
    assert values[0]["test/loss"] == pytest.approx(values[2]["test/loss"], rel=0.2)
    for devices in ("1", "2"):
        common = ["--ckpt_path", str(last), "--trainer.devices", devices]
        stochastic = ["--model.noise_source", "philox", "--model.sampler.eta", "1"]
        command("sample", *common, *stochastic, "--num_images", "5", "--output", devices)
    files = sorted(tmp_path.glob("1/**/00*.png"))
    assert len(files) == 5
    for file in files:
        other = tmp_path / "2" / file.relative_to(tmp_path / "1")
        difference = read_png(file).int() - read_png(other).int()
        assert difference.abs().max() <= 1  # convolutions of another batch size


# ---- bad input --------------------------------------------------------------------------------


def change(config, **paths):
    for path, value in paths.items():
        *parents, name = path.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return config


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"model__init_args__num_stepz": 5}, "num_stepz"),
        ({"trainer__max_step": 5}, "max_step"),
        ({"modle": {"network": 1}}, "modle"),
        ({"model__init_args__network__init_args": {**NETWORK, "image_size": 7}}, "image_size"),
        ({"model__init_args__num_steps": 1001}, "num_steps must lie in"),
        ({"model__init_args__sampler__init_args__eta": 1.5}, "eta must lie in"),
        ({"model__init_args__timesteps": "kwadratic"}, "timesteps must be one of"),
        (
            {"model__init_args__network__init_args": {**NETWORK, "in_channels": 3}},
            "the data has images of shape .1, 8, 8.",
        ),
        (
            {"model__init_args__network__init_args": {**NETWORK, "num_classes": 9}},
            "the data has 10 classes",
        ),
        (
            {
                "data__class_path": "ddim_pl.data.cifar10.CIFAR10DataModule",
                "data__init_args": {"root": "nowhere", "download": False},
            },
            "cifar-10-python.tar.gz",
        ),
        (
            {
                "data__class_path": "ddim_pl.data.image_folder.ImageFolderDataModule",
                "data__init_args": {"root": "nowhere", "image_size": 8},
            },
            "nowhere",
        ),
    ],
)
def test_wrong_config_is_one_line_of_error_and_leaves_no_run(paths, message, tmp_path, capsys):
    config = change(tiny_config(tmp_path / "runs"), **paths)
    line = fails(["fit", "--config", write_config(config, tmp_path / "config.yaml")], capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "runs").exists()


def test_a_network_of_classes_is_not_trained_without_labels(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "0.png")
    folder = "ddim_pl.data.image_folder.ImageFolderDataModule"
    data = {"root": str(tmp_path / "images"), "image_size": 8, "channels": 1}
    config = change(
        tiny_config(tmp_path / "runs"),
        data__class_path=folder,
        data__init_args=data,
        model__init_args__network__init_args={**NETWORK, "num_classes": 9},
    )
    line = fails(["fit", "--config", write_config(config, tmp_path / "config.yaml")], capsys)
    assert "the data has no classes, or one, but the network num_classes=9" in line
    assert not (tmp_path / "runs").exists()


def images_of_classes(folder):
    """Images in two subfolders, and the arguments of a fit on them."""
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "images" / name / "0.png")
    config = tiny_config(folder / "runs", max_steps=1, limit_val_batches=0, callbacks=[])
    config["data"] = {
        "class_path": "ddim_pl.data.image_folder.ImageFolderDataModule",
        "init_args": {
            **{"root": str(folder / "images"), "image_size": 8, "channels": 1},
            **{"batch_size": 2, "steps_per_epoch": 1},
        },
    }
    return config


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_labels_that_a_network_does_not_take_are_warned_of(
    tmp_path, monkeypatch, recwarn, by_file, num_classes
):
    monkeypatch.chdir(tmp_path)
    config = images_of_classes(tmp_path)
    if by_file:
        Path("labels.txt").write_text("cat/0.png 1\ndog/0.png 0\n")
        config["data"]["init_args"]["labels"] = "labels.txt"
    config["model"]["init_args"]["network"]["init_args"]["num_classes"] = num_classes
    main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    said = [str(each.message) for each in recwarn if "no effect" in str(each.message)]
    expected = (
        "data.labels labels.txt has no effect: the network has num_classes=null and takes no "
        "labels; set it to 2 to train on them, or leave the labels out"
    )
    assert said == ([expected] if by_file and num_classes is None else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test", "--ckpt_path", "nowhere.ckpt"], "got nowhere.ckpt, which is not a file"),
        (["test", "--config", "CONFIG"], "needs --ckpt_path"),
        (["test", "--config", "CONFIG", "--ckpt_path", "last"], "run fit first"),
        (
            ["fit", "--config", "CONFIG", "--ckpt_path", "nowhere.ckpt"],
            "got nowhere.ckpt, which is not a file",
        ),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fti"], "fti"),
    ],
)
def test_wrong_command_is_one_line_of_error(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tiny_config(tmp_path / "runs"), tmp_path / "config.yaml")
    line = fails([config if a == "CONFIG" else a for a in arguments], capsys)
    assert message in line, line
    assert not (tmp_path / "runs").exists()


def test_pairs_are_asked_for_before_a_run_of_luhmans_begins(run, tmp_path, capsys):
    _, _, last = run
    config = tiny_config(tmp_path / "runs")
    config["model"] = {
        "class_path": "ddim_pl.training.LuhmanDistillation",
        "init_args": {"teacher": str(last), "teacher_num_steps": 4},
    }
    line = fails(["fit", "--config", write_config(config, tmp_path / "config.yaml")], capsys)
    assert re.search("must be .*TeacherPairsDataModule", line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": {"class_path": UNET, "init_args": {**NETWORK, "channels": 12}}}, "network"),
        ({"rounds": [[4, 2], [1, 2]]}, "rounds must halve the steps"),
        ({"teacher": "gone.ckpt"}, "got 'gone.ckpt', which is no file"),
        ({"prediction": "both"}, "'both' reads 2 channels"),
    ],
)
def test_a_ladder_that_cannot_begin_leaves_no_run(run, tmp_path, capsys, arguments, message):
    _, _, last = run
    config = tiny_config(tmp_path / "runs")
    settings = {"teacher": str(last), "rounds": [[4, 2], [2, 2]], "teacher_prediction": "eps"}
    config["model"] = {
        "class_path": "ddim_pl.training.ProgressiveDistillation",
        "init_args": {**settings, **arguments},
    }
    line = fails(["fit", "--config", write_config(config, tmp_path / "config.yaml")], capsys)
    assert message in line, line
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_network_is_one_line_of_error(run, tmp_path, capsys):
    config, _, last = run
    other = yaml.safe_load(Path(config).read_text())
    other["model"]["init_args"]["network"]["init_args"] = {**NETWORK, "channels": 12}
    path = write_config(other, tmp_path / "config.yaml")
    line = fails(["test", "--config", path, "--ckpt_path", str(last)], capsys)
    assert "does not fit" in line


def test_a_file_that_is_no_checkpoint_is_one_line_of_error(tmp_path, capsys):
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"not a checkpoint")
    assert "x.ckpt" in fails(["test", "--ckpt_path", str(file)], capsys)
