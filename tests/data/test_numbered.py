"""Numbers of classes."""

import warnings

import pytest

from ddim_pl.data.numbered import MOST_CLASSES, count_classes


def test_the_number_of_classes_is_the_largest_and_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_classes([1, 0, 2, 1], "source") == 3
        assert count_classes([], "source") == 0
        assert count_classes([7], "source", report=False) == 8


def test_labels_without_images_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"source gives no image the labels 0, 2, though .*to 3:"):
        count_classes([1, 3], "source")
    with pytest.warns(UserWarning, match=r"labels 0, 1, .*, 11, \.\.\., though .*to 999999:"):
        count_classes([MOST_CLASSES - 1], "source")


def test_more_are_no_classes() -> None:
    with pytest.raises(ValueError, match="source must give classes below 1000000, got 1000000:"):
        count_classes([MOST_CLASSES], "source")
