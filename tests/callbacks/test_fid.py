import lightning as L
import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from tiny import tiny_config, tiny_ddpm, tiny_unet, write_config
from torch.utils.data import DataLoader

from callbacks import FrechetDistance, SampleGrid
from ddim_pl.cli import main
from ddim_pl.data.base import TensorImages
from ddim_pl.data.digits import DigitsDataModule
from ddim_pl.evaluation.measure import records_of, weights_of
from ddim_pl.images import grid, read_png, to_uint8
from ddim_pl.metrics.digits import DigitsFeatures
from ddim_pl.metrics.quality import NUMBERS, SampleQuality
from ddim_pl.metrics.statistics import FeatureStatistics


def trainer(folder, *callbacks, **arguments):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=1,
        limit_test_batches=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **arguments,
    )


def frechet(a, b):
    """Heusel et al. 2017, eq. 6, by scipy's matrix square root."""
    a, b = a.double(), b.double()
    root = torch.from_numpy(scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    return (a.mean(0) - b.mean(0)).square().sum() + torch.trace(a.T.cov() + b.T.cov() - 2 * root)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_distance_is_that_of_scipy_on_exactly_the_images_asked_for(tmp_path, batch_size):
    module, data = tiny_ddpm(), DigitsDataModule()
    callback = FrechetDistance(DigitsFeatures, num_samples=50, batch_size=batch_size)
    t = trainer(tmp_path, callback)
    t.test(module, data, verbose=False)
    features = DigitsFeatures()
    drawn = features(to_uint8(module.sample(range(50))))
    real = torch.cat([features(images) for images in data.reference_images(0, 1, 500)])
    assert len(real) == 1797
    # The features are float32, as is the metric's answer.
    torch.testing.assert_close(
        t.callback_metrics["test/digits_fd"].double(), frechet(drawn, real), rtol=1e-4, atol=1e-4
    )


PROBE = 2  # black images, before a run begins
KEPT = 8  # first real images, whose features are kept beside the sums


class CountingFeatures(DigitsFeatures):
    seen = 0

    def forward(self, images):
        type(self).seen += len(images)
        return super().forward(images)


def test_real_images_are_read_once_per_run_and_every_n_validations_holds(tmp_path):
    CountingFeatures.seen = 0
    callback = FrechetDistance(
        CountingFeatures, num_samples=40, batch_size=40, every_n_validations=2
    )
    data = DigitsDataModule(batch_size=4, steps_per_epoch=1)
    trainer(tmp_path, callback, max_epochs=5).fit(tiny_ddpm(num_steps=1), data)
    assert CountingFeatures.seen == PROBE + 1797 + KEPT + 2 * 40


def test_only_the_distance_is_logged_unless_more_is_asked_for(tmp_path):
    module, data = tiny_ddpm(num_steps=1), DigitsDataModule()
    logged = {}
    for metrics in (["fd"], list(NUMBERS)):
        CountingFeatures.seen = 0
        callback = FrechetDistance(
            CountingFeatures, metrics=metrics, num_samples=50, batch_size=40
        )
        t = trainer(tmp_path, callback)
        t.validate(module, data, verbose=False)
        assert CountingFeatures.seen == PROBE + 1797 + KEPT * (metrics == ["fd"]) + 50
        assert list(t.progress_bar_metrics) == ["val/loss", "val/digits_fd"]
        logged[len(metrics)] = t.callback_metrics
    assert set(logged[1]) == {"val/loss", "val/digits_fd", "val/images_per_second"}
    assert logged[5]["val/digits_fd"] == logged[1]["val/digits_fd"]

    quality = SampleQuality(DigitsFeatures(), list(NUMBERS))
    for images in data.reference_images(0, 1, 500):
        quality.update(images, real=True)
    quality.update(to_uint8(module.sample(range(50))), real=False)
    expected = {f"val/{key}": float(value) for key, value in quality.compute().items()}
    assert set(logged[5]) == {*expected, "val/loss", "val/images_per_second"}
    for key, value in expected.items():
        assert float(logged[5][key]) == pytest.approx(value, rel=1e-4), key


def test_every_measurement_of_a_run_starts_anew(tmp_path):
    callback = FrechetDistance(DigitsFeatures, metrics=["kid"], num_samples=40)
    module, data = tiny_ddpm(num_steps=1), DigitsDataModule()
    values = []
    for _ in range(2):
        t = trainer(tmp_path, callback)
        t.validate(module, data, verbose=False)
        values.append(t.callback_metrics["val/digits_kid"])
    assert callback.settings.quality.keys[0] == "digits_kid"
    assert values[0] == values[1]


def test_the_score_alone_reads_no_real_images(tmp_path):
    CountingFeatures.seen = 0
    callback = FrechetDistance(CountingFeatures, metrics=["inception_score"], num_samples=40)
    t = trainer(tmp_path, callback)
    t.test(tiny_ddpm(num_steps=1), DigitsDataModule(), verbose=False)
    assert CountingFeatures.seen == PROBE + 40
    assert 1 <= t.callback_metrics["test/digits_score"] <= 10


def test_metrics_are_read_from_a_config(tmp_path):
    config = tiny_config(tmp_path, max_epochs=1, limit_train_batches=1, log_every_n_steps=1)
    arguments = config["trainer"]["callbacks"][0]["init_args"]
    arguments["metrics"] = ["fd", "precision_recall"]
    main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    written = yaml.safe_load((tmp_path / "tiny" / "version_0" / "config.yaml").read_text())
    init_args = written["trainer"]["callbacks"][0]["init_args"]
    assert init_args["metrics"] == ["fd", "precision_recall"]

    arguments["metrics"] = ["fd", "fld"]
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", write_config(config, tmp_path / "wrong.yaml")])
    message = str(exit_info.value.code)
    assert message.startswith("error: metrics must be one or more of fd, kid, inception_score, ")
    assert "\n" not in message


def digits():
    data = DigitsDataModule()
    data.setup()
    return data


def test_fewer_samples_than_features_is_a_warning(tmp_path):
    callback = FrechetDistance(DigitsFeatures, num_samples=20)
    with pytest.warns(UserWarning, match="singular covariance"):
        callback.check(digits(), "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"every_n_validations": -1}, "every_n_validations must be at least 0"),
        ({"metrics": ["fid"]}, r"metrics must be one or more of fd, kid, .*, got 'fid'"),
        ({"metrics": []}, r"metrics must be one or more of fd, kid, .*, got none"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrechetDistance(DigitsFeatures, **arguments)


def test_too_few_samples_for_a_metric_are_refused_before_the_run():
    callback = FrechetDistance(DigitsFeatures, metrics=["precision_recall"], num_samples=3)
    with pytest.raises(ValueError, match=r"num_samples must be at least 4 .*, got 3"):
        callback.check(digits(), "test")


def test_missing_weights_are_an_error_before_the_data_are_prepared(tmp_path, monkeypatch):
    prepared: list[str] = []
    monkeypatch.setattr(DigitsDataModule, "prepare_data", lambda self: prepared.append("data"))
    monkeypatch.setattr(DigitsDataModule, "setup", lambda self, stage: prepared.append(stage))
    config = tiny_config(tmp_path)
    features = {
        "class_path": "ddim_pl.metrics.inception.InceptionFeatures",
        "init_args": {"weights_path": str(tmp_path / "nowhere.pth")},
    }
    config["trainer"]["callbacks"][0]["init_args"]["features"] = features
    with pytest.raises(SystemExit, match=r"could not be read.* leave FrechetDistance out"):
        main(["fit", "--config", write_config(config, tmp_path / "config.yaml")])
    assert prepared == []
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.yaml"]
    FrechetDistance(lambda: 1 / 0, every_n_validations=0).check_settings("fit")
    FrechetDistance(lambda: 1 / 0).check_settings("predict")


class ColourDigits(DigitsDataModule):
    def load(self, train):
        found = super().load(train)
        return TensorImages(
            found.images(torch.arange(8)).expand(-1, 3, -1, -1), torch.arange(8), 8
        )


@pytest.mark.filterwarnings("ignore:8 real images give a singular covariance")
def test_features_of_grey_images_are_refused_on_colours_before_training(tmp_path):
    callback = FrechetDistance(DigitsFeatures, num_samples=40)
    model = tiny_ddpm(network=tiny_unet(in_channels=3))
    with pytest.raises(ValueError, match=r"must take uint8 images \(B, 3, 8, 8\)"):
        trainer(tmp_path, callback, max_steps=1).fit(model, ColourDigits(batch_size=4))
    assert model.global_step == 0


def test_fewer_real_images_than_features_are_a_warning_before_training():
    data = ColourDigits()
    data.load = lambda train: TensorImages(torch.zeros(8, 1, 8, 8).byte(), torch.arange(8), 8)
    data.setup()
    with pytest.warns(UserWarning, match="8 real images give a singular covariance of 32"):
        FrechetDistance(DigitsFeatures, num_samples=40).check(data, "fit")


def test_a_plain_dataloader_is_refused(tmp_path):
    loader = DataLoader([(torch.zeros(1, 8, 8), 0)])
    with pytest.raises(ValueError, match="data must be a data module"):
        trainer(tmp_path, FrechetDistance(DigitsFeatures)).test(tiny_ddpm(), loader)


def test_grid_holds_the_same_latents_every_time(tmp_path):
    module, data = tiny_ddpm(), DigitsDataModule()
    for _ in range(2):
        trainer(tmp_path, SampleGrid(6, columns=3)).validate(module, data, verbose=False)
        picture = read_png(tmp_path / "samples" / "step-0000000.png")
        expected = grid(to_uint8(module.sample(range(6))), columns=3)
        assert (picture.int() - expected[:1].int()).abs().max() <= 1  # make_grid repeats grey


def statistics_file(folder, **changes):
    """Statistics of all real images, as `main.py stats` writes them."""
    extractor, data = DigitsFeatures(), DigitsDataModule()
    data.setup("test")
    features = torch.cat([extractor(i) for i in data.reference_images(0, 1, 500)]).double()
    known = {"num_images": 1797, "extractor": "digits", "weights": weights_of(extractor)}
    found = FeatureStatistics(features.mean(0), features.T.cov(), **{**known, **changes})
    found.write(folder / "real.npz")
    return str(folder / "real.npz")


def test_statistics_in_place_of_the_real_images_give_the_same_distance(tmp_path):
    module, data = tiny_ddpm(num_steps=1), DigitsDataModule()
    found = []
    for file in (None, statistics_file(tmp_path)):
        CountingFeatures.seen = 0
        callback = FrechetDistance(CountingFeatures, num_samples=50, statistics=file)
        t = trainer(tmp_path, callback)
        t.test(module, data, verbose=False)
        found.append(float(t.callback_metrics["test/digits_fd"]))
        known = {"digits_fd extractor": "digits", "digits_fd num_samples": 50}
        known |= {"digits_fd num_real": 1797}
        known |= {} if file is None else {"digits_fd statistics": "real.npz"}
        assert records_of(t, data, "test") == known
        assert records_of(t, data, "val") == {}
    assert CountingFeatures.seen == PROBE + 50  # no real ones
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_statistics_that_do_not_fit_are_errors_before_the_data_are_prepared(tmp_path):
    file = statistics_file(tmp_path, extractor="cifar")
    with pytest.raises(ValueError, match=r"'digits' with 32 features, got .*real.npz of 32 .*cif"):
        FrechetDistance(DigitsFeatures, num_samples=50, statistics=file).check_settings("test")
    np.savez(tmp_path / "real.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match=r"'digits' with 32 features, got .* of 7 features"):
        FrechetDistance(DigitsFeatures, num_samples=50, statistics=file).check_settings("fit")
    with pytest.raises(ValueError, match=r"metrics must be fd or inception_score with .* got kid"):
        FrechetDistance(DigitsFeatures, metrics=["fd", "kid"], statistics=file)
    with pytest.raises(ValueError, match="metrics must have fd with statistics"):
        FrechetDistance(DigitsFeatures, metrics=["inception_score"], statistics=file)
