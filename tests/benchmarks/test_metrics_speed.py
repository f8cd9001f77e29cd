"""What extracts features is measured as the metrics call it."""

import torch
from measuring import Bench, Results
from metrics_speed import features

from ddim_pl.metrics.inception import InceptionFeatures
from ddim_pl.metrics.precision import SWITCHES


def test_features_are_measured_in_the_precision_of_the_metrics(tmp_path, monkeypatch):
    """Which is one: that of the switches, as a contender, would be no precision of theirs."""
    seen = set()

    def forward(extractor, images):
        seen.update(switch.fp32_precision for switch in SWITCHES)
        return torch.zeros(len(images), extractor.num_features)

    monkeypatch.setattr(InceptionFeatures, "forward", forward)
    bench = Bench(Results(tmp_path, "try", {}), tiny=True, rounds=2, stage="features")
    features(bench)
    rows = bench.results.rows("features")
    assert [row["contender"] for row in rows] == [
        "features, float32",
        "features and sums, float32",
    ]
    assert seen == {"ieee"}
