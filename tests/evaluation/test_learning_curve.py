import numpy as np
import pytest

from topwork.evaluation.learning_curve import _extrapolated, _part, learning_curve


def classes_in_a_cloud(n, n_classes=4, n_features=20, spread=1.1, seed=0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(n_classes, n_features))
    labels = np.arange(n) % n_classes
    return (centers[labels] + spread * rng.normal(size=(n, n_features)) * 2).astype(np.float32), labels


def test_accuracy_rises_and_the_forecast_goes_on_from_there():
    x, y = classes_in_a_cloud(400)
    correct = np.random.default_rng(1).uniform(size=400) < 0.86
    curve = learning_curve(x - x.mean(0), y, np.arange(400), 4, 0.03, correct, 0.8)
    assert [p.n for p in curve.points] == [50, 100, 200, 320]
    accuracies = [p.accuracy for p in curve.points]
    assert accuracies[0] < accuracies[2]
    assert all(p.low <= p.accuracy <= p.high for p in (*curve.points, *curve.forecasts))
    assert [f.n for f in curve.forecasts] == [400, 800, 1600]
    assert curve.forecasts[0].accuracy <= curve.forecasts[1].accuracy <= curve.forecasts[2].accuracy <= 1
    gain, low, high = curve.gain
    assert 0 <= low <= gain <= high


@pytest.mark.parametrize("seed", range(3))
def test_the_forecast_for_twice_the_images_holds(seed):
    """Learn the law on 200 images; the accuracy of a head on 400, judged on fresh images, lies in the interval."""
    from topwork.features.logistic import SoftmaxRegression

    x, y = classes_in_a_cloud(400, seed=seed)
    fresh, truth = classes_in_a_cloud(4000, seed=seed + 100)

    def accuracy(rows, judged, labels):
        mean = x[rows].mean(0)
        problem = SoftmaxRegression(x[rows] - mean, y[rows], 4, np.ones((1, len(rows))))
        problem.solve(0.03, tolerance=1e-4)
        weight, bias = problem.solution()
        return ((judged - mean) @ weight[0].T + bias[0]).argmax(1) == labels

    half = np.arange(200)
    fold = half % 5
    correct = np.concatenate([accuracy(half[fold != k], x[half[fold == k]], y[half[fold == k]]) for k in range(5)])
    order = np.concatenate([half[fold == k] for k in range(5)])
    out_of_fold = correct[np.argsort(order)]
    curve = learning_curve(x[half] - x[half].mean(0), y[half], half, 4, 0.03, out_of_fold, 0.8)
    forecast = curve.forecasts[1]
    assert forecast.low - 0.01 <= accuracy(np.arange(400), fresh, truth).mean() <= forecast.high + 0.01


def test_an_exact_power_law_is_found():
    sizes = [50, 100, 200, 400]
    n = 20000
    right = np.zeros((4, n))
    for row, size in enumerate(sizes):
        right[row, round(n * (0.02 + 2.0 * size**-0.7)) :] = 1
    rng = np.random.default_rng(0)
    curve = _extrapolated(sizes, right[:, rng.permutation(n)], 400, 0)
    expected = 1 - (0.02 + 2.0 * 800**-0.7)
    assert curve.forecasts[1].accuracy == pytest.approx(expected, abs=0.004)
    assert curve.forecasts[1].low <= expected <= curve.forecasts[1].high


def test_a_flat_curve_promises_nothing():
    right = np.ones((4, 500))
    right[:, :25] = 0
    curve = _extrapolated([60, 125, 250, 400], right, 500, 0)
    assert curve.gain[0] < 0.01
    assert curve.forecasts[1].accuracy == pytest.approx(0.95, abs=0.01)


def test_parts_take_every_class_and_whole_groups_stay_out_of_the_judging():
    y = np.repeat([0, 1, 2], [60, 20, 10])
    rows = _part(y, np.arange(90), 30, np.random.default_rng(0))
    assert len(rows) == 30
    counts = np.bincount(y[rows], minlength=3)
    assert (counts >= [15, 4, 2]).all()


def test_too_few_images_give_no_curve():
    x, y = classes_in_a_cloud(20)
    assert learning_curve(x, y, np.arange(20), 4, 0.03, np.ones(20, bool), 0.8) is None


def test_the_line_that_is_drawn_passes_through_the_forecasts():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    columns = rng.normal(size=(120, 8)).astype(np.float32)
    columns[:, 0] += 1.5 * labels
    found = learning_curve(columns, labels, np.arange(120), 2, 0.1, rng.random(120) < 0.85, 0.8)
    sizes, accuracy = np.array(found.line).T
    for forecast in found.forecasts:
        assert np.interp(forecast.n, sizes, accuracy) == pytest.approx(forecast.accuracy, abs=2e-3)
