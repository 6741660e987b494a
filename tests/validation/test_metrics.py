"""Metrics against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeattn.models import MODELS
from edgeattn.validation.metrics import HISTOGRAM_EDGES, METRICS, Agreement, Confusion, TensorComparison

FINITE = st.floats(-1e6, 1e6, width=32)
PAIRS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=FINITE).flatmap(
    lambda array: st.tuples(st.just(array), hnp.arrays(np.float32, array.shape, elements=FINITE))
)


def compare(reference, actual):
    comparison = TensorComparison()
    comparison.add(np.asarray(reference, np.float32), np.asarray(actual, np.float32))
    return comparison.result()


@given(PAIRS)
def test_distances_follow_their_definitions(pair):
    reference, actual = (array.astype(np.float64) for array in pair)
    error = compare(*pair)
    difference = np.abs(reference - actual)
    norm = np.linalg.norm(reference)
    assert error.max_abs == difference.max()
    assert error.mean_abs == pytest.approx(difference.mean())
    if norm:
        assert error.relative_l2 == pytest.approx(np.linalg.norm(difference) / norm, rel=1e-9)
        assert error.worst_relative_l2 == error.relative_l2
    if norm and np.linalg.norm(actual):
        cosine = (reference * actual).sum() / norm / np.linalg.norm(actual)
        assert error.cosine == pytest.approx(cosine, rel=1e-9, abs=1e-12)
    assert error.compared == reference.size == sum(error.histogram) + error.exact


@given(PAIRS)
def test_samples_pool(pair):
    reference, actual = pair
    streamed = TensorComparison()
    single = [streamed.add(*rows) for rows in zip(reference, actual, strict=True)]
    pooled, whole = streamed.result(), compare(reference, actual)
    assert pooled.max_abs == whole.max_abs
    assert pooled.histogram == whole.histogram
    assert pooled.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-9)
    assert pooled.worst_relative_l2 == max(single)


def test_equal_infinities_and_shared_nans_are_equal():
    error = compare([np.inf, -np.inf, np.nan, 2.0], [np.inf, -np.inf, np.nan, 2.0])
    assert (error.mismatched, error.compared, error.max_abs, error.relative_l2) == (0, 1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("left", "right"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, -np.inf), (np.inf, 1.0), (np.nan, np.inf)]
)
def test_one_sided_values_are_counted(left, right):
    error = compare([left, 3.0], [right, 3.0])
    assert (error.mismatched, error.compared, error.max_abs) == (1, 1, 0.0)


def test_zero_reference():
    assert compare([0.0], [0.0]).relative_l2 == 0.0
    assert compare([0.0], [0.0]).cosine == 1.0
    assert compare([0.0], [1.0]).relative_l2 == np.inf
    assert compare([0.0], [1.0]).cosine == 0.0


def test_histogram_bins_are_decades_of_the_error():
    error = compare([0.0, 0.0, 0.0, 0.0], [2e-3, 0.0, 1e-30, 1e30])
    filled = {HISTOGRAM_EDGES[index]: count for index, count in enumerate(error.histogram) if count}
    assert filled == {-12.0: 1, -3.0: 1, HISTOGRAM_EDGES[-2]: 1}
    assert error.exact == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        TensorComparison().add(np.zeros(2), np.zeros(3))


LABELS = hnp.arrays(np.int64, (2, 3, 4), elements=st.integers(0, 3))


@given(LABELS, LABELS)
def test_iou_counts_pixels(target, prediction):
    confusion = Confusion(4)
    for rows in zip(target, prediction, strict=True):
        confusion.add(*rows)
    scores = []
    for label, score in enumerate(confusion.class_iou()):
        union = ((target == label) | (prediction == label)).sum()
        if union == 0:
            assert np.isnan(score)
        else:
            scores.append(((target == label) & (prediction == label)).sum() / union)
            assert score == pytest.approx(scores[-1])
    assert confusion.mean_iou() == pytest.approx(np.mean(scores))


def test_iou_without_pixels_is_nan():
    assert np.isnan(Confusion(3).mean_iou())
    assert np.isnan(Confusion(3).accuracy())


@given(LABELS, LABELS)
def test_accuracy_counts_labels(target, prediction):
    confusion = Confusion(4)
    confusion.add(target, prediction)
    assert confusion.accuracy() == pytest.approx((target == prediction).mean())
    for label, score in enumerate(confusion.class_accuracy()):
        of_class = target == label
        if of_class.any():
            assert score == pytest.approx((prediction[of_class] == label).mean())
        else:
            assert np.isnan(score)


def test_every_metric_of_the_models_is_known():
    assert {spec.metric for spec in MODELS} <= METRICS.keys()
    assert all(name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize(("target", "prediction"), [([3], [0]), ([0], [-1])])
def test_labels_beyond_the_classes_are_refused(target, prediction):
    with pytest.raises(ValueError, match="there are 3 classes"):
        Confusion(3).add(np.array(target), np.array(prediction))


def test_agreement_weighs_pixels():
    agreement = Agreement()
    assert np.isnan(agreement.fraction)
    assert agreement.add(np.array([1, 1]), np.array([1, 2])) == 0.5
    assert agreement.add(np.zeros(6), np.zeros(6)) == 1.0
    assert agreement.fraction == pytest.approx(7 / 8)
    with pytest.raises(ValueError, match="cannot compare labels"):
        agreement.add(np.zeros(2), np.zeros(3))
