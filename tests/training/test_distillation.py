"""Teachers: what is inherited, and what is refused."""

import pytest
import torch
from ladders import clone, fit, ladder, same, save
from tiny import some_ddpm, tiny_ddpm, tiny_unet

from ddim_pl.schedules import CosineLogSNRSchedule, LinearSchedule
from ddim_pl.training.loading import load as load_teacher


def test_a_v_teacher_gives_all_that_is_not_said(teacher):
    read, module = load_teacher(teacher), ladder(teacher, dropout=0.0)
    assert module.schedule == read.schedule
    assert module.first_prediction == "v"
    assert (module.time_input, module.clip) == ("log_snr", False)
    assert module.image_shape == read.image_shape
    for network in (module.network, module.average.module, module.teacher):
        assert same(clone(network), clone(read.average.module))


def test_a_student_has_the_teachers_source_of_noise_unless_it_is_given_one(tmp_path):
    """So that images of one seed begin at one latent."""
    teacher = save(some_ddpm(prediction="v", noise_source="philox"), tmp_path / "philox.ckpt")
    module = ladder(teacher)
    assert module.noise_source == "philox"
    assert module.student_checkpoint()["hyper_parameters"]["noise_source"] == "philox"
    path = save(module, tmp_path / "student.ckpt")
    assert load_teacher(path).noise_source == "philox"
    assert ladder(teacher, noise_source="generators").noise_source == "generators"


def test_a_student_of_before_has_generators(teacher, tmp_path):
    path = save(ladder(teacher), tmp_path / "student.ckpt")
    content = torch.load(path, weights_only=True)
    del content["hyper_parameters"]["noise_source"]
    torch.save(content, tmp_path / "old.ckpt")
    assert load_teacher(tmp_path / "old.ckpt").noise_source == "generators"


def test_another_network_does_not_change_how_the_teacher_is_read(eps_teacher, tmp_path):
    given = {"network": tiny_unet(), "schedule": LinearSchedule(), "rounds": [(4, 2)]}
    module = ladder(eps_teacher, **given)
    with pytest.raises(ValueError, match="predicts 'eps', but is read as 'v': set teacher_pred"):
        fit(module, tmp_path)
    told = ladder(eps_teacher, teacher_prediction="eps", conversion_updates=0, **given)
    fit(told, tmp_path)
    assert told.teacher_denoiser.prediction == "eps"


def test_a_teacher_is_not_read_as_what_it_does_not_predict(teacher):
    """A resumed run reads no teacher: it must go on as it began."""
    with pytest.raises(ValueError, match="predicts 'v', but is read as 'eps': set teacher_pred"):
        ladder(teacher, teacher_prediction="eps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": [(8, 1), (3, 1)]}, "rounds must halve the steps: after 8 comes 4, got 3"),
        ({"rounds": [(4, 1), (8, 1)]}, "rounds must halve the steps: after 4 comes 2, got 8"),
        ({"rounds": [(3, 1), (1, 1)]}, "after 3 comes 1.5, got 1"),
        ({"rounds": []}, "rounds must hold at least one pair"),
        ({"rounds": [(4, 0)]}, r"rounds must hold pairs .* of at least 1, got \[4, 0\]"),
        ({"rounds": [(0, 4)]}, r"got \[0, 4\]"),
        ({"rounds": [(4,)]}, r"rounds must hold pairs .*, got \[4\]"),
        ({"rounds": [(1001, 1)]}, r"num_steps must lie in \[1, 1000\].* got 1001"),
        (
            {"prediction": "eps"},
            "prediction must be 'v', 'x', 'both' or 'edm' .* got 'eps': at the last level",
        ),
        (
            {"prediction": "eps", "loss_weight": "truncated_snr"},
            "prediction must be 'v', 'x', 'both' or 'edm' .* got 'eps'",
        ),
        (
            {"prediction": "residual"},
            "prediction must be 'v', 'x', 'both' or 'edm' .* got 'residual'",
        ),
        ({"loss_weight": "snr_plus_two"}, "loss_weight must be one of .* got 'snr_plus_two'"),
        ({"conversion_updates": -1}, "conversion_updates must be at least 0, got -1"),
        ({"warmup_steps": -2}, "warmup_steps must be at least 0, got -2"),
        ({"teacher": None}, "teacher must be given"),
        (
            {"teacher": "nowhere.ckpt"},
            "teacher must be a checkpoint .* got 'nowhere.ckpt', which is no file",
        ),
        ({"schedule": LinearSchedule()}, "teacher .* has schedule CosineLogSNR.* given Linear"),
        ({"time_input": "index"}, "teacher .* has time_input log_snr, .* given index"),
        ({"sigma_data": 0.5}, "teacher .* has sigma_data 1.0, .* given 0.5"),
        ({"image_shape": (1, 16, 16)}, r"teacher .* has image_shape .* given \(1, 16, 16\)"),
    ],
)
def test_wrong_arguments_are_refused(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        ladder(teacher, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 12}, "has another network than the student"),
        (
            {"image_size": 16, "attention": [8]},
            r"has image_shape \(1, 8, 8\), .* \(1, 16, 16\)",
        ),
    ],
)
def test_a_network_that_is_not_the_teachers_is_refused_before_training(
    teacher, tmp_path, change, message
):
    module = ladder(
        teacher,
        network=tiny_unet(**change),
        schedule=CosineLogSNRSchedule(),
        time_input="log_snr",
    )
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path)
    assert module.global_step == 0


@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint", {"state_dict": {}}, torch.zeros(3), [1]],
    ids=["bytes", "no arguments", "tensor", "list"],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(
        ValueError,
        match=r"teacher must be a checkpoint.*other.ckpt'?, which (cannot be read|is damaged)",
    ):
        ladder(str(path))


def test_a_checkpoint_of_an_unknown_class_is_refused_by_name(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "os.system"}}, path)
    with pytest.raises(ValueError, match=r"names .os.system., which is refused"):
        ladder(str(path))


def test_a_checkpoint_whose_weights_do_not_fit_is_refused(tmp_path):
    path = save(tiny_ddpm(), tmp_path / "model.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["network"]["init_args"]["channels"] = 12
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=r"teacher must be a checkpoint .*model.ckpt', which cannot be read"
    ):
        ladder(path)


def test_a_ladder_does_not_distil_guidance_and_a_student_has_none(tmp_path):
    network = tiny_unet(num_classes=10, null_class=True)
    path = save(some_ddpm(network=network, guidance=2.0), tmp_path / "guided.ckpt")
    with pytest.raises(ValueError, match="has guidance 2, which is for drawing images and not"):
        ladder(path)
    plain = save(some_ddpm(network=network), tmp_path / "plain.ckpt")
    assert ladder(plain).sampling_guidance is None
    with pytest.raises(ValueError, match=r"guidance must be left out for a student, got 2\.0"):
        ladder(plain, guidance=2.0)
    student = save(ladder(plain, conversion_updates=0), tmp_path / "student.ckpt")
    with pytest.raises(ValueError, match="guidance must be left out for a student"):
        load_teacher(student, guidance=2.0)
