"""A checkpoint for tests of commands."""

import pytest
from tiny import tiny_config, write_config

from ddim_pl.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, max_epochs=1)
    config["model"]["init_args"]["network"]["init_args"]["num_classes"] = 10
    main(["fit", "--config", write_config(config, folder / "config.yaml")])
    return folder / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
