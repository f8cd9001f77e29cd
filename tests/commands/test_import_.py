"""A teacher of another program as a checkpoint that every command takes."""

import json

import pytest
import torch
from diffusers import DDIMPipeline
from foreign import OWN_DEFAULTS, TINY, ddim_weights, random_unet, save_pipeline
from foreign_edm import TINY as EDM
from foreign_edm import edm_weights, save_edm

import ddim_pl
from ddim_pl.cli import main
from ddim_pl.networks.diffusers import DiffusersUNet
from ddim_pl.training import ProgressiveDistillation

DIGITS = ["--data", "ddim_pl.data.digits.DigitsDataModule", "--data.batch_size", "32"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
KINDS = {"epsilon": True, "v_prediction": True, "sample": False}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A pipeline's folder, and its checkpoint."""
    folder = tmp_path_factory.mktemp("import")
    save_pipeline(folder / "pipeline", random_unet(), num_train_timesteps=1000)
    main(["import", str(folder / "pipeline"), "--output", str(folder / "teacher.ckpt")])
    return folder / "pipeline", folder / "teacher.ckpt"


def import_folder(folder):
    output = folder.with_suffix(".ckpt")
    main(["import", str(folder), "--output", str(output)])
    return ddim_pl.load(output)


def pipeline_images(folder, model, num_steps):
    """What diffusers draws from our start noise, in [0, 1]; nothing of ours takes part."""
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z, _ = model.latents([0, 1, 2], model.levels[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: z.clone()
        )
        return pipeline(
            batch_size=3,
            num_inference_steps=num_steps,
            output_type="pt",
            # As in the papers: the noise fits the clipped image.
            use_clipped_model_output=True,
        ).images


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("kind", "clip"), KINDS.items(), ids=KINDS)
def test_the_images_are_those_of_the_pipeline(kind, clip, spacing, tmp_path):
    settings = {"prediction_type": kind, "clip_sample": clip, "timestep_spacing": spacing}
    folder = save_pipeline(tmp_path / "pipeline", random_unet(), **settings)
    model = import_folder(folder)
    theirs = pipeline_images(folder, model, 50)
    ours = (model.sample([0, 1, 2]) / 2 + 0.5).clamp(0, 1)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_wrapped_network_draws_the_same_without_its_folder(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline", random_unet(**OWN_DEFAULTS))
    model = import_folder(folder)
    theirs = pipeline_images(folder, model, 50)
    folder.rename(tmp_path / "gone")
    model = ddim_pl.load(tmp_path / "pipeline.ckpt")
    assert type(model.network) is DiffusersUNet
    ours = (model.sample([0, 1, 2]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_files_of_ddims_code_become_checkpoints(tmp_path):
    torch.save([{}, {}, 0, 0, ddim_weights(attends=(0,))], tmp_path / "ckpt.pth")
    output = tmp_path / "teacher.ckpt"
    main(["import", str(tmp_path / "ckpt.pth"), "--output", str(output)])
    model = ddim_pl.load(output, num_steps=2)
    assert model.sample([0]).shape == (1, 3, 16, 16)


@pytest.fixture
def edm(tmp_path):
    """The checkpoint of a pickle of EDM, of grey images as the digits are."""
    arguments = {**EDM, "in_channels": 1, "out_channels": 1}
    path = save_edm(tmp_path / "network-snapshot-000000.pkl", arguments, edm_weights(**arguments))
    main(["import", str(path), "--output", str(tmp_path / "teacher.ckpt")])
    return tmp_path / "teacher.ckpt"


def test_pickles_of_edm_become_checkpoints(edm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    alone = ["--ckpt_path", str(edm), "--num_images", "2", *QUIET]
    main(["sample", *alone, "--output", "images"])
    assert len([*(tmp_path / "images").rglob("0*.png")]) == 2
    record = json.loads((tmp_path / "images" / "manifest.json").read_text())
    assert record["weights"] == "as imported"  # none of our averages
    model = ddim_pl.load(edm)
    assert (model.prediction, model.sigma_data, model.time_input) == ("edm", 0.5, "log_sigma")
    assert model.sampler == ddim_pl.Heun()
    assert len(model.levels) == 19
    with torch.no_grad():
        fine = ddim_pl.load(edm, num_steps=100).sample([0])
        # One flow, by methods of two orders.
        methods = [(ddim_pl.DPMSolverPP(), 50, 0.02), (ddim_pl.DDIM(), 100, 0.1)]
        for sampler, steps, tolerance in methods:
            drawn = ddim_pl.load(edm, sampler=sampler, num_steps=steps).sample([0])
            torch.testing.assert_close(drawn, fine, rtol=0, atol=tolerance)
        for sampler in (ddim_pl.Ancestral(), ddim_pl.PNDM(), ddim_pl.DEQ()):
            drawn = ddim_pl.load(edm, sampler=sampler, num_steps=12).sample([0])
            assert drawn.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_a_pickle_of_edm_to_students(edm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rounds = ["--model.init_args.rounds", "[[2,1],[1,1]]", "--model.prediction"]
    for number, kind in enumerate(["edm", "v"]):
        conversion = ["--model.conversion_updates", "1"] if kind == "v" else []
        fit("progressive", str(edm), *rounds, kind, *conversion)
        runs = tmp_path / "runs" / "digits-progressive" / f"version_{number}" / "checkpoints"
        students = [ddim_pl.load(each) for each in sorted(runs.glob("student-*.ckpt"))]
        assert sorted(each.distilled_steps for each in students) == [1, 2]
        for each in students:
            assert (each.prediction, each.sigma_data, each.time_input) == (kind, 0.5, "log_sigma")
            assert each.schedule == ddim_pl.EDMSchedule()
            assert each.sample([0]).isfinite().all()
    fit("luhman", str(edm), *PAIRS)
    student = ddim_pl.load(tmp_path / "runs/digits-luhman/version_0/checkpoints/last.ckpt")
    assert (student.prediction, student.sigma_data) == ("edm", 0.5)
    assert student.sample([0]).isfinite().all()


def test_commands_take_the_checkpoint(imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, checkpoint = imported
    alone = ["--ckpt_path", str(checkpoint)]
    main(["sample", *alone, "--num_images", "2", "--output", "images", *QUIET])
    assert len([*(tmp_path / "images").rglob("0*.png")]) == 2
    few = ["--trainer.limit_test_batches", "1"]
    main(["test", *alone, *DIGITS, *few, *QUIET])
    run = checkpoint.with_name("teacher-run")
    assert json.loads((run / "test-results.json").read_text())["test/loss"] > 0
    few = ["--num_samples", "40", "--num_steps", "[2]", "--num_shown", "2"]
    features = ["--features", "ddim_pl.metrics.digits.DigitsFeatures"]
    main(["sweep", *alone, *DIGITS, *few, *features, *QUIET])


FIT = ["fit", "--config", "{root}/configs/digits/{method}.yaml", "--model.teacher", "{teacher}"]
SMALL = ["--trainer.limit_val_batches", "0", "--data.batch_size", "8", *QUIET]
PAIRS = ["--data.num_pairs", "48", "--data.num_validation", "16", "--data.shard_size", "16"]
PAIRS += ["--model.teacher_num_steps", "2", "--trainer.max_steps", "2"]


def fit(method, teacher, *more):
    root = ddim_pl.__path__[0] + "/.."
    words = [word.format(root=root, method=method, teacher=teacher) for word in FIT]
    main([*words, *SMALL, *more])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [TINY, OWN_DEFAULTS], ids=["UNet", "DiffusersUNet"])
@pytest.mark.filterwarnings("ignore")
def test_from_a_folder_to_students(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_pipeline(tmp_path / "pipeline", random_unet(**arguments))
    main(["import", str(folder), "--output", "teacher.ckpt"])
    fit("progressive", "teacher.ckpt", "--model.init_args.rounds", "[[2,1],[1,1]]")
    checkpoints = tmp_path / "runs" / "digits-progressive" / "version_0" / "checkpoints"
    assert isinstance(ddim_pl.load(checkpoints / "last.ckpt"), ProgressiveDistillation)
    steps = [ddim_pl.load(each).distilled_steps for each in checkpoints.glob("student-*.ckpt")]
    assert sorted(steps) == [1, 2]
    for each in checkpoints.glob("student-*.ckpt"):
        assert ddim_pl.load(each).sample([0]).isfinite().all()
    fit("luhman", "teacher.ckpt", *PAIRS)


def test_output_is_a_new_file(imported, capsys):
    folder, checkpoint = imported
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["import", str(folder), "--output", str(checkpoint)])
    assert "output must be a new file" in str(stop.value.code)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("kind", ["diffusers", "EDM"])
def test_weights_of_a_training_that_diverged_are_refused(kind, tmp_path, capsys):
    if kind == "EDM":
        weights = edm_weights(**EDM)
        weights["enc.8x8_conv.weight"][1, 2] = float("inf")
        source = save_edm(tmp_path / "network.pkl", EDM, weights)
    else:
        network = random_unet()
        network.conv_in.weight.data[0, 0] = float("nan")
        source = save_pipeline(tmp_path / "pipeline", network)
    with pytest.raises(SystemExit) as stop:
        main(["import", str(source), "--output", str(tmp_path / "teacher.ckpt")])
    assert "with 9 of " in str(stop.value.code)
    assert "that are not, in conv_in.weight" in str(stop.value.code)
    assert not (tmp_path / "teacher.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", "--output", "x/y.ckpt"], "error: source must be a folder, a file or a name"),
        ([".", "--output", "x/y.ckpt"], "error: source must be a folder of diffusers"),
        ([".", "--output", "x/y.ckpt", "--image_size", "0"], "image_size must be at least 1"),
    ],
)
def test_bad_input_writes_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["import", *words])
    assert message in str(stop.value.code)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: source, output"),
        (["a", "--output", "b", "--config", "c"], "unrecognized arguments: --config c"),
        (["a", "--output", "b", "--image_size", "x"], "image_size must be an integer"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["import", *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_it_says_how_it_was_read(imported, capsys, tmp_path):
    folder, _ = imported
    main(["import", str(folder), "--output", str(tmp_path / "again.ckpt")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "network: UNet (the same layers as in diffusers)"
    assert "LinearSchedule" in lines[1]
    assert "DDIM(eta=0.0), 50 steps" in lines[2]
    assert "parameters" in lines[3]
