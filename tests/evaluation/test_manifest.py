"""The record beside images."""

import pytest
import torch
from tiny import some_ddpm, tiny_config, tiny_unet, write_config

import ddim_pl
from ddim_pl.cli import main
from ddim_pl.damage import read_sealed
from ddim_pl.data.image_folder import ImageFolderDataModule
from ddim_pl.evaluation.manifest import sampling_of
from ddim_pl.timesteps import make_levels
from ddim_pl.training import DDPM
from ddim_pl.training.fingerprint import fingerprint

GIVEN = ["--model.sampler", "Heun", "--model.num_steps", "3", "--model.sampling_precision", "bf16"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, max_steps=5, limit_val_batches=0)
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


def expected_of(file, **changes):
    """The record, written out by hand."""
    model = DDPM.load_from_checkpoint(file, weights_only=True, sampling_precision="bf16")
    levels = make_levels("trailing", model.schedule, 3)
    return {
        "ddim_pl": ddim_pl.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "checkpoint": str(file),
        "fingerprint": fingerprint(model),
        "updates": 5,
        "weights": "averaged, ema_decay 0.9",
        "sampler": "Heun()",
        "clip": True,
        "timesteps": "trailing",
        "steps": 3,
        "levels": levels.tolist(),
        "guidance": None,
        "network evaluations": 5,
        "seed": 3,
        "noise_source": "generators",
        "first": 0,
        "num_images": 4,
        "label": None,
        "num_classes": None,
        "shape": [1, 8, 8],
        "precision": "32-true",
        "sampling_precision": "bf16",
        **changes,
    }


def test_sample_says_how_its_images_were_made(checkpoint, tmp_path):
    out = tmp_path / "out"
    common = ["sample", "--ckpt_path", str(checkpoint), "--output", str(out), *GIVEN]
    main([*common, "--num_images", "3", "--seed", "9"])
    first = expected_of(checkpoint, seed=9, num_images=3)
    assert read_sealed(out / "manifest.json") == first
    main([*common, "--num_images", "2", "--first", "3", "--model.noise_source", "philox"])
    assert read_sealed(out / "manifest.json") == first
    second = expected_of(checkpoint, first=3, num_images=2, noise_source="philox")
    assert read_sealed(out / "manifest-from-000003.json") == second
    data = ImageFolderDataModule(str(out / "images"), image_size=8, channels=1)
    assert len(data.load(train=True)) == 5  # what a distance measures is the images alone


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_predict_says_how_its_images_were_made(checkpoint, tmp_path):
    out = tmp_path / "out"
    main(
        [
            *("predict", "--ckpt_path", str(checkpoint), *GIVEN, "--data.num_predict", "4"),
            *("--trainer.callbacks=callbacks.ImageWriter", f"--trainer.callbacks.folder={out}"),
        ]
    )
    assert read_sealed(out / "manifest.json") == expected_of(checkpoint)
    assert len(list((out / "images").iterdir())) == 4


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_predict_records_no_images_that_a_limit_leaves_out(checkpoint, tmp_path):
    out = tmp_path / "out"
    few = ["--data.num_predict=8", "--data.batch_size=3", "--trainer.limit_predict_batches=2"]
    writer = ["--trainer.callbacks=callbacks.ImageWriter", f"--trainer.callbacks.folder={out}"]
    main(["predict", "--ckpt_path", str(checkpoint), *few, *writer])
    made = len(list((out / "images").iterdir()))
    assert read_sealed(out / "manifest.json")["num_images"] == made == 6


def test_results_of_guided_images_say_so_and_what_they_cost():
    network = tiny_unet(num_classes=3, null_class=True)
    plain = sampling_of(some_ddpm(network=network))
    assert "guidance" not in plain
    assert plain["network evaluations"] == 5
    guided = sampling_of(some_ddpm(network=network, guidance=2.5))
    assert (guided["guidance"], guided["network evaluations"]) == ("2.5", 10)
    some = some_ddpm(network=network, guidance=2.5, guidance_interval=(0.0, 1e9))
    assert sampling_of(some)["guidance"] == "2.5 in (0, 1000000000]"


def test_guidance_is_given_on_the_command_line_and_kept_by_an_export(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, max_steps=1, limit_val_batches=0)
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][-1:]
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1
    settings = config["model"]["init_args"]
    settings["label_dropout"] = 0.2
    settings["network"]["init_args"] |= {"num_classes": 10, "null_class": True}
    main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    file = str(tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt")
    few = ["--num_images", "2", "--png", "false"]

    def recorded(name, *arguments):
        main(["sample", *few, "--output", str(tmp_path / name), *arguments])
        found = read_sealed(tmp_path / name / "manifest.json")
        return found["guidance"], found["network evaluations"]

    assert recorded("plain", "--ckpt_path", file) == (None, 4)
    given = ["--model.guidance", "2", "--model.guidance_interval", "[0.1,1e9]"]
    exported = str(tmp_path / "guided.ckpt")
    main(["export", "--ckpt_path", file, "--output", exported, *given])
    # Levels 1000, 750, 500 and 250 of the linear schedule: all have a ratio above 0.1.
    assert recorded("guided", "--ckpt_path", file, *given) == ("2 in (0.1, 1000000000]", 8)
    assert recorded("again", "--ckpt_path", exported) == ("2 in (0.1, 1000000000]", 8)
    off = ["--model.guidance", "null", "--model.guidance_interval", "null"]
    assert recorded("off", "--ckpt_path", exported, *off) == (None, 4)
    told: list[str] = []
    monkeypatch.setattr("ddim_pl.cli_checks.rank_zero_info", told.append)
    steps = ["--num_images", "2", "--num_steps", "[2]", "--output", str(tmp_path / "back")]
    main(["reconstruct", "--ckpt_path", exported, *steps])
    assert told == ["reconstruct has no guidance: 2 of the checkpoint has no effect on it"]
