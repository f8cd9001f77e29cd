"""Layers of configs: the default, the experiment, the command line, the checkpoint."""

from pathlib import Path

import pytest
import yaml
from tiny import tiny_config, write_config

from ddim_pl.cli import main
from ddim_pl.cli_configs import DEFAULTS, AloneParser, CommandParser, Given, classes_first


def resolved(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    captured = capsys.readouterr()
    assert stop.value.code in (0, None), captured.err
    return yaml.safe_load(captured.out)


def short_config(folder, **trainer):
    """An experiment that says only what differs."""
    config = tiny_config(folder)
    config["trainer"] = {"max_epochs": 1, "logger": {"init_args": {"name": "mine"}}, **trainer}
    return write_config(config, folder / "short.yaml")


def callbacks_of(config):
    return {
        each["class_path"]: each.get("init_args", {}) for each in config["trainer"]["callbacks"]
    }


def test_the_default_is_read_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = resolved(["fit", "--config", short_config(tmp_path)], capsys)
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    assert config["trainer"]["logger"]["init_args"]["name"] == "mine"
    assert "callbacks.SampleGrid" in callbacks_of(config)


def test_a_callback_given_again_changes_only_the_arguments_it_names(tmp_path, capsys):
    extra = {
        "callbacks+": [
            {"class_path": "callbacks.SampleGrid", "init_args": {"num_images": 7, "columns": 2}},
            {"class_path": "callbacks.BitsPerDim"},
        ]
    }
    arguments = ["fit", "--config", short_config(tmp_path, **extra)]
    found = callbacks_of(resolved(arguments, capsys))
    assert found["callbacks.SampleGrid"]["num_images"] == 7
    assert "callbacks.BitsPerDim" in found
    assert "callbacks.ImageWriter" in found
    saved = found["lightning.pytorch.callbacks.ModelCheckpoint"]
    assert (saved["save_last"], saved["every_n_train_steps"]) == (True, 10000)
    over = {
        "trainer": {
            "callbacks+": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 5},
                }
            ]
        }
    }
    arguments += ["--config", write_config(over, tmp_path / "over.yaml")]
    arguments += ["--trainer.callbacks+=callbacks.SampleGrid", "--trainer.callbacks.num_images=3"]
    config = resolved(arguments, capsys)
    names = [each["class_path"] for each in config["trainer"]["callbacks"]]
    assert len(names) == len(set(names))
    found = callbacks_of(config)
    assert found["callbacks.SampleGrid"]["num_images"] == 3
    assert found["callbacks.SampleGrid"]["columns"] == 2
    saved = found["lightning.pytorch.callbacks.ModelCheckpoint"]
    assert (saved["save_last"], saved["every_n_train_steps"]) == (True, 5)


def test_a_callback_changed_on_the_command_line_keeps_the_features_of_its_config(capsys):
    arguments = ["fit", "--config", str(DEFAULTS.parent / "digits/ddpm.yaml")]
    arguments += ["--trainer.callbacks+=callbacks.FrechetDistance"]
    found = callbacks_of(resolved([*arguments, "--trainer.callbacks.num_samples=1000"], capsys))
    distance = found["callbacks.FrechetDistance"]
    assert distance["num_samples"] == 1000
    assert distance["features"]["class_path"] == "ddim_pl.metrics.digits.DigitsFeatures"


def saves(folder):
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    return [{"class_path": kind, "init_args": {"monitor": name}} for name in ("one", "two")]


def monitors(config):
    callbacks = config["trainer"]["callbacks"]
    return [
        each["init_args"].get("monitor") for each in callbacks if "Model" in each["class_path"]
    ]


@pytest.mark.parametrize("option", ["--trainer.callbacks", "--trainer.callbacks+"])
def test_callbacks_of_one_list_are_not_merged_with_each_other(tmp_path, capsys, option):
    key = option.removeprefix("--trainer.")
    text = yaml.safe_dump(saves(tmp_path), default_flow_style=True, width=10000).strip()
    base = ["fit", "--config", short_config(tmp_path)]
    assert monitors(resolved([*base, f"{option}={text}"], capsys)) == ["one", "two"]
    over = write_config({"trainer": {key: saves(tmp_path)}}, tmp_path / "over.yaml")
    config = resolved([*base, "--config", over], capsys)
    assert monitors(config) == ["one", "two"]
    again = resolved([*base, "--config", over, f"{option}={text}"], capsys)
    assert monitors(again) == ["one", "two"]
    assert len(again["trainer"]["callbacks"]) == len(config["trainer"]["callbacks"])


def test_a_callback_twice_in_a_whole_list_stays_twice(tmp_path, capsys):
    config = tiny_config(tmp_path)
    saved = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": m}}
        for m in ("one", "two")
    ]
    config["trainer"]["callbacks"] = saved
    path = write_config(config, tmp_path / "complete.yaml")
    found = resolved(["fit", "--config", path], capsys)["trainer"]["callbacks"]
    assert [each["init_args"]["monitor"] for each in found] == ["one", "two"]


def test_a_complete_list_of_callbacks_is_taken_as_it_is(tmp_path, capsys):
    config = write_config(tiny_config(tmp_path), tmp_path / "complete.yaml")
    names = [
        each["class_path"]
        for each in resolved(["fit", "--config", config], capsys)["trainer"]["callbacks"]
    ]
    assert names == [each["class_path"] for each in tiny_config(tmp_path)["trainer"]["callbacks"]]


def test_a_single_callback_is_a_list_of_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    arguments = ["fit", "--config", short_config(tmp_path), *more]
    found = callbacks_of(resolved(arguments, capsys))
    assert list(found) == ["lightning.pytorch.callbacks.ModelCheckpoint"]
    assert found["lightning.pytorch.callbacks.ModelCheckpoint"]["save_last"] is True
    few = ["max_steps=1", "limit_val_batches=0", "log_every_n_steps=1"]
    main([*arguments, *(f"--trainer.{each}" for each in few)])
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1


def test_a_later_config_wins(tmp_path, capsys):
    over = write_config({"model": {"init_args": {"num_steps": 9}}}, tmp_path / "over.yaml")
    arguments = ["fit", "--config", short_config(tmp_path), "--config", over]
    assert resolved(arguments, capsys)["model"]["init_args"]["num_steps"] == 9


def test_a_checkpoint_may_be_named_in_the_config_of_a_command(tmp_path):
    main(
        ["fit", "--config", write_config(tiny_config(tmp_path, max_epochs=1), tmp_path / "c.yaml")]
    )
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    content = {"ckpt_path": str(last), "num_images": 2, "output": str(tmp_path / "out")}
    main(["sample", "--config", write_config(content, tmp_path / "sample.yaml")])
    assert (tmp_path / "out" / "images" / "000001.png").is_file()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("fit --a.x 1 --b -1 --a Heun", "fit --a Heun --a.x 1 --b -1"),
        ("--a.x=1 --a=Heun", "--a=Heun --a.x=1"),
        ("--a.init_args.x 1 --a.class_path Heun", "--a.class_path Heun --a.init_args.x 1"),
        ("--a.b.x 1 --a.b Anderson --a DEQ", "--a DEQ --a.b Anderson --a.b.x 1"),
        ("--a.x 1 --a {class_path:\xa0DDIM}", "--a=DDIM --a.x 1 --a {class_path:\xa0DDIM}"),
    ],
)
def test_a_class_is_named_before_its_arguments(given, expected):
    words = [each.replace("\xa0", " ") for each in given.split(" ")]
    assert classes_first(words) == [each.replace("\xa0", " ") for each in expected.split(" ")]


@pytest.mark.parametrize(
    "given",
    [
        "fit --a Heun --a.x 1",
        "fit --ab.x 1 --a Heun",
        "fit --a.x 1 --config c.yaml --a Heun",
        "fit --a.x 1 -c c.yaml --a Heun",
        "fit --a.x 1 --a+=Heun --a.x 2",
        "--config c.yaml fit --a.x 1 --b [1, -2]",
        "",
    ],
)
def test_all_else_stays_in_its_order(given):
    assert classes_first(given.split()) == given.split()


CLASS_AND_ARGUMENT = [
    (["--model.sampler", "Heun"], ["--model.sampler.clip", "false"], None),
    (["--model.sampler", "Heun"], ["--model.sampler.eta", "0.5"], "eta is no argument of Heun"),
    (["--trainer.logger", "CSVLogger"], ["--trainer.logger.prefix", "a"], None),
    (["--trainer.logger=CSVLogger"], ["--trainer.logger.log_graph=true"], "log_graph is no arg"),
    (["--model", "DDPM"], ["--model.rounds", "[[1, 1]]"], "rounds is no argument of DDPM"),
    (["--data", "ImageFolderDataModule"], ["--data.holdout", "true"], "holdout is no argument of"),
    (["--model.network", "UNet"], ["--model.network.width", "3"], "width is no argument of UNet"),
]


@pytest.mark.parametrize(("kind", "argument", "message"), CLASS_AND_ARGUMENT)
def test_an_argument_may_stand_before_its_class(tmp_path, capsys, kind, argument, message):
    base = ["fit", "--config", short_config(tmp_path)]
    if message is None:
        after = resolved([*base, *kind, *argument], capsys)
        before = resolved([*base, *argument, *kind], capsys)
        assert before == after
        assert before != resolved([*base, *kind], capsys)
        return
    for arguments in (kind + argument, argument + kind):
        with pytest.raises(SystemExit) as stop:
            main([*base, *arguments, "--print_config"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_of_an_argument_and_a_mapping_the_later_wins(tmp_path, capsys):
    base = ["fit", "--config", short_config(tmp_path), "--model.sampler.eta", "0.5"]
    mapping = "{class_path: DDIM, init_args: {eta: 0.25}}"
    sampler = resolved([*base, "--model.sampler", mapping], capsys)["model"]["init_args"][
        "sampler"
    ]
    assert sampler["init_args"]["eta"] == 0.25
    mapping = "{class_path: DDIM, init_args: {clip: false}}"
    sampler = resolved([*base, "--model.sampler", mapping], capsys)["model"]["init_args"][
        "sampler"
    ]
    assert sampler["init_args"] == {"eta": 0.5, "clip": False}


@pytest.mark.slow
def test_a_path_may_begin_at_the_home_folder_wherever_it_stands(tmp_path, monkeypatch, capsys):
    home, place = tmp_path / "home", tmp_path / "place"
    for folder in (home, place):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(place)
    config = tiny_config(Path("~/runs"), max_steps=1, limit_val_batches=0)
    saving = config["trainer"]["callbacks"][-1]
    saving["init_args"]["every_n_train_steps"] = 1
    write_config(config, home / "config.yaml")
    main(["fit", "--config=~/config.yaml"])
    checkpoint = "~/runs/tiny/version_0/checkpoints/last.ckpt"
    given = ["sample", f"--ckpt_path={checkpoint}", "--output=~/drawn", "--num_images", "1"]
    main(given)
    assert (home / "drawn" / "grid.png").is_file()
    monkeypatch.setenv("DDIM_PL_EXPORT__OUTPUT", "~/model.ckpt")
    main(["export", f"--ckpt_path={checkpoint}"])
    assert (home / "model.ckpt").is_file()
    monkeypatch.delenv("DDIM_PL_EXPORT__OUTPUT")
    more = write_config({"ckpt_path": checkpoint, "output": "~/other"}, home / "more.yaml")
    main(["sample", "--config", more, "--num_images", "1"])
    assert (home / "other" / "grid.png").is_file()
    assert not list(place.iterdir())


def test_a_command_without_model_takes_a_path_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["import", "~/nowhere", "--output=~/x.ckpt"])
    assert f"'{tmp_path}/nowhere'" in str(stop.value.code)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("{max_steps: 3, devices: 1}", ["model.max_steps", "model.devices"]),
        ("{class_path: DDPM, init_args: {ema_decay: 0.5}}", ["model.ema_decay"]),
        *((value, ["model"]) for value in ("{init_args: [1]}", "{init_args: a}", "{", "DDPM")),
    ],
)
def test_a_mapping_names_its_entries_whatever_it_holds(value, names):
    assert Given.by(["sample", f"--model={value}"], ["sample"]).named == names


@pytest.mark.parametrize("kind", [AloneParser, CommandParser])
@pytest.mark.parametrize("below", [False, True])
def test_no_parser_takes_a_beginning_for_an_option(kind, below, capsys):
    parser = whole = kind()
    parser.add_argument("--num_steps", type=int)
    if below:
        whole = kind()
        whole.add_subcommands().add_subcommand("command", parser)
    args = ["command"] if below else []
    assert whole.parse_args([*args, "--num_steps", "3"])
    with pytest.raises(SystemExit) as stop:
        whole.parse_args([*args, "--num_step", "3"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line == "error: unrecognized arguments: --num_step 3: did you mean --num_steps?\n"
