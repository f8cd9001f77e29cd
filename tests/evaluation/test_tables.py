"""Tables and plots."""

import re

from sweeps import sweep

from ddim_pl.samplers import DDIM


def test_the_plot_and_table_of_one_cell(tmp_path):
    sweep(tmp_path, timesteps=["linear"], num_steps=[1], samplers=[DDIM()])
    assert re.search(
        r"\| DDIM\(eta=0.0\) \| linear \| 1 \| 1 \|", (tmp_path / "sweep.md").read_text()
    )
