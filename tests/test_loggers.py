"""Scalars, images and settings reach every logger, and a run that goes on is the same in each."""

import csv
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import yaml
from fake_trackers import files_below, install_mlflow, install_wandb
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tiny import tiny_config, write_config

from ddim_pl.cli import main
from ddim_pl.loggers import flat_settings, log_image, remembered_runs, run_folder

LOGGERS = "lightning.pytorch.loggers"


def logger(name, /, **arguments):
    return {"class_path": f"{LOGGERS}.{name}", "init_args": arguments}


def small_config(folder, loggers, name="config.yaml"):
    """A fit of five updates with one validation, a grid of it, and nothing else that is slow."""
    config = tiny_config(folder / "runs", max_epochs=1)
    config["data"]["init_args"] |= {"steps_per_epoch": 5, "num_predict": 2, "batch_size": 8}
    config["trainer"] |= {"logger": loggers, "limit_val_batches": 1, "limit_test_batches": 1}
    config["trainer"]["callbacks"] = [
        each
        for each in config["trainer"]["callbacks"]
        if not each["class_path"].endswith(("FrechetDistance", "Throughput"))
    ]
    return write_config(config, folder / name)


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins: the list of W&B's runs, and MLflow's runs by id."""
    return install_wandb(monkeypatch), install_mlflow(monkeypatch)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def every_logger():
    files = {"save_dir": "runs", "name": "tiny"}
    return [
        logger("WandbLogger", project="p", save_dir="runs"),  # not in front, where folders are
        logger("TensorBoardLogger", **files),
        logger("MLFlowLogger", experiment_name="e", tracking_uri="http://nowhere"),
        logger("CSVLogger", **files),
    ]


def events(version):
    return EventAccumulator(str(version)).Reload()


def table(version):
    return list(csv.DictReader((version / "metrics.csv").read_text().splitlines()))


def test_scalars_images_and_settings_reach_every_logger(here, trackers):
    wandb, mlflow = trackers
    config = small_config(here, every_logger())
    main(["fit", "--config", config])
    main(["test", "--config", config, "--ckpt_path", "last"])
    main(["predict", "--config", config, "--ckpt_path", "last"])
    version = here / "runs/tiny/version_0"
    assert [each.name for each in version.parent.iterdir()] == ["version_0"]
    # TensorBoard
    found = events(version)
    assert {"val/loss", "test/loss"} <= {*found.Tags()["scalars"]}
    assert {*found.Tags()["images"]} == {"samples", "test/samples", "predict/grid"}
    # CSV: paths from the table to the files
    rows = table(version)
    for tag in ("val/loss", "test/loss"):
        assert any(float(row[tag]) > 0 for row in rows if row[tag])
    paths = [row[tag] for row in rows for tag in found.Tags()["images"] if row[tag]]
    assert sorted(paths) == ["predict/grid.png", "samples/step-0000005.png", "samples/test.png"]
    assert all((version / path).is_file() for path in paths)
    # W&B: one run, by its id, in three processes
    assert {run.id for run in wandb} == {"abc0"}
    logged = {name: value for run in wandb for each in run.logged for name, value in each.items()}
    assert {"val/loss", "test/loss", "samples", "test/samples", "predict/grid"} <= logged.keys()
    # MLflow
    (run,) = mlflow.values()
    assert {"val/loss", "test/loss"} <= run.data.metrics.keys()
    sizes = {logged["samples"][0]}
    assert {(tag, step) for tag, step, _ in run.data.images} == {
        *(("samples", 5), ("test/samples", 5), ("predict/grid", 5))
    }
    assert sizes == {size for tag, _, size in run.data.images if tag == "samples"}
    # The settings of a fit, under flat names
    for settings in (wandb[0].settings, yaml.safe_load((version / "hparams.yaml").read_text())):
        assert settings["model.network.channels"] == 8
        assert settings["model"] == "DDPM"
        assert settings["data.batch_size"] == 8
    assert run.data.params["model.optimizer.lr"] == "0.001"


def test_tensorboard_shows_settings_beside_every_metric_of_the_run(here):
    """As its own plugin computes what the tab shows."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import backend_context

    config = small_config(here, every_logger()[1])
    main(["fit", "--config", config])
    main(["test", "--config", config, "--ckpt_path", "last"])
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory("runs")
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, "runs")
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = RequestContext()
    content = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, content, None)
    names = {each.name for each in experiment.hparam_infos}
    assert {"model", "model.network.channels", "trainer.max_epochs"} <= names
    assert not any("logger" in name or "callbacks" in name for name in names)
    metrics = {each.name.tag for each in experiment.metric_infos}
    assert {"val/loss", "test/loss"} <= metrics
    assert "hp_metric" not in metrics
    (run,) = content.values()
    begun = metadata.parse_session_start_info_plugin_data(run[metadata.SESSION_START_INFO_TAG])
    assert begun.hparams["model.network.channels"].number_value == 8


def test_a_resumed_run_goes_on_in_the_runs_that_loggers_keep(here, trackers):
    wandb, mlflow = trackers
    config = small_config(here, every_logger())
    main(["fit", "--config", config])
    version = here / "runs/tiny/version_0"
    assert remembered_runs(version) == {"WandbLogger": ["abc0"], "MLFlowLogger": ["run0"]}
    more = ["--trainer.max_epochs", "2"]
    main(["fit", "--config", config, "--ckpt_path", "last", *more])
    assert [run.id for run in wandb] == ["abc0", "abc0"]
    assert wandb[1].arguments["resume"] == "allow"
    (run,) = mlflow.values()
    # MLflow refuses to change a parameter.
    assert run.data.params["trainer.max_epochs"] == "1"
    assert run.data.tags == {"resumed.trainer.max_epochs": 2}
    main(["fit", "--config", config])  # a run of its own
    assert [run.id for run in wandb] == ["abc0", "abc0", "abc1"]
    assert [*mlflow] == ["run0", "run1"]


def test_a_run_begun_from_another_experiments_checkpoint_is_a_new_one(here, trackers):
    wandb, _ = trackers
    config = small_config(here, every_logger())
    main(["fit", "--config", config])
    file = "runs/tiny/version_0/checkpoints/last.ckpt"
    loggers = every_logger()
    loggers[1]["init_args"]["name"] = loggers[3]["init_args"]["name"] = "other"
    other = small_config(here, loggers, "other.yaml")
    main(["fit", "--config", other, "--ckpt_path", file, "--trainer.max_epochs", "2"])
    assert [run.id for run in wandb] == ["abc0", "abc1"]
    assert remembered_runs(here / "runs/other/version_0")["WandbLogger"] == ["abc1"]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (logger("WandbLogger", project="p"), "p"),
        (logger("WandbLogger", name="mine"), "mine"),
        (logger("MLFlowLogger", experiment_name="e", tracking_uri="http://nowhere"), "e"),
        (logger("CSVLogger", save_dir="runs", name="c"), "c"),
    ],
)
def test_last_is_found_with_any_logger_alone(here, trackers, given, folder):
    """Where a logger has no folder for a run, a CSVLogger has."""
    config = small_config(here, given)
    main(["fit", "--config", config])
    version = here / "runs" / folder / "version_0"
    assert (version / "checkpoints/last.ckpt").is_file()
    assert table(version)
    main(["test", "--config", config, "--ckpt_path", "last"])
    assert json.loads((version / "test-results.json").read_text())["test/loss"] > 0
    assert (version / "samples/test.png").is_file()
    assert not files_below(here, "version_1")


def test_a_checkpoint_alone_sends_nothing_and_its_results_are_in_its_run(here, trackers):
    config = small_config(here, logger("WandbLogger", project="p"))
    main(["fit", "--config", config])
    version = here / "runs/p/version_0"
    main(["test", "--ckpt_path", "last"])
    main(["sample", "--ckpt_path", "last", "--num_images", "2", "--trust"])
    assert len(trackers[0]) == 1
    assert (version / "test-results.json").is_file()
    assert (version / "sample").is_dir()


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_last_is_found_where_lightning_alone_puts_it(here, trackers, name):
    """In W&B's `save_dir/project/id`, and among the files of MLflow."""
    config = small_config(here, logger("CSVLogger", save_dir="elsewhere", name="c"))
    main(["fit", "--config", config])
    place = here / ("w/p/abc" if name == "WandbLogger" else "m/77/abc")
    place.mkdir(parents=True)
    (here / "elsewhere/c/version_0/checkpoints").rename(place / "checkpoints")
    (place.parent / "meta.yaml").write_text("name: e\n")
    given = (
        logger(name, project="p", save_dir="w")
        if name == "WandbLogger"
        else logger(name, experiment_name="e", save_dir="m")
    )
    main(["test", "--config", small_config(here, given), "--ckpt_path", "last"])
    found = [*here.rglob("test-results.json")]
    assert [json.loads(each.read_text())["checkpoint"] for each in found] == [
        str((place / "checkpoints/last.ckpt").relative_to(here))
    ]


@pytest.mark.parametrize("given", ["false", "true"])
def test_last_needs_a_logger_with_a_folder(here, given, capsys):
    config = small_config(here, every_logger()[1])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, "--trainer.logger", given, "--ckpt_path", "last"])
    assert "--ckpt_path last needs a logger that names the experiment's folder" in str(stop.value)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")]
)
def test_a_missing_package_is_named_with_what_installs_it(here, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "ddim_pl.loggers.find_spec", lambda found: None if found == package else find(found)
    )
    config = small_config(here, logger(name))
    with pytest.raises(SystemExit, match=rf"pip install 'ddim_pl\[{package}\]'"):
        main(["fit", "--config", config])
    assert not (here / "runs").exists()


def test_a_logger_that_cannot_be_made_says_why(here, trackers, monkeypatch, capsys):
    """Though jsonargparse first says that a list of loggers is no logger."""

    def refuse(uri):
        raise RuntimeError(f"no files at {uri}")

    monkeypatch.setattr(sys.modules["mlflow.tracking"], "MlflowClient", refuse)
    config = small_config(here, [logger("MLFlowLogger", save_dir="m")])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config])
    assert stop.value.code == "error: no files at file:m"
    assert not (here / "runs").exists()


def test_settings_are_flat():
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "a.DDPM",
            "init_args": {
                "clip": True,
                "ema": None,
                "network": {"class_path": "b.UNet", "init_args": {"multipliers": [1, 2]}},
            },
            "dict_kwargs": {"x": 0.5},
        },
        "trainer": {"max_steps": 5, "logger": [{"class_path": "c.D"}], "callbacks": [1]},
    }
    assert flat_settings(config) == {
        "seed_everything": 3,
        "model": "DDPM",
        "model.clip": True,
        "model.network": "UNet",
        "model.network.multipliers": "[1, 2]",
        "model.x": 0.5,
        "trainer.max_steps": 5,
    }


def test_a_logger_that_takes_no_images_is_left_alone(tmp_path):
    class Plain(CSVLogger.__mro__[1]):  # Lightning's base
        name, version = "plain", "0"

        def log_metrics(self, metrics, step=None):
            raise AssertionError

        def log_hyperparams(self, params):
            raise AssertionError

    log_image([Plain()], "samples", tmp_path / "a.png", 1)


def test_the_folder_of_a_run_is_where_its_checkpoints_are(tmp_path, trackers):
    """Also of loggers whose `log_dir` all runs share."""
    loggers = {
        TensorBoardLogger(tmp_path, name="t"): tmp_path / "t/version_0",
        CSVLogger(tmp_path, name="c"): tmp_path / "c/version_0",
        WandbLogger(project="p", save_dir=tmp_path): tmp_path / "p/abc0",
        MLFlowLogger("e", save_dir=str(tmp_path)): tmp_path / "1/run0",
    }
    for given, folder in loggers.items():
        trainer = L.Trainer(accelerator="cpu", logger=given, enable_model_summary=False)
        assert run_folder(trainer) == folder
        files = trainer.checkpoint_callback
        files.setup(trainer, None, "validate")
        assert Path(files.dirpath) == folder / "checkpoints"
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert run_folder(trainer) == tmp_path


# ---- with the real packages, where they are installed ----------------------------------------


def test_wandb_itself_takes_what_it_is_given(here, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small_config(here, logger("WandbLogger", project="p", save_dir="runs"))
    more = ["--trainer.max_epochs", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["fit", "--config", config])
        assert wandb.run.config["model.network.channels"] == 8
        assert wandb.run.summary["val/loss"] > 0
        wandb.finish()
        main(["fit", "--config", config, "--ckpt_path", "last", *more])
        wandb.finish()
        main(["test", "--config", config, "--ckpt_path", "last"])
        assert wandb.run.summary["test/loss"] > 0
        wandb.finish()
    (name,) = remembered_runs(here / "runs/p/version_0")["WandbLogger"]
    files = files_below(here / "runs/wandb", "run-*.wandb")
    assert {*files} == {f"run-{name}.wandb"}
    # A fit that goes on from its last checkpoint makes the validation after it again.
    assert len(files_below(here / "runs/wandb", "samples_*.png")) == 4


def test_mlflow_itself_takes_what_it_is_given(here):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{here}/mlflow.db"
    given = logger("MLFlowLogger", experiment_name="e", tracking_uri=uri)
    config = small_config(here, given)
    more = ["--trainer.max_epochs", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["fit", "--config", config])
        main(["fit", "--config", config, "--ckpt_path", "last", *more])
        main(["test", "--config", config, "--ckpt_path", "last"])
        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri)
        (name,) = remembered_runs(here / "runs/e/version_0")["MLFlowLogger"]
        run = client.get_run(name)
        images = [each.path for each in client.list_artifacts(name, "images")]
    assert run.data.params["model.network.channels"] == "8"
    assert run.data.tags["resumed.trainer.max_epochs"] == "2"
    assert {"val/loss", "test/loss"} <= run.data.metrics.keys()
    assert sum(path.endswith(".png") for path in images) == 4  # as above
    assert len(client.search_runs([run.info.experiment_id])) == 1
