"""Calibration errors are those of a literal loop over bins and images."""

import numpy as np
import pytest
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st

from utils.reporting.calibration import calibrate

ANSWERS = st.lists(st.tuples(st.booleans(), st.floats(0.001, 1)), min_size=1, max_size=60)


def literal_errors(answers, bins):
    """The expected and the largest calibration error, as the paper writes them."""
    expected = largest = 0.0
    for number in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[number : number + 2]
        inside = [answer for answer in answers if low < answer[1] <= high]
        if inside:
            accuracy = sum(right for right, _ in inside) / len(inside)
            confidence = sum(sure for _, sure in inside) / len(inside)
            expected += len(inside) / len(answers) * abs(accuracy - confidence)
            largest = max(largest, abs(accuracy - confidence))
    return expected, largest


@examples(100)
@given(ANSWERS, st.sampled_from([1, 2, 10, 15]))
def test_errors_are_those_of_a_literal_loop(answers, bins):
    right, sure = map(np.array, zip(*answers, strict=True))
    found = calibrate(right, sure, bins)
    assert (found.expected_error, found.largest_error) == pytest.approx(literal_errors(answers, bins), abs=1e-12)
    assert found.images.sum() == len(answers)
    assert found.mean_accuracy == pytest.approx(right.mean(), abs=1e-12)
    assert found.mean_confidence == pytest.approx(sure.mean(), abs=1e-12)


def test_bins_take_in_their_upper_edge_and_empty_ones_are_no_numbers():
    found = calibrate(np.array([True, False, True]), np.array([0.5, 0.75, 1.0]), bins=4)
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.images.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(found.accuracy, [np.nan, 1, 0, 1])
    np.testing.assert_array_equal(found.confidence, [np.nan, 0.5, 0.75, 1])
    assert found.expected_error == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert found.largest_error == 0.75


def test_a_network_that_is_right_as_often_as_it_is_sure_has_no_error():
    found = calibrate(np.array([True, False, True, True]), np.array([0.5, 0.5, 1.0, 1.0]))
    assert found.expected_error == found.largest_error == 0
    assert len(found.images) == 15
