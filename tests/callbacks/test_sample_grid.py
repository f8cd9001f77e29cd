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
