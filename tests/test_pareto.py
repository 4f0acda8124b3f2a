"""Fronts, hypervolume and intervals against what a reader believes at sight."""

import itertools
import math

import numpy as np
import pytest

from utils.pareto import (
    bootstrap,
    equal_kl,
    hypervolume,
    hypervolume_draws,
    line_at,
    mean_interval,
    paired_difference,
    pareto_front,
    percentiles,
    reference_point_of,
)
from utils.plots import THEMES, Look, PlotPoint, looks_of, plot_curves, plot_front


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


def test_hypervolume_equals_the_share_of_a_box_that_random_points_find():
    """A second check that shares no idea with the first; 200,000 draws have a standard error of 0.1 %."""
    rng = np.random.default_rng(0)
    points = rng.random((12, 3))
    probes = rng.random((200_000, 3))
    share = (probes[:, None] <= points).all(-1).any(-1).mean()
    assert hypervolume(points, [0.0] * 3) == pytest.approx(share, abs=0.005)


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
    value, drawn = hypervolume_draws(tables, reference, draws=300)
    low, high = percentiles(drawn)
    assert value == hypervolume(tables.mean(1), reference) and low < value < high
    assert (hypervolume_draws(tables, reference, draws=300)[1] == drawn).all()  # so that differences are paired
    draws = bootstrap(lambda rows: tables[0, rows, 0].mean() - tables[0, rows, 0].mean(), 30, draws=10)
    assert (draws == 0).all()


def test_the_reference_point_lies_a_tenth_of_the_range_below_the_worst():
    assert reference_point_of([[0, 10], [2, 20]]).tolist() == [-0.2, 9.0]
    assert reference_point_of([[1, 1], [1, 2]])[0] < 1  # no range: still below


def test_a_reward_is_read_on_the_lines_between_measured_points():
    curve = np.array([[2.0], [1.0], [4.0]]), np.array([[4.0], [0.0], [5.0]])
    for kl, value, inside in ((1.5, 2.0, True), (1.0, 0.0, True), (3.0, 4.5, True), (5.0, 5.5, False), (0, -4, False)):
        got, within = line_at([kl], *curve)
        assert (got[0], within[0]) == (value, inside)
    assert math.isnan(line_at([1.0], [[1.0]], [[2.0]])[0][0])  # one point is no line
    assert line_at([1.0], [[1.0], [1.0]], [[2.0], [4.0]])[0][0] == 3.0


def test_many_resamples_are_read_as_one_by_one():
    rng = np.random.default_rng(0)
    x, y, kl = rng.random((4, 50)), rng.random((4, 50)), rng.random(50)
    got, inside = line_at(kl, x, y)
    for d in range(50):
        order = np.argsort(x[:, d])
        assert inside[d] == (x[:, d].min() <= kl[d] <= x[:, d].max())
        if inside[d]:
            assert got[d] == pytest.approx(np.interp(kl[d], x[order, d], y[order, d]))
    assert 10 < inside.sum() < 50


def made_up_curve(rng, n, kls, slope=0.5, bend=0.0):
    """KL and reward (len(kls), n) of runs whose true mean reward is slope * kl - bend * kl^2; prompts are shared."""
    level = rng.normal(size=n)
    kl = np.array(kls)[:, None] + 0.4 * rng.normal(size=(len(kls), n)) + 0.3 * level
    truth = slope * np.array(kls) - bend * np.square(kls)
    return kl, truth[:, None] + level + 0.5 * rng.normal(size=(len(kls), n))


def test_the_interval_at_equal_kl_covers_the_truth_as_often_as_it_says():
    """On straight curves. 300 worlds: a coverage of 95 % is seen between 91 and 98 % all but once in 1,000 times; the
    percentile bootstrap of 40 prompts may fall 1 or 2 points short. The seed is fixed."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(300):
        kl, reward = made_up_curve(rng, 40, [2.0, 0.0, 1.5, 4.0])
        reward[0] += 0.2  # what the run is truly better by
        result = equal_kl(kl[0], reward[0], kl[1:], reward[1:], draws=300)
        hits += result.interval[0] <= 0.2 <= result.interval[1]
    assert 0.89 <= hits / 300 <= 0.985


def test_a_sparse_line_below_a_curve_flatters_what_is_compared_with_it_and_both_directions_show_it():
    """Two runs of one and the same bent curve: truly no difference, yet each looks better than the other's line."""
    rng = np.random.default_rng(0)
    kl, reward = made_up_curve(rng, 4000, [0.0, 2.0, 3.0, 4.0], slope=1.0, bend=0.1)
    forth = equal_kl(kl[1], reward[1], kl[[0, 2]], reward[[0, 2]])
    back = equal_kl(kl[2], reward[2], kl[[0, 1, 3]], reward[[0, 1, 3]])
    assert forth.difference > 0.1 and back.difference > 0.05
    assert forth.between == (pytest.approx(0.0, abs=0.05), pytest.approx(3.0, abs=0.05))


def test_beyond_the_measured_points_nothing_is_claimed_and_near_their_end_it_is_said():
    rng = np.random.default_rng(0)
    kl, reward = made_up_curve(rng, 50, [5.0, 0.0, 4.0])
    beyond = equal_kl(kl[0], reward[0], kl[1:], reward[1:])
    assert math.isnan(beyond.difference) and all(map(math.isnan, (*beyond.interval, *beyond.between)))
    kl[0] = kl[2] + 0.2 * rng.normal(size=50)
    kl[0] -= kl[0].mean() - kl[2].mean() + 0.01
    near = equal_kl(kl[0], reward[0], kl[1:], reward[1:])
    assert 0.2 < near.beyond < 0.5 and near.interval[0] < near.difference < near.interval[1]


def test_wins_ties_and_losses_count_prompts():
    d = paired_difference({0: 1.0, 1: 2.0, 2: 0.0, 3: 5.0}, {0: 0.0, 1: 2.0, 2: 3.0, 3: 4.0})
    assert (d.wins, d.ties, d.losses, d.prompts) == (2, 1, 1, 4)


def test_looks_have_a_colour_per_family_and_a_marker_per_series():
    looks = looks_of({"mavis": ["mavis, beta 1", "mavis, beta 4"], "table": ["table, beta 4"]})
    assert len({look.marker for look in looks.values()}) == 3
    assert looks["mavis, beta 1"].color == looks["mavis, beta 4"].color != looks["table, beta 4"].color
    assert looks["mavis, beta 4"].fade == 0 < looks["mavis, beta 1"].fade  # the last of a family has its full colour
    for theme in THEMES.values():
        assert len({look.on(theme) for look in looks.values()}) == 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plots_are_png_files_and_take_points_without_intervals(tmp_path, theme):
    series = {
        "a": [PlotPoint(0, 1, (-1, 1), (0, 2), "1/0"), PlotPoint(1, 0, text="0/1")],
        "b": [PlotPoint(0, 0)],
    }
    looks = {"a": Look("#0072B2", "o"), "b": Look("#D55E00", "s")}
    options = {"title": "t", "looks": looks, "theme": theme}
    plot_front(tmp_path / "f.png", series, PlotPoint(0.5, 0.5), labels=("help", "harm"), **options)
    many = {f"{n}": (series, None) for n in range(8)}  # more columns than stand beside each other
    panels = {"help": {"1/0": (series, PlotPoint(0, 0))}, "harm": {"1/0": (series, None), "0/1": ({}, None), **many}}
    plot_curves(tmp_path / "c.png", panels, x_label="KL", **options)
    for name in ("f.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
