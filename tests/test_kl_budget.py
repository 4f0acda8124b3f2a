"""The search of a beta for a KL budget, on curves whose answer is known."""

import fcntl
import math

import pytest

from utils.errors import DataError
from utils.kl_budget import HALVINGS, Measured, Measurements, search_beta


def curve(kl, error=0.01):
    return lambda beta: Measured(beta, kl(beta), error)


def test_the_betas_are_doubled_until_the_budget_is_passed_and_then_halved():
    search = search_beta(curve(lambda b: 0.5 + b), 6.3, halvings=20)
    assert [m.beta for m in search.tried] == [0, 1, 2, 4, 8, 6, 5, 5.5, 5.75, 5.875, 5.8125, 5.78125, 5.796875]
    assert search.found == search.tried[-1] and search.met and abs(search.found.kl - 6.3) <= 0.01


@pytest.mark.parametrize(
    "kl", [lambda b: 0.2 + b**2, lambda b: 0.2 + 9 * (1 - math.exp(-b / 5)), lambda b: 0.2 + b**0.5]
)
@pytest.mark.parametrize("budget", [0.3, 1.0, 2.5])
def test_it_stops_within_the_standard_error_and_not_before(kl, budget):
    search = search_beta(curve(kl, 0.02), budget)
    assert search.met and abs(search.found.kl - budget) <= 0.02
    assert all(abs(m.kl - budget) > 0.02 for m in search.tried[:-1])


def test_without_an_error_it_stops_after_the_halvings_with_the_nearest():
    search = search_beta(curve(lambda b: b**1.1, math.nan), 3.3)
    assert not search.met and len(search.tried) == 4 + HALVINGS  # 0, 1, 2, 4 and the halvings
    assert search.found.beta == pytest.approx(3.3 ** (1 / 1.1), abs=2 / 2**HALVINGS)
    record = search.record()
    assert (record["budget"], record["met"], record["tried"], record["trials"]) == (3.3, False, 4 + HALVINGS, 1)


def test_a_jump_over_the_budget_ends_at_its_nearer_side():
    search = search_beta(curve(lambda b: 1.0 if b < 3 else 2.5), 2.0)
    assert not search.met and search.found.kl == 2.5 and search.found.beta == pytest.approx(3, abs=0.01)


def test_a_budget_below_beta_0_or_above_the_largest_beta_is_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"0.7 is below the KL of beta 0, 0.9000 nats \(s.e. 0.0100\)"):
        search_beta(curve(lambda b: 0.9 + b), 0.7)
    with pytest.raises(DataError, match=r"not reached: beta 64, the largest .* 4.0000 nats .*; the most was 5.0000"):
        search_beta(curve(lambda b: 5.0 if b == 8 else min(b, 4)), 7)
    assert search_beta(curve(lambda b: 0.9 + b), 0.895).found.beta == 0  # as near as can be told
    assert search_beta(curve(lambda b: b, 0), 64.0).found.beta == 64
    with pytest.raises(DataError, match="beta 3, the largest"):
        search_beta(curve(lambda b: b), 3.5, largest=3.0)


def test_the_table_and_the_file_give_the_same_bits_back(tmp_path):
    search = search_beta(curve(lambda b: 0.1 + math.sqrt(b), 1 / 3), 2.0)
    for measured in search.tried:  # one opening each, as after a kill
        with Measurements(tmp_path / "x" / "kl.csv") as kept:
            kept.add(measured)
    assert (tmp_path / "x" / "kl.csv").read_text() == search.table()
    with Measurements(tmp_path / "x" / "kl.csv") as kept:
        assert tuple(kept.known.values()) == search.tried
    with Measurements(tmp_path / "x" / "none.csv"):
        pass
    assert not (tmp_path / "x" / "none.csv").exists()


@pytest.mark.parametrize("row", [b"0.0,1.0", b"0.0,x,1.0", b"0.0,\xff,1.0"])
def test_a_damaged_file_of_measurements_is_named(tmp_path, row):
    (tmp_path / "kl.csv").write_bytes(b"beta,kl,error\n" + row + b"\n")
    with pytest.raises(DataError, match="line 2 is not beta,kl,error"), Measurements(tmp_path / "kl.csv"):
        pass


def test_two_processes_do_not_measure_at_once(tmp_path):
    with Measurements(tmp_path / "kl.csv"):
        with pytest.raises(DataError, match="another process"), Measurements(tmp_path / "kl.csv"):
            pass
        assert (tmp_path / "kl.csv").exists(), "the one that was refused took nothing from the other"


def test_what_is_measured_while_another_process_removes_its_empty_file_is_kept(tmp_path, monkeypatch):
    """One that measured nothing removes the file as it ends, maybe between this one's opening and its lock."""
    flock, file = fcntl.flock, tmp_path / "kl.csv"

    def removed_before(stream, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        file.unlink()
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with Measurements(file) as kept:
        kept.add(Measured(0.0, 1.0, 0.5))
    assert file.read_text() == "beta,kl,error\n0.0,1.0,0.5\n"
