import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, write_config

from ddim_pl.cli import main


def images(version):
    """The updates of each image of a run, by tag, as TensorBoard's server reads them."""
    events = EventAccumulator(str(version), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    return {tag: [each.step for each in events.Images(tag)] for tag in tags}


def test_testing_and_validating_a_run_keep_the_grids_of_its_training(tmp_path):
    config = write_config(tiny_config(tmp_path), tmp_path / "config.yaml")
    main(["fit", "--config", config])
    version = tmp_path / "tiny" / "version_0"
    assert images(version) == {"samples": [10, 20]}
    last = str(version / "checkpoints" / "last.ckpt")
    main(["test", "--ckpt_path", last])
    assert images(version) == {"samples": [10, 20], "test/samples": [20]}
    main(["validate", "--ckpt_path", last])
    assert images(version) == {"samples": [10, 20, 20], "test/samples": [20]}
    assert (version / "samples" / "test.png").is_file()
    assert not (version / "samples" / "step-0000000.png").exists()


@pytest.mark.slow
def test_tensorboards_server_shows_the_grids_of_training_and_test(tmp_path):
    config = write_config(tiny_config(tmp_path), tmp_path / "config.yaml")
    main(["fit", "--config", config])
    version = tmp_path / "tiny" / "version_0"
    main(["test", "--ckpt_path", str(version / "checkpoints" / "last.ckpt")])
    with served(version) as address:
        for tag, steps in {"samples": [10, 20], "test/samples": [20]}.items():
            query = urllib.parse.urlencode({"run": ".", "tag": tag, "sample": 0})
            with urllib.request.urlopen(f"{address}data/plugin/images/images?{query}") as answer:
                assert [each["step"] for each in json.load(answer)] == steps


@contextmanager
def served(folder):
    """TensorBoard's own server, of a run; yields its address."""
    log = folder.with_name("server.log")
    with log.open("w") as file:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "tensorboard.main", "--logdir", folder),
                *("--port", "0", "--load_fast", "false", "--host", "127.0.0.1"),
            ],
            stdout=file,
            stderr=file,
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://[\d.:]+/", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        while "." not in _runs(found[0]):
            assert time.monotonic() < end
            time.sleep(0.2)
        yield found[0]
    finally:
        server.kill()
        server.wait()


def _runs(address):
    with urllib.request.urlopen(f"{address}data/runs") as answer:
        return json.load(answer)
