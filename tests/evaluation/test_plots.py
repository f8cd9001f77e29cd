from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddim_pl.evaluation import plots


def drawn(monkeypatch, tmp_path, rows):
    """The axes of the plot, after it is drawn."""
    kept = []
    monkeypatch.setattr(plots, "_save_figure", lambda figure, path: kept.append(figure))
    plots.plot_distances(tmp_path / "plot.png", rows, "fd", ["a"] * len(rows))
    (figure,) = kept
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()
    return figure.axes


def labels(axes):
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    found = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]
    return [text for text in found if text]


def rows_of(values, evaluations=1):
    return [
        {"steps": 2**i, "network evaluations": evaluations * 2**i, "fd": value}
        for i, value in enumerate(values)
    ]


def test_a_distance_can_be_read_off_whatever_its_range(monkeypatch, tmp_path):
    for values in ((2.8, 8.8), (2.2, 5.0, 11.6), (0.1, 3.0, 900.0), (0.0013, 0.0019, 0.004)):
        (axes,) = drawn(monkeypatch, tmp_path, rows_of(values))
        assert len(labels(axes)) >= 3, (values, labels(axes))


def test_evaluations_are_plotted_where_they_are_not_the_steps(monkeypatch, tmp_path):
    names = [axes.get_xlabel() for axes in drawn(monkeypatch, tmp_path, rows_of([1.0, 2.0], 2))]
    assert names == ["steps", "network evaluations"]
