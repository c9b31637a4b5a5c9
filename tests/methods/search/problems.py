"""Small problems that the tests of Optuna's samplers share, and how well a sampler does on them."""

import numpy as np

from lilliput.fitting.study import open_study, run_trials

BEST = (1, 8, 3, 9, 0, 6)  # of the separable problem, six knobs of ten values
KNOBS = tuple(f"n{i}" for i in range(len(BEST)))


def values(trial):
    return np.array([trial.suggest_int(name, 0, 9) for name in KNOBS])


def separable(trial):
    """Each knob apart: the sum of squared distances from BEST, 0 at best."""
    return float(np.square(values(trial) - BEST).sum())


def two_sided(trial):
    """Squared distances from 2 and from 7 everywhere: no setting is best in both."""
    x = values(trial)
    return float(np.square(x - 2).sum()), float(np.square(x - 7).sum())


def tempting(trial):
    """The sum, to be made large, with a limit of 18: going where the objective points breaks the limit."""
    total = int(values(trial).sum())
    trial.set_user_attr("violation", max(0, total - 18))
    return -float(total)


def trials_of(sampler, objective, trials, directions=("minimize",)):
    """The finished trials of a search in memory."""
    study = open_study(None, "s", sampler, list(directions))
    assert run_trials(study, objective, trials=trials).failed == 0
    return study.get_trials(deepcopy=False)


def params(trials):
    return [tuple(t.params[name] for name in KNOBS) for t in trials]


def best(sampler, trials):
    """The least distance from BEST that was found."""
    return min(t.values[0] for t in trials_of(sampler, separable, trials))


def covered(sampler, trials, worst=300.0):
    """Share of the square [0, worst]^2 that lies above the front of `two_sided`."""
    points = sorted(t.values for t in trials_of(sampler, two_sided, trials, ("minimize", "minimize")))
    area, height = 0.0, worst
    for x, y in points:
        if x < worst and y < height:
            area, height = area + (worst - x) * (height - y), y
    return area / worst**2


def late_violation(sampler, trials):
    """The mean violation in the last third of a search with a limit."""
    found = trials_of(sampler, tempting, trials)
    return float(np.mean([t.user_attrs["violation"] for t in found[-trials // 3 :]]))
