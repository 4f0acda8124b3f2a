"""Fronts, hypervolume and intervals against what a reader believes at sight."""

import itertools
import math

import numpy as np
import pytest

from utils.pareto import (
    PlotPoint,
    bootstrap,
    hypervolume,
    hypervolume_interval,
    interpolate_at,
    mean_interval,
    paired_difference,
    pareto_front,
    plot_curves,
    plot_front,
    reference_point_of,
)


def brute_front(points):
    return [
        not any(all(q[m] >= p[m] for m in range(len(p))) and any(q[m] > p[m] for m in range(len(p))) for q in points)
        for p in points
    ]


def brute_volume(points, reference):
    """Cells of the grid that the points' coordinates span, counted where a point dominates them."""
    axes = [sorted({r} | {p[m] for p in points if p[m] > r}) for m, r in enumerate(reference)]
    volume = 0.0
    for cell in itertools.product(*(range(len(a) - 1) for a in axes)):
        top = [axes[m][c + 1] for m, c in enumerate(cell)]
        if any(all(p[m] >= top[m] for m in range(len(top))) for p in points):
            volume += math.prod(axes[m][c + 1] - axes[m][c] for m, c in enumerate(cell))
    return volume


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_front_and_hypervolume_equal_brute_force(objectives):
    rng = np.random.default_rng(objectives)
    for n in (1, 2, 5, 7):
        points = rng.integers(-2, 4, (n, objectives)).astype(float)  # small integers: many ties and copies
        assert pareto_front(points).tolist() == brute_front(points.tolist())
        reference = [-1.0] * objectives
        assert hypervolume(points, reference) == pytest.approx(brute_volume(points.tolist(), reference))


def test_hypervolume_equals_moocore():
    moocore = pytest.importorskip("moocore")
    rng = np.random.default_rng(0)
    for objectives in (2, 3):
        points = rng.normal(size=(20, objectives))
        expected = moocore.hypervolume(points, ref=[-3.0] * objectives, maximise=True)
        assert hypervolume(points, [-3.0] * objectives) == pytest.approx(expected, rel=1e-12)


def test_copies_of_a_front_point_all_stay_and_a_weakly_dominated_one_goes():
    assert pareto_front([[1, 1], [1, 1], [1, 0], [0, 2]]).tolist() == [True, True, False, True]


def test_hypervolume_of_one_square_and_of_points_below_the_reference():
    assert hypervolume([[2, 3]], (0, 1)) == 4.0
    assert hypervolume([[2, 3], [-1, 9], [5, 1]], (0, 1)) == 4.0  # neither adds: outside, and on the border
    assert hypervolume([], (0, 0)) == 0.0
    assert hypervolume([[1, 3], [3, 1]], (0, 0)) == 5.0


def test_points_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        pareto_front([[0, float("nan")]])
    with pytest.raises(ValueError, match="reference point"):
        hypervolume([[1, 2]], (0, 0, 0))


def test_the_mean_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    low, high = mean_interval(values)
    error = values.std(ddof=1) / 20
    # 2,000 draws put each end within a few percent of the standard error of its place
    assert abs(low - (values.mean() - 1.96 * error)) < 0.2 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.2 * error
    assert mean_interval(values) == (low, high)  # the same seed, the same interval
    assert all(math.isnan(v) for v in mean_interval([1.0]))


def test_paired_differences_use_the_shared_prompts_alone():
    a, b = {0: 1.0, 1: 2.0, 2: 4.0, 9: 100.0}, {0: 0.0, 1: 0.0, 2: 0.0, 7: -100.0}
    d = paired_difference(a, b)
    assert d.prompts == 3 and d.mean == pytest.approx(7 / 3)
    assert d.error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert paired_difference({0: 1.0}, {1: 1.0}).prompts == 0


def test_pairing_takes_the_prompts_own_variance_out():
    rng = np.random.default_rng(0)
    prompts, noise = rng.normal(size=100), rng.normal(size=100)
    a = dict(enumerate(5 * prompts + 0.1 * noise + 0.2))
    b = dict(enumerate(5 * prompts))
    assert paired_difference(a, b).error < 0.02  # unpaired it would be 0.7


def test_the_hypervolume_interval_resamples_all_runs_on_the_same_prompts():
    tables = np.random.default_rng(0).normal(size=(3, 30, 2))
    reference = reference_point_of(tables.mean(1))
    value, (low, high) = hypervolume_interval(tables, reference, draws=300)
    assert value == hypervolume(tables.mean(1), reference) and low < value < high
    draws = bootstrap(lambda rows: tables[0, rows, 0].mean() - tables[0, rows, 0].mean(), 30, draws=10)
    assert (draws == 0).all()


def test_the_reference_point_lies_a_tenth_of_the_range_below_the_worst():
    assert reference_point_of([[0, 10], [2, 20]]).tolist() == [-0.2, 9.0]
    assert reference_point_of([[1, 1], [1, 2]])[0] < 1  # no range: still below


def test_a_reward_at_equal_kl_is_read_between_runs_and_never_beyond_them():
    assert interpolate_at(1.5, [2.0, 1.0], [4.0, 0.0]) == 2.0
    assert math.isnan(interpolate_at(2.5, [1.0, 2.0], [0.0, 4.0]))
    assert math.isnan(interpolate_at(0.5, [], []))


def test_plots_are_png_files_and_take_points_without_intervals(tmp_path):
    series = {
        "a": [PlotPoint(0, 1, (-1, 1), (0, 2), "1/0"), PlotPoint(1, 0, text="0/1")],
        "b": [PlotPoint(0, 0)],
    }
    plot_front(tmp_path / "f.png", series, PlotPoint(0.5, 0.5), labels=("help", "harm"), title="t")
    panels = {"help": {"1/0": (series, PlotPoint(0, 0))}, "harm": {"1/0": (series, None), "0/1": ({}, None)}}
    plot_curves(tmp_path / "c.png", panels, x_label="KL", title="t")
    for name in ("f.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
