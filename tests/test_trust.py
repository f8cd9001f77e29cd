"""Attacks by a checkpoint: none runs code, none says where a file is written."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_config, write_config

import ddim_pl
from ddim_pl.cli import main
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.images import write_png
from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.runs import checkpoint_config
from ddim_pl.training import DDPM
from ddim_pl.training.hyperparameters import CONFIG_KEY
from ddim_pl.trust import (
    ENVIRONMENT,
    LOGGER,
    UntrustedError,
    _each,
    is_trusted,
    trusted_class,
    trusting,
)

POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "pwned"]}}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A checkpoint of a short fit."""
    folder = tmp_path_factory.mktemp("honest")
    main(["fit", "--config", write_config(tiny_config(folder, max_epochs=1), folder / "c.yaml")])
    path = folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to work in, into which nothing may be written but by a command's own output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('pwned', 'w').close()\nclass Net: pass\n")
    before = set(tmp_path.iterdir())
    yield tmp_path
    assert not (tmp_path / "pwned").exists()
    sys.modules.pop("evil", None)
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "evil.ckpt", tmp_path / "evil-run"}


def attacked(checkpoint, attack):
    """The checkpoint after an attack on its config and its hyperparameters."""
    checkpoint = copy.deepcopy(checkpoint)
    config = yaml.safe_load(checkpoint[CONFIG_KEY])
    attack(config, checkpoint["hyper_parameters"])
    checkpoint[CONFIG_KEY] = yaml.safe_dump(config)
    torch.save(checkpoint, "evil.ckpt")
    return "evil.ckpt"


def replace_network(value):
    def attack(config, hyper):
        config["model"]["init_args"]["network"] = value
        hyper["network"] = value

    return attack


def linear_with(name, value):
    arguments = {"in_features": 1, "out_features": 1, name: value}
    return {"class_path": "torch.nn.Linear", "init_args": arguments}


def set_model(name, value):
    def attack(config, hyper):
        config["model"]["init_args"][name] = value
        hyper[name] = value

    return attack


def set_trainer(name, value):
    return lambda config, hyper: config["trainer"].update({name: value})


def set_logger(name, value):
    def attack(config, hyper):
        logger = config["trainer"]["logger"]
        (logger[0] if isinstance(logger, list) else logger)["init_args"][name] = value

    return attack


def set_callbacks(**values):
    """Set these arguments wherever a callback has them."""

    def attack(config, hyper):
        for callback in config["trainer"]["callbacks"]:
            arguments = callback.get("init_args", {})
            arguments |= {name: value for name, value in values.items() if name in arguments}

    return attack


CODE = {
    "a class of the standard library": replace_network(POPEN),
    "one inside an argument of any type": replace_network(linear_with("device", POPEN)),
    "one inside a keyword argument": set_logger("purge_step", POPEN),
    "dict_kwargs": set_logger("dict_kwargs", {"x": POPEN}),
    "a module beside the checkpoint": replace_network({"class_path": "evil.Net"}),
    "its name alone": replace_network("evil.Net"),
    "YAML inside a text": replace_network("{class_path: subprocess.Popen, init_args: {args: ls}}"),
    "a name that a trusted module imports": replace_network(
        {"class_path": "ddim_pl.files.tempfile.NamedTemporaryFile"}
    ),
    "a class that a trusted module imports": replace_network({"class_path": "ddim_pl.runs.Path"}),
    "a function of a trusted module": replace_network({"class_path": "ddim_pl.cli.main"}),
    "an object of another kind": set_model("sampler", {"class_path": "torch.nn.Identity"}),
    "an optimiser of another package": set_model("optimizer", POPEN),
    "a callback": set_trainer("callbacks", [POPEN]),
    "a function for a callback": set_trainer(
        "callbacks",
        [
            {
                "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                "init_args": {"setup": "os.system"},
            }
        ],
    ),
    "a plugin": set_trainer("plugins", [POPEN]),
    "a profiler": set_trainer("profiler", POPEN),
    "the model": lambda config, hyper: config["model"].update(POPEN),
    "the data": lambda config, hyper: config["data"].update(POPEN),
    "a class path that is no text": replace_network({"class_path": ["os", "system"]}),
}
ELSEWHERE = "lightning.pytorch.loggers.CSVLogger"
HIDDEN = {
    "a logger in a text with an escaped name": set_trainer(
        "logger",
        '{"class\\u005fpath": "%s", "init_args": {"save_dir": "elsewhere"}}' % ELSEWHERE,  # noqa: UP031
    ),
    "a text in a text": set_trainer("logger", yaml.safe_dump([yaml.safe_dump(POPEN)])),
    "a dotted name": set_trainer(
        "logger", {"class_path": ELSEWHERE, "init_args.save_dir": "elsewhere"}
    ),
    "a list that is added": set_trainer(
        "callbacks+",
        [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "elsewhere"},
            }
        ],
    ),
    "a logger that sends": set_trainer(
        "logger",
        {
            "class_path": "lightning.pytorch.loggers.CometLogger",
            "init_args": {"workspace": "elsewhere"},
        },
    ),
    "a network that reads a pickle": replace_network(
        {
            "class_path": "torchmetrics.image.fid.NoTrainInceptionV3",
            "init_args": {
                **{"name": "inception-v3-compat", "features_list": ["64"]},
                "feature_extractor_weights_path": "weights.pth",
            },
        }
    ),
    "a trainer that is no mapping": lambda config, hyper: config.update(trainer="x"),
    "data that is no mapping": lambda config, hyper: config.update(data="x"),
}
CODE |= HIDDEN
IN_HYPERPARAMETERS = [
    name
    for name in CODE
    if "network" in name
    or name
    in (
        "a class of the standard library",
        "one inside an argument of any type",
        "a module beside the checkpoint",
        "a name that a trusted module imports",
        "a class that a trusted module imports",
        "a function of a trusted module",
        "an object of another kind",
        "an optimiser of another package",
        "a class path that is no text",
    )
]


# All commands read a checkpoint's config by one function.
@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("sample", name) for name in CODE),
        *(("test", name) for name in list(CODE)[::6]),
        *(("fit", name) for name in [*list(CODE)[2::6], "a dotted name", "a list that is added"]),
    ],
)
def test_a_command_runs_no_code_of_a_checkpoint(honest, alone, capsys, command, name):
    path = attacked(honest, CODE[name])
    with pytest.raises(SystemExit) as stop:
        main([command, "--ckpt_path", path])
    line = str(stop.value.code) + capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert len(line.strip().splitlines()) == 1, line


@pytest.mark.parametrize("kind", ["MLFlowLogger", "mlflow.MLFlowLogger", "WandbLogger"])
def test_a_checkpoint_does_not_say_where_logs_are_sent(honest, alone, monkeypatch, caplog, kind):
    path = f"lightning.pytorch.loggers.{kind}"
    sender = {"class_path": path, "init_args": {"save_dir": POPEN}}
    file = Path(attacked(honest, set_trainer("logger", sender)))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        config = checkpoint_config(file, "test")
    assert "which is left out, as it sends what it logs: give the config" in caplog.text
    assert [each["class_path"] for each in _each(config["trainer"]["logger"])] == [LOGGER]
    both = [{"class_path": ELSEWHERE, "init_args": {"save_dir": "runs", "name": "mine"}}, sender]
    file = Path(attacked(honest, set_trainer("logger", both)))
    assert checkpoint_config(file, "test")["trainer"]["logger"] == both[:1]
    monkeypatch.setenv(ENVIRONMENT, "lightning.pytorch.loggers")
    with pytest.raises(UntrustedError, match=r"subprocess\.Popen"):
        checkpoint_config(file, "test")


@pytest.mark.parametrize("name", IN_HYPERPARAMETERS)
def test_hyperparameters_run_no_code(honest, alone, capsys, name):
    path = attacked(honest, CODE[name])
    for read in (ddim_pl.load, DDPM.load_from_checkpoint):
        with pytest.raises(ValueError, match=r"refused|must be|cannot be imported"):
            read(path)
    config = tiny_config(alone / "runs")
    config["model"] = {
        "class_path": "ddim_pl.training.ProgressiveDistillation",
        "init_args": {"teacher": path, "rounds": [[4, 2], [2, 2]]},
    }
    Path("evil.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "evil.yaml"])
    Path("evil.yaml").unlink()
    assert "teacher" in str(stop.value.code)
    torch.save(honest, "honest.ckpt")
    with pytest.raises(SystemExit, match="students"):
        main(["compare", "--ckpt_path", "honest.ckpt", "--students", f"[{path}]"])
    Path("honest.ckpt").unlink()


def test_another_instantiator_is_not_called(honest, alone):
    path = attacked(honest, lambda config, hyper: hyper.update(_instantiator="os.system"))
    assert isinstance(ddim_pl.load(path), DDPM)


def test_only_seed_trainer_model_and_data_come_from_a_checkpoint(honest, alone):
    (alone / "precious").write_text("precious")
    path = attacked(honest, lambda config, hyper: config.update(output="precious", num_images=1))
    main(["sample", "--ckpt_path", path, "--num_images", "2"])
    assert (alone / "precious").read_text() == "precious"
    assert len(list(alone.glob("evil-run/**/0*.png"))) == 2
    (alone / "precious").unlink()


@pytest.mark.parametrize(
    "attack",
    [
        set_trainer("default_root_dir", "elsewhere"),
        set_logger("save_dir", "elsewhere"),
        set_logger("name", "../elsewhere"),
        set_logger("sub_dir", "../../../elsewhere"),
        set_callbacks(folder="elsewhere", dirpath="elsewhere", filename="../../../elsewhere/x"),
        set_callbacks(filename="{step:c}{step:c}/elsewhere", auto_insert_metric_name=False),
        set_callbacks(filename="{/elsewhere/x}"),
        set_trainer("logger", True),
        set_trainer("logger", False),
        set_trainer("logger", []),
    ],
)
@pytest.mark.parametrize(
    "command", ["predict", pytest.param("test", marks=pytest.mark.slow), "fit"]
)
def test_a_checkpoint_does_not_say_where_files_go(honest, tmp_path, monkeypatch, attack, command):
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    path = attacked(honest, attack)
    extra = ["--trainer.max_epochs", "2"] if command == "fit" else []
    try:
        main([command, "--ckpt_path", path, *extra])
    except SystemExit as stop:
        assert "--trust" in str(stop.code)  # noqa: PT017
    assert not list(tmp_path.rglob("elsewhere"))
    found = {each.name for each in inside.iterdir()} - {"evil.ckpt"}
    assert found <= {"runs", "evil-run"}


@pytest.mark.parametrize("cache", ["elsewhere", "{}/elsewhere", "runs/../elsewhere", "runs/maps"])
def test_a_checkpoint_does_not_say_where_images_are_kept(honest, tmp_path, monkeypatch, cache):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8, generator=generator)
    for number, image in enumerate(pixels):
        write_png(image, Path(f"images/{number}.png"))

    def attack(config, hyper):
        arguments = {"root": "images", "image_size": 8, "channels": 1}
        config["data"] = {
            "class_path": "ddim_pl.data.image_folder.ImageFolderDataModule",
            "init_args": {**arguments, "batch_size": 50, "cache": cache.format(tmp_path)},
        }

    path = attacked(honest, attack)
    quick = ["--trainer.log_every_n_steps", "1"]
    fit = ["fit", "--ckpt_path", path, *quick, "--trainer.max_epochs", "2"]
    if cache == "runs/maps":
        main(fit)
        assert list(inside.glob("runs/maps/*.npy"))
        return
    with pytest.warns(UserWarning, match="which is left out, as it does not lie below runs"):
        main(fit)
    assert not list(tmp_path.rglob("elsewhere"))
    with pytest.warns(UserWarning, match="which is left out"):
        main([*fit[:-1], "3", "--data.cache", "mine"])  # what the user says is done
    assert list(inside.glob("mine/*.npy"))


def test_a_checkpoint_does_not_say_which_files_are_removed(honest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    precious = tmp_path / "precious"
    checkpoint = copy.deepcopy(honest)
    (state,) = (s for key, s in checkpoint["callbacks"].items() if "ModelCheckpoint" in key)
    del state["dirpath"]
    for place in (f"local://{precious}", str(precious), f"{tmp_path}/runs/../precious/file"):
        precious.mkdir(exist_ok=True)
        (precious / "file").write_text("precious")
        state |= {name: place for name in state if name.endswith("_model_path")}
        state["best_k_models"] = {place: torch.tensor(1.0)}
        torch.save(checkpoint, "evil.ckpt")
        main(["fit", "--ckpt_path", "evil.ckpt", "--trainer.max_epochs", "2"])
        assert (precious / "file").read_text() == "precious"


def test_weights_of_a_feature_extractor_are_no_pickle_that_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    path = tmp_path / "weights.pth"
    torch.save(Evil(), path)
    with pytest.raises(ValueError, match="could not be read"):
        InceptionFeatures(str(path))
    assert not (tmp_path / "pwned").exists()


def test_a_data_module_is_not_built_from_a_checkpoint():
    with pytest.raises(TypeError, match="DigitsDataModule must be made by its constructor"):
        DigitsDataModule.load_from_checkpoint("evil.ckpt")


@pytest.mark.parametrize("given", [{"download": True}, {}], ids=str)
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("cifar10.CIFAR10DataModule", {"root": "elsewhere"}),
        ("torchvision_sets.TorchvisionDataModule", {"root": "elsewhere", "dataset": "MNIST"}),
        ("huggingface.HuggingFaceDataModule", {"source": "owner/name", "image_size": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_downloaded_that_a_checkpoint_alone_names(
    honest, alone, kind, arguments, given
):
    if "huggingface" in kind:
        pytest.importorskip("datasets")

    def attack(config, hyper):
        config["data"] = {"class_path": f"ddim_pl.data.{kind}", "init_args": arguments | given}

    path = attacked(honest, attack)
    with pytest.raises(SystemExit) as stop:
        main(["test", "--ckpt_path", path])
    assert "download: true" in str(stop.value.code)


def test_those_who_wrote_the_file_may_trust_it(honest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_networks.py").write_text(
        "from ddim_pl.networks.unet import UNet\nclass Mine(UNet):\n    pass\n"
    )

    def own(config, hyper):
        for network in (config["model"]["init_args"]["network"], hyper["network"]):
            network["class_path"] = "own_networks.Mine"

    path = attacked(honest, own)
    with pytest.raises(UntrustedError, match=f"{ENVIRONMENT}=own_networks"):
        ddim_pl.load(path)
    assert type(ddim_pl.load(path, trust=True).network).__name__ == "Mine"
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--ckpt_path", path, "--num_images", "1"])
    assert "own_networks.Mine" in str(stop.value.code)
    main(["sample", "--ckpt_path", path, "--num_images", "1", "--trust"])
    monkeypatch.setenv(ENVIRONMENT, "own_networks")
    main(["sample", "--ckpt_path", path, "--num_images", "1"])
    assert type(ddim_pl.load(path).network).__name__ == "Mine"


def test_a_users_own_class_beside_a_checkpoint_needs_no_trust(honest, tmp_path, monkeypatch):
    """What the command line itself names, the user has chosen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_samplers.py").write_text(
        "from dataclasses import dataclass\nfrom ddim_pl.samplers import DDIM\n"
        "@dataclass(frozen=True)\nclass Mine(DDIM):\n    pass\n"
    )
    path = attacked(honest, lambda config, hyper: None)
    main(["sample", "--ckpt_path", path, "--num_images=1", "--model.sampler=own_samplers.Mine"])


def test_trust_ends_with_its_context():
    with trusting("mine"):
        assert is_trusted("mine.Net")
        assert not is_trusted("miner.Net")
    assert not is_trusted("mine.Net")
    with pytest.raises(UntrustedError, match="refused"):
        trusted_class("torch.hub.load", "the file")
