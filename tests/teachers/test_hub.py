"""Names on the Hub, without a network."""

import shutil
import sys

import huggingface_hub
import pytest
from foreign import random_unet, save_as_before, save_pipeline

from ddim_pl.teachers import hub
from ddim_pl.teachers.diffusers_folder import read_folder

LOCAL = huggingface_hub.snapshot_download


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache of the client; returns its folder."""

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    def local_only(name, *, local_files_only=False, **kwargs):
        assert local_files_only
        return LOCAL(name, local_files_only=True, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    return tmp_path / "cache"


def test_one_file_of_weights_is_wanted():
    files = ["README.md", "samples/a.png", "model_index.json", "config.json"]
    files += ["scheduler_config.json", "diffusion_pytorch_model.bin"]
    safe = "diffusion_pytorch_model.safetensors"
    assert hub.wanted([*files, safe]) == [*files[2:5], safe]
    assert hub.wanted(files) == files[2:]
    parts = ["unet/config.json", f"unet/{safe}", "scheduler/scheduler_config.json"]
    assert hub.wanted([*parts, "unet/diffusion_pytorch_model.bin", "vae/config.json"]) == parts


def test_only_what_is_read_is_downloaded(monkeypatch, tmp_path):
    remote = save_pipeline(tmp_path / "remote", random_unet())
    files = [str(each.relative_to(remote)) for each in remote.rglob("*") if each.is_file()]
    (remote / "big.png").write_bytes(b"0")

    def snapshot(name, allow_patterns):
        for each in allow_patterns:
            target = tmp_path / "local" / each
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / each, target)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: [*files, "big.png"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    read_folder(hub.download("google/some"))
    assert not (tmp_path / "local" / "big.png").exists()


def test_without_a_network_what_was_downloaded_is_read(offline, tmp_path):
    repo = offline / "models--google--some"
    (repo / "snapshots").mkdir(parents=True)
    scheduler = {"_class_name": "DDPMScheduler"}
    save_as_before(repo / "snapshots" / ("a" * 40), random_unet(), scheduler)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    assert read_folder(hub.download("google/some")).network.image_size == 8


def test_without_a_network_the_files_are_named(offline):
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        hub.download("google/ddpm-cifar10-32")
    assert "no route to host" in str(error.value)
    for name in ("model_index.json", "scheduler_config.json", "diffusion_pytorch_model.bin"):
        assert name in str(error.value)
    assert "give that folder as the source" in str(error.value)


def test_a_client_that_is_offline_is_not_advised_to_be(offline, monkeypatch):
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1 says so without a wait"):
        hub.download("google/some")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"downloaded \(HF_HUB_OFFLINE is set\): unset it, or"
    ) as error:
        hub.download("google/some")
    assert "HF_HUB_OFFLINE=1" not in str(error.value)
    assert "route" not in str(error.value)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'ddim_pl\[diffusers\]'"):
        hub.download("google/ddpm-cifar10-32")
