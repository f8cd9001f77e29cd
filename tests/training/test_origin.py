"""The origin of a checkpoint: what a stranger's may hold, and what a resumed run keeps."""

import pytest
import torch
from ladders import fit, ladder, save
from tiny import some_ddpm

from ddim_pl.exports.card import card
from ddim_pl.exports.formats import make_export
from ddim_pl.training import DDPM
from ddim_pl.training.origin import read_origin

OWN = {"by": "ProgressiveDistillation", "teacher": "t.ckpt", "updates": 5, "rounds": [[4, 5]]}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, ()),
        ("text", ()),
        (3, ()),
        ({"by": "import"}, ()),
        (["text", 3, None], ()),
        ([{"source": "x"}], ()),
        ([{"by": 3}], ()),
        ([OWN], (OWN,)),
        ([{"by": "import", "source": "/home/me/secret/x"}], ({"by": "import", "source": "x"},)),
        ([{"by": "import", "a b": 1, 3: 4}], ({"by": "import"},)),
        ([{"by": "import", "x": torch.zeros(2)}], ({"by": "import", "x": None},)),
        ([{"by": "a\nb" + "c" * 500}], ({"by": "a b" + "c" * 197},)),
    ],
)
def test_a_strangers_origin_is_read_as_far_as_it_is_one(found, expected):
    assert read_origin({"ddim_pl_origin": found}) == expected


def test_it_is_short_and_fits_a_card(tmp_path):
    model = some_ddpm()
    content = torch.load(save(model, tmp_path / "a.ckpt"), weights_only=True)
    deep = [[[[1]]]] * 50
    content["ddim_pl_origin"] = [{"by": "import", "source": "data/teacher", "x": deep}] * 50
    torch.save(content, tmp_path / "b.ckpt")
    read = DDPM.load_from_checkpoint(tmp_path / "b.ckpt", weights_only=True)
    assert len(read.origin) == 20
    text = card(make_export(read, "safetensors"), read, name="x")
    assert "base_model" not in text  # not said to be of the Hub
    assert len(text) < 30_000


@pytest.mark.slow
def test_a_checkpoint_of_before_keeps_the_origin_of_its_teacher(teacher, tmp_path):
    content = torch.load(teacher, weights_only=True)
    content["ddim_pl_origin"] = [{"by": "import", "source": "x"}]
    torch.save(content, tmp_path / "teacher.ckpt")
    begun = ladder(str(tmp_path / "teacher.ckpt"))
    fit(begun, tmp_path, max_steps=3).save_checkpoint(tmp_path / "half.ckpt")
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert [each["by"] for each in half["ddim_pl_origin"]] == ["import", "ProgressiveDistillation"]
    before = dict(half)
    del before["ddim_pl_origin"]
    torch.save(before, tmp_path / "before.ckpt")
    for name in ("half", "before"):
        resumed = ladder(str(tmp_path / "teacher.ckpt"))
        fit(resumed, tmp_path, ckpt_path=tmp_path / f"{name}.ckpt")
        found = resumed.student_checkpoint()["ddim_pl_origin"]
        if name == "half":
            assert [each["by"] for each in found] == ["import", "ProgressiveDistillation"]
        else:
            assert found[0]["by"] == "import"
