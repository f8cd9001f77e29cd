"""Statistics in files, as other tools write and read them."""

import numpy as np
import pytest
import torch

from ddim_pl.metrics.statistics import (
    FeatureStatistics,
    check_image_array,
    contents_of,
    image_batches,
    read_statistics,
)

D = 5


def moments(seed=0, width=D):
    features = np.random.default_rng(seed).normal(size=(40, width))
    return features.mean(0), np.cov(features, rowvar=False)


def ours(**changes):
    mean, covariance = map(torch.from_numpy, moments())
    known = {"num_images": 40, "extractor": "digits", "weights": "a" * 64, "resize": "none"}
    return FeatureStatistics(mean, covariance, **{**known, "images": "as they are", **changes})


def test_statistics_come_back_to_the_last_bit_and_other_tools_read_them(tmp_path):
    path = tmp_path / "ours.npz"
    ours().write(path)
    found = read_statistics(path)
    assert torch.equal(found.mean, ours().mean)
    assert torch.equal(found.covariance, ours().covariance)
    told = (found.num_images, found.extractor, found.weights, found.resize, found.images)
    assert told == (40, "digits", "a" * 64, "none", "as they are")
    with np.load(path) as file:  # as pytorch-fid and EDM do
        mean, covariance = file["mu"][:], file["sigma"][:]
    assert np.array_equal(mean, moments()[0])
    assert np.array_equal(covariance, moments()[1])


def test_layouts_of_pytorch_fid_edm_and_guided_diffusion_are_read(tmp_path):
    mean, covariance = moments()
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "pytorch-fid.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    np.savez(
        tmp_path / "guided-diffusion.npz",
        **{"arr_0": images, "arr_1": np.zeros(3, np.int64)},
        **{"mu": mean.astype(np.float32), "sigma": covariance},
        **{"mu_s": np.zeros(7), "sigma_s": np.zeros((7, 7))},
    )
    for name in ("pytorch-fid", "edm", "guided-diffusion"):
        found = read_statistics(tmp_path / f"{name}.npz")
        assert found.mean.dtype == found.covariance.dtype == torch.float64
        np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
        assert np.array_equal(found.covariance, covariance)
        assert (found.num_images, found.extractor) == (None, None)
    assert check_image_array(tmp_path / "guided-diffusion.npz") == (3, 4, 4, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_are_read_in_batches_in_their_order(tmp_path, save, order):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3)).astype(np.uint8)
    save(tmp_path / "x.npz", np.asarray(images, order=order))
    batches = list(image_batches(tmp_path / "x.npz", 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), images)


def wrong_files(folder):
    """Files that are no statistics, and what is said of each."""
    mean, covariance = moments()
    bad = covariance.copy()
    bad[0, 1] += 1

    def file(name, **arrays):
        np.savez(folder / name, **arrays)

    file("one-key.npz", mu=mean)
    file("shapes.npz", mu=mean, sigma=covariance[:3])
    file("integers.npz", mu=np.zeros(D, int), sigma=covariance)
    file("nan.npz", mu=mean * np.nan, sigma=covariance)
    file("asymmetric.npz", mu=mean, sigma=bad)
    file("negative.npz", mu=mean, sigma=-covariance)
    np.savez(folder / "objects.npz", mu=np.array([{}], dtype=object), sigma=covariance)
    (folder / "text.npz").write_text("no archive")
    (folder / "edm2.pkl").write_bytes(b"\x80\x04.")
    content = bytearray((folder / "nan.npz").read_bytes())
    content[200] ^= 255
    (folder / "damaged.npz").write_bytes(content)
    return {
        "one-key.npz": "must hold mu and sigma, got mu: sigma missing",
        "shapes.npz": r"got float64 \(5,\) and float64 \(3, 5\)",
        "integers.npz": "in floating point",
        "nan.npz": "not finite",
        "asymmetric.npz": "not symmetric",
        "negative.npz": "negative on its diagonal",
        "objects.npz": "must hold numbers, got Python objects as 'mu'",
        "text.npz": "cannot be read as an NPZ file",
        "edm2.pkl": "a pickle can run code",
        "damaged.npz": "cannot be read as an NPZ file",
        "nowhere.npz": "cannot be read",
    }


def test_a_file_without_statistics_is_an_error_that_names_it(tmp_path):
    for name, message in wrong_files(tmp_path).items():
        with pytest.raises(ValueError, match=rf"{name} .*{message}|{name} {message}"):
            read_statistics(tmp_path / name)


def test_arrays_that_are_no_images_are_an_error(tmp_path):
    for index, array in enumerate(
        (np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 4), np.uint8), np.zeros((4, 4), np.uint8))
    ):
        np.savez(tmp_path / f"{index}.npz", array)
        with pytest.raises(ValueError, match=rf"{index}.npz must hold images arr_0.*got"):
            check_image_array(tmp_path / f"{index}.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="got only images"):
        check_image_array(tmp_path / "x.npz")


def test_an_image_file_that_is_cut_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, np.zeros((9, 32, 32, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[9000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz is damaged"):
        list(image_batches(path, 4))
    assert contents_of(path)["arr_0"][0] == (9, 32, 32, 3)  # the header is whole


def test_statistics_of_another_extractor_name_both():
    ours().check("digits", D, "a" * 64)
    ours(extractor=None, weights=None).check("digits", D, "b" * 64)
    with pytest.raises(ValueError, match=r"'digits' with 32 features, got s.* of 5 features of d"):
        ours().check("digits", 32, "a" * 64)
    with pytest.raises(ValueError, match=r"'cifar' with 5 features, got .* of 5 features of digi"):
        ours().check("cifar", D, "a" * 64)
    with pytest.raises(ValueError, match=r"weights bbbbbbbbbbbb of 'digits', got .*aaaaaaaaaaaa"):
        ours().check("digits", D, "b" * 64)


def test_2048_features_without_a_name_are_those_of_inception():
    unnamed = FeatureStatistics(torch.zeros(2048), torch.zeros(2048, 2048))
    for name in ("inception", "inception_pytorch", "inception_clean"):
        unnamed.check(name, 2048, "")
    with pytest.raises(ValueError, match="'mine' with 2048 features, got"):
        unnamed.check("mine", 2048, "")
