"""Every command in README.md, docs and configs: it can be read, and those on digits run."""

import os
import re
import shlex
import warnings
from pathlib import Path

import pytest

from ddim_pl.cli import alone_parser, main
from ddim_pl.commands import ALONE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:\S*python )?main\.py [^`]*)`")
NEEDS = {  # what a page leaves to the reader
    "TEACHER": "runs/digits-teacher/version_0/checkpoints/last.ckpt",
    "CHECKPOINT": "last",
    "SEED": "0",
}


def lines_of(page):
    """The lines of a page that a reader types."""
    text = page.read_text()
    if page.suffix == ".yaml":
        return [line[1:].strip() for line in text.splitlines() if re.match(r"#\s+python ", line)]
    blocks = "".join(BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return blocks + [" ".join(found.split()) for found in INLINE.findall(prose)]


def commands(pages):
    """Arguments of `main.py` or `ddim-pl`, each once, and the page that has them."""
    found = {}
    for page in pages:
        names = dict(NEEDS)
        for line in lines_of(page):
            given = re.match(r'(\w+)=("?)(.*)\2$', line)
            if given:
                names[given[1]] = given[3]
            words = shlex.split(line, comments=True)
            places = [i for i, word in enumerate(words) if word.endswith(("main.py", "ddim-pl"))]
            if not places:
                continue
            at = places[0]
            words = [names.get(word.lstrip("$"), word) for word in words[at + 1 :]]
            if len(words) > 1 and not {"...", "VERB", "FILE", "--help"} & set(words):
                found.setdefault(tuple(words), page.name)
    return found


EVERY = commands([*PAGES, *CONFIGS])
FITS = [words for words in EVERY if words[0] == "fit"]
WITHOUT_MODEL = [words for words in EVERY if words[0] in ALONE]
OTHERS = [
    words
    for words in EVERY
    if words[0] != "fit" and ("--ckpt_path" in words or "DigitsFeatures" in words)
]
FIRST = [
    ("fit", "--config", f"configs/digits/{name}.yaml")
    for name in ("ddpm", "ddpm_linear", "teacher", "gamma_ddpm")
]
"""What the other commands need."""


def test_there_are_commands():
    assert len(FITS) > 15
    assert {words[0] for words in OTHERS} >= {"test", "predict", "sample", "sweep", "compare"}
    assert set(FIRST) <= set(FITS)


@pytest.mark.parametrize("words", WITHOUT_MODEL, ids=" ".join)
def test_a_command_without_a_model_can_be_read(words):
    alone_parser(words[0]).parse_args(words[1:])


@pytest.mark.parametrize("words", FITS, ids=" ".join)
def test_a_fit_can_be_read(words, monkeypatch, capsys):
    if "my_networks.Small" in words:
        pytest.skip("it is run in tests/training/test_hyperparameters.py")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err


SMALL_FIT = {
    **{"--trainer.limit_val_batches": "0", "--trainer.accelerator": "cpu"},
    "--trainer.enable_progress_bar": "false",
}
TWO_UPDATES = {"--trainer.max_steps": "2", "--data.batch_size": "8"}
OF_PAIRS = {
    **{"--data.num_pairs": "48", "--data.num_validation": "16", "--data.shard_size": "16"},
    **{"--model.teacher_num_steps": "2", "--trainer.max_steps": "2", "--data.batch_size": "8"},
}
SMALL = {
    "progressive": {
        "--model.init_args.rounds": "[[8,1],[4,1],[2,1],[1,1]]",
        "--data.batch_size": "8",
    },
    "luhman": OF_PAIRS,
    "reflow": OF_PAIRS,
    "test": {"--trainer.limit_test_batches": "1", "--trainer.callbacks": "callbacks.ImageWriter"},
    "validate": {"--trainer.limit_val_batches": "1"},
    "predict": {"--data.num_predict": "2"},
    "sample": {"--num_images": "2"},
    "interpolate": {"--num_pairs": "1", "--num_points": "2"},
    "reconstruct": {"--num_images": "2", "--num_steps": "[2]"},
    "invert": {"--num_images": "2", "--num_updates": "1", "--num_steps": "3"},
    "inpaint": {"--num_images": "1", "--num_fills": "1", "--num_resamples": "1"},
    "forward": {"--num_images": "2"},
    "levels": {"--num_images": "4", "--num_steps": "[2]"},
    "pairs": {"--num_pairs": "32", "--shard_size": "16"},
    "sweep": {"--num_samples": "40", "--num_steps": "[2]", "--num_shown": "2"},
    "compare": {"--num_samples": "40", "--num_steps": "[2]", "--num_shown": "2"},
    # What the demo needs, which has classes and draws by DPM-Solver++.
    "export": {"--model.sampler": "DDIM"},
    "stats": {},
    "measure": {},
}


def smaller(words):
    """The same command with few images, steps and updates."""
    if words[0] != "fit":
        more = SMALL[words[0]] | ({"--label": "1"} if "diffusers" in words else {})
        if "digits-consistency" in str(words):  # its sampler is its own
            more = {name: value for name, value in more.items() if name != "--model.sampler"}
    else:
        methods = ("progressive", "luhman", "reflow")
        method = next((name for name in methods if name in str(words)), None)
        more = SMALL_FIT | (SMALL[method] if method else TWO_UPDATES)
        if "[[1,4000]]" in words:  # its teacher is a student of two steps
            more = {**more, "--model.init_args.rounds": "[[1,1]]"}
        if "conversion_updates" in str(words):
            more = {**more, "--model.init_args.conversion_updates": "1"}
    return [*words, *(f"{name}={value}" for name, value in more.items())]


@pytest.mark.slow
def test_every_command_on_digits_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr("ddim_pl.commands.sweep.SEARCH_IMAGES", 4)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    digits = [words for words in FITS if "configs/digits/" in str(words)]
    left = [words for words in digits if words not in FIRST and "my_networks.Small" not in words]
    # A fit of another network would be the newest run of its experiment.
    others = [words for words in left if "--model.network" in str(words)]
    left = [words for words in left if words not in others]
    # Lightning would start pytest as the second process.
    on_digits = [w for w in OTHERS if "cifar10" not in str(w) and "--trainer.devices" not in w]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for words in [*FIRST, *left, *on_digits, *others]:
            if words == on_digits[0]:  # the demo, which `last` is where the pages say so
                os.utime("runs/digits-ddpm/version_0/checkpoints/last.ckpt")
            try:
                main(smaller(words))
            except SystemExit as stop:
                text = capsys.readouterr().err
                raise AssertionError(
                    f"{' '.join(words)} ({EVERY[words]}): {stop} {text}"
                ) from None


def test_scripts_in_benchmarks_have_the_options_that_pages_give():
    for page in PAGES:
        for line in lines_of(page):
            found = re.search(r"benchmarks/\w+\.py", line)
            if found:
                script = (ROOT / found[0]).read_text()
                if "command(STAGES" in script:  # the command line that benchmarks share
                    script += (ROOT / "benchmarks" / "measuring.py").read_text()
                for option in re.findall(r"(--[a-z_0-9-]+)", line):
                    assert f'"{option}"' in script, (page.name, line, option)


def test_the_table_of_the_report_names_files_that_exist():
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (ROOT / "docs" / "coverage.md").read_text().splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 6, row
        assert all(row), row
        files = re.findall(r"`((?:ddim_pl|tests|callbacks|configs)/[\w/.]+)`", " ".join(row))
        assert any(file.startswith("tests/") for file in files), row
        for file in files:
            assert (ROOT / file).exists(), file


def test_links_lead_to_files_that_exist():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        links = re.findall(r"\]\(([^)#]+)", page.read_text())
        for link in links:
            if not re.match(r"\w+:", link):
                assert (page.parent / link).exists(), (page.name, link)
