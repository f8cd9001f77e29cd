"""A page can be followed on another machine."""

import shlex

from claim_page import quoted, write_page
from claim_stages import Maker
from studies import cifar10


def test_no_folder_of_this_machine_is_on_the_page(tmp_path):
    root, out = tmp_path / "images", tmp_path / "out"
    study = cifar10(str(root), 128_000)
    write_page(study, [0], Maker(study, 0, out).all(), {}, out, {"threads": 1})
    page = (out / "claims.md").read_text()
    assert str(tmp_path) not in page
    assert "reproduce.py cifar10 --root=$ROOT --images=128000 --seeds 0\n" in page
    assert "--data.root=$ROOT" in page
    assert "OUT=runs/reproduce-cifar10<" in page
    assert "--trainer.logger.init_args.save_dir=$OUT/runs " in page


def test_words_are_those_that_a_shell_reads():
    """Without its variables, for which quotation marks stand that replace them."""
    for word in ("--a=b", "--a=[1, 2]", '--a={"b": 1}', "a=b c", '--a=[{"b": "$OUT/c"}]'):
        assert shlex.split(quoted(word)) == [word]
    assert quoted("--a=[$OUT/b]") == '"--a=[$OUT/b]"'
    assert quoted("$OUT/b") == "$OUT/b"
