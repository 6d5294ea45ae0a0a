"""Who won: the verdicts on results made up by hand, and on the same with the winners swapped."""

from typing import Any

import pytest

from lightning_sfn.experiments import figure1, figure3, figure4
from lightning_sfn.experiments.figure import Verdict
from lightning_sfn.experiments.figure3_runs import DIVERGED

SEEDS = 4


def outcome(verdicts: list[Verdict], words: str) -> str:
    (found,) = [v for v in verdicts if words in v.claim]
    return found.verdict


def jitter(value: float, seed: int) -> float:
    return value * (1 + 0.01 * seed)


# ------------------------------------------------------------------------------------------------------------ figure 1


def critical_points(order: list[float], *, found: bool = True) -> dict[str, Any]:
    """Points whose index, and whose spectrum's left end, grow in the given order while the error grows."""
    points = [
        {
            "found": found,
            "index": rank / 10,
            "loss": 1 + 0.1 * i,
            "error": 0.1 * i,
            "eigenvalues": [-rank, 1.0, 10.0],
        }
        for i, rank in enumerate(order)
    ]
    spectra = figure1.three_levels(points)
    return {"bound": 1e-6, "points": {"mnist": points}, "spectra": {"mnist": spectra}}


def test_index_and_left_end_that_grow_with_the_error() -> None:
    up = figure1.verdicts(critical_points([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert outcome(up, "grows with their error") == "reproduced"
    assert outcome(up, "shifts to the left") == "reproduced"
    down = figure1.verdicts(critical_points([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))
    assert outcome(down, "grows with their error") == "not reproduced"
    assert outcome(down, "shifts to the left") == "not reproduced"


def test_points_that_were_not_found_say_nothing() -> None:
    none = figure1.verdicts(critical_points([0.0, 1.0, 2.0, 3.0, 4.0], found=False))
    assert outcome(none, "grows with their error") == "not reproduced"
    assert "0 of 5 searches" in none[0].measured


def test_a_share_that_grows_without_the_left_end_is_half_of_it() -> None:
    result = critical_points([0.0, 1.0, 2.0, 3.0, 4.0])
    for point in result["spectra"]["mnist"]:
        point["eigenvalues"] = [-1.0, 10.0]
    assert outcome(figure1.verdicts(result), "shifts to the left") == "reproduced in part"


# ------------------------------------------------------------------------------------------------------------ figure 3


def perceptrons(errors: dict[str, float], ends: dict[str, float], *, small: dict[str, float] | None = None) -> Any:
    """Runs of 5 and of 25 units: the smallest error of each method, and the eigenvalue that it ends at, from -1."""
    runs = {}
    for hidden, reached in ((5, small or dict.fromkeys(errors, 0.3)), (25, errors)):
        for method in errors:
            for seed in range(SEEDS):
                runs[f"{method}-{hidden}-{seed}"] = {
                    "dataset": "mnist",
                    "hidden": hidden,
                    "method": method,
                    "seed": seed,
                    "errors": [0.9, jitter(reached[method], seed), 0.8],
                    "losses": [2.0, 1.0, 1.5],
                    "probe_epochs": [0, 1],
                    "lambda_min": [-1.0, jitter(ends[method], seed)],
                }
    return {"runs": runs}


LOWER = {"sgd": 0.2, "damped_newton": 0.3, "saddle_free": 0.1}
NEARER = {"sgd": -0.1, "damped_newton": -0.2, "saddle_free": -0.001}


def swapped(values: dict[str, float]) -> dict[str, float]:
    return values | {"saddle_free": values["sgd"], "sgd": values["saddle_free"]}


def test_lower_errors_and_eigenvalues_nearer_to_zero() -> None:
    ours = figure3.verdicts(perceptrons(LOWER, NEARER))
    assert outcome(ours, "lower training error than SGD") == "reproduced"
    assert outcome(ours, "lower training error than damped Newton") == "reproduced"
    assert outcome(ours, "moves towards zero") == "reproduced"
    assert outcome(ours, "moves further for SFN") == "reproduced"
    theirs = figure3.verdicts(perceptrons(swapped(LOWER), swapped(NEARER)))
    assert outcome(theirs, "lower training error than SGD") == "not reproduced"
    assert outcome(theirs, "lower training error than damped Newton") == "reproduced"
    assert outcome(theirs, "moves further for SFN") == "not reproduced"


def test_more_epochs_of_sgd_make_it_part_of_a_success_at_best() -> None:
    result = perceptrons(LOWER, NEARER)
    for run in result["runs"].values():
        if run["method"] == "sgd":
            run["errors"] = [*run["errors"], 0.15]
    assert outcome(figure3.verdicts(result), "lower training error than SGD") == "reproduced in part"
    for run in result["runs"].values():
        if run["method"] == "sgd":
            run["errors"][1] = 0.05  # ahead at equal epochs
    assert outcome(figure3.verdicts(result), "lower training error than SGD") == "not reproduced"


def test_an_eigenvalue_that_stays_has_not_moved() -> None:
    stays = figure3.verdicts(perceptrons(LOWER, NEARER | {"damped_newton": -1.0}))
    assert outcome(stays, "moves towards zero") == "not reproduced"


def test_the_smallest_network_is_comparable_where_the_intervals_meet() -> None:
    alike = {"sgd": 0.3, "damped_newton": 0.302, "saddle_free": 0.298}
    assert outcome(figure3.verdicts(perceptrons(LOWER, NEARER, small=alike)), "perform comparably") == "reproduced"
    apart = figure3.verdicts(perceptrons(LOWER, NEARER, small=LOWER))
    assert outcome(apart, "perform comparably") == "not reproduced"


def test_seeds_without_spectra_are_left_out_and_counted() -> None:
    result = perceptrons(LOWER, NEARER)
    result["runs"]["sgd-25-1"].update(lambda_min=[], probe_epochs=[])
    verdicts = figure3.verdicts(result)
    for words in ("moves towards zero", "moves further for SFN"):
        assert outcome(verdicts, words) == "reproduced"
        (measured,) = [v.measured for v in verdicts if words in v.claim]
        assert "positive for 3 of 3 seeds; 1 of 4 left out" in measured
    assert [row["lambda_min_last"] for row in figure3.rows(result)].count(None) == 1
    for seed in range(SEEDS):
        result["runs"][f"sgd-25-{seed}"]["lambda_min"] = []
    assert outcome(figure3.verdicts(result), "moves further for SFN") == "not reproduced"


def test_a_draw_that_diverged_does_not_win_the_search() -> None:
    sound = {"errors": [0.9, 0.5], "losses": [2.0, 1.0]}
    lower = {"errors": [0.9, 0.5], "losses": [2.0, 0.9]}
    gone = {"errors": [0.9, 0.1, 1.0], "losses": [2.0, 0.5, DIVERGED]}
    assert figure3.best_draw([sound, gone, lower]) is lower
    assert figure3.best_draw([gone]) is gone


# ------------------------------------------------------------------------------------------------------------ figure 4


def spectrum(lowest: float, negative_fraction: float = 0.0) -> dict[str, Any]:
    return {"lambda_min": lowest, "residuals": [1e-6], "negative_fraction": negative_fraction}


def two_experiments(ends: dict[str, float], negative: dict[str, float], *, depths: tuple[float, ...] = ()) -> Any:
    """Both networks: every arm goes from a plateau of 2 to its end; `depths` are SGD's three, then SFN's two."""
    depths = depths or (-4.0, -2.0, -1.0, -1.0, -0.01)
    autoencoder, recurrent = [], []
    for seed in range(SEEDS):
        arms: dict[str, Any] = {"start": {"metric": [5.0, 2.0], "spectra": [spectrum(d) for d in depths[:3]]}}
        arms |= {name: {"metric": [2.0, jitter(end, seed)], "spectra": []} for name, end in ends.items()}
        arms["saddle_free"]["spectra"] = [spectrum(jitter(d, seed)) for d in depths[3:]]
        autoencoder.append({"seed": seed, "arms": arms})
        spectra = {name: spectrum(-1.0, jitter(share, seed)) for name, share in negative.items()}
        recurrent.append({"seed": seed, "arms": arms, "spectra": spectra})
    return {"autoencoder": autoencoder, "recurrent": {"runs": recurrent}}


ENDS = {"sgd": 1.5, "saddle_free": 1.0, "truncated_newton": 1.2}
SHARES = {"start": 0.05, "sgd": 0.3, "saddle_free": 0.1, "truncated_newton": 0.1}
CLAIMS = (
    "autoencoder: SFN goes lower than SGD going on",
    "recurrent network: SFN goes lower than SGD going on",
    "truncated Newton helps less than SFN",
    "fewer negative eigenvalues",
)


def test_sfn_below_the_plateau_and_below_the_others() -> None:
    found = figure4.verdicts(two_experiments(ENDS, SHARES))
    assert all(verdict.verdict == "reproduced" for verdict in found)
    assert len(found) == 8


@pytest.mark.parametrize("claim", CLAIMS)
def test_sfn_behind_the_others(claim: str) -> None:
    ends = {"sgd": 1.0, "saddle_free": 1.5, "truncated_newton": 1.2}
    shares = SHARES | {"sgd": 0.1, "saddle_free": 0.3}
    assert outcome(figure4.verdicts(two_experiments(ends, shares)), claim) == "not reproduced"


@pytest.mark.parametrize("network", ["autoencoder", "recurrent network"])
def test_sfn_that_stays_on_the_plateau(network: str) -> None:
    found = figure4.verdicts(two_experiments(ENDS | {"saddle_free": 2.1}, SHARES))
    assert outcome(found, f"{network}: SGD followed by SFN drops below") == "not reproduced"


def test_an_eigenvalue_that_moves_away_from_zero() -> None:
    found = figure4.verdicts(two_experiments(ENDS, SHARES, depths=(-1.0, -2.0, -4.0, -0.01, -1.0)))
    assert outcome(found, "as SGD's error falls") == "not reproduced"
    assert outcome(found, "SFN accelerates this shift") == "not reproduced"
