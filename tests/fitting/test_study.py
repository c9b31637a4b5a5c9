"""Studies survive kills, refuse what they cannot read, and run here or on Ray with the same results."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import optuna
import pytest
from optuna.trial import TrialState

from lilliput.errors import UserError
from lilliput.fitting import _ray
from lilliput.fitting import study as module
from lilliput.fitting.storage import FileStorage
from lilliput.fitting.study import close_study, open_study, run_trials


def sphere(trial):
    x = trial.suggest_float("x", -5, 5)
    trial.set_user_attr("violation", max(0.0, -x))
    return x**2 + trial.suggest_int("n", 0, 8)


def always_wrong(trial):
    raise RuntimeError(f"no such thing as {trial.suggest_int('n', 0, 3)}")


def random_sampler(seed=0):
    return optuna.samplers.RandomSampler(seed=seed)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "study.db"


def states(study):
    return [t.state.name for t in study.get_trials(deepcopy=False)]


def test_a_study_comes_back_as_it_was(path):
    study = open_study(path, "s", random_sampler(), ["minimize"])
    study.set_user_attr("note", {"a": 1})
    run_trials(study, sphere, trials=12, durable=False)
    before = study.get_trials()
    close_study(study)
    again = open_study(path, "s", random_sampler(), ["minimize"])
    after = again.get_trials()
    assert again.user_attrs == {"note": {"a": 1}}
    for old, new in zip(before, after, strict=True):
        for name in ("number", "state", "params", "distributions", "values", "user_attrs", "system_attrs"):
            assert getattr(new, name) == getattr(old, name)
        assert new.datetime_complete == old.datetime_complete
    close_study(again)


def test_the_file_is_optunas_own(path):
    study = open_study(path, "s", random_sampler(), ["minimize", "maximize"])
    run_trials(study, lambda t: (t.suggest_categorical("c", ["a", None, 3]) == "a", float("inf")), trials=5)
    theirs = optuna.load_study(study_name="s", storage=f"sqlite:///{path}").get_trials()
    assert [(t.params, t.values) for t in theirs] == [(t.params, t.values) for t in study.get_trials()]
    assert theirs[0].values[1] == float("inf")
    close_study(study)


def test_trials_is_the_total_over_all_runs(path):
    for total in (4, 4, 9):
        study = open_study(path, "s", random_sampler(total), ["minimize"])
        run_trials(study, sphere, trials=total)
        assert len(study.get_trials()) == total
        close_study(study)


def test_two_studies_share_a_file(path):
    for name, count in (("a", 3), ("b", 5)):
        study = open_study(path, name, random_sampler(), ["minimize"])
        run_trials(study, sphere, trials=count)
        close_study(study)
    study = open_study(path, "a", random_sampler(), ["minimize"])
    assert [t.number for t in study.get_trials()] == [0, 1, 2]
    close_study(study)


def in_file(path):
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]


def test_durable_trials_are_on_disk_when_they_are_told(path):
    study, seen = open_study(path, "s", random_sampler(), ["minimize"]), []
    run_trials(study, sphere, trials=4, on_trial=lambda t: seen.append(in_file(path)))
    assert seen == [1, 2, 3, 4]
    close_study(study)


def test_the_others_follow_within_a_second(path):
    study, seen = open_study(path, "s", random_sampler(), ["minimize"]), []

    def slow_third(trial):
        if trial.number == 2:
            time.sleep(2.5)
            seen.append(in_file(path))
        return sphere(trial)

    run_trials(study, slow_third, trials=3, durable=False)
    assert seen == [2]
    close_study(study)


DRIVER = """
    import sys, time
    sys.path.insert(0, {folder!r})
    import optuna
    from lilliput.fitting.study import open_study, run_trials

    def objective(trial):
        x = trial.suggest_int("x", 0, 1000)
        if trial.number == {slow}:
            print("running", flush=True)
            time.sleep(60)
        return x

    study = open_study({path!r}, "s", optuna.samplers.RandomSampler(seed=1), ["minimize"])
    run_trials(study, objective, trials=20, on_trial=lambda t: print(t.number, t.values, flush=True))
    print("ended", flush=True)
"""


def start(tmp_path, path, slow):
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER.format(path=str(path), slow=slow, folder=str(tmp_path))))
    driver = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in driver.stdout:
        lines.append(line.strip())
        if line.startswith("running"):
            return driver, lines
    raise AssertionError(f"the driver ended early: {lines}")


def test_a_kill_loses_no_finished_trial(tmp_path, path):
    driver, lines = start(tmp_path, path, slow=7)
    time.sleep(1.5)  # the running trial's parameters reach the file within a second
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    study = open_study(path, "s", random_sampler(), ["minimize"])
    trials = study.get_trials()
    told = [line for line in lines if line[0].isdigit()]
    assert [f"{t.number} {t.values}" for t in trials if t.state == TrialState.COMPLETE] == told
    assert len(told) == 7
    assert states(study)[7:] == ["FAIL", "WAITING"]
    run_trials(study, lambda t: t.suggest_int("x", 0, 1000), trials=8)
    assert study.get_trials()[8].params == trials[7].params
    assert study.get_trials()[8].user_attrs["retries"] == 1
    close_study(study)


def test_ctrl_c_ends_the_run_and_keeps_all(tmp_path, path):
    driver, _ = start(tmp_path, path, slow=3)
    driver.send_signal(signal.SIGINT)
    rest, _ = driver.communicate(timeout=30)
    assert rest.strip() == "ended"
    assert driver.returncode == 0
    study = open_study(path, "s", random_sampler(), ["minimize"])
    assert states(study) == ["COMPLETE"] * 3 + ["FAIL", "WAITING"]
    close_study(study)


def test_a_trial_that_kills_its_process_is_not_tried_for_ever(path):
    for _ in range(module.RETRIES + 2):
        study = open_study(path, "s", random_sampler(), ["minimize"])
        lost = study.ask({"x": optuna.distributions.IntDistribution(0, 9)})
        close_study(study)
    study = open_study(path, "s", random_sampler(), ["minimize"])
    assert lost.number == module.RETRIES + 1
    assert "WAITING" in states(study)  # the last ask was a new trial, lost for the first time
    params = [t.params["x"] for t in study.get_trials()[: module.RETRIES + 1]]
    assert len(set(params)) == 1
    retries = [t.user_attrs.get("retries", 0) for t in study.get_trials()]
    assert retries == [*range(module.RETRIES + 1), 0, 1]
    close_study(study)


def test_a_shared_database_keeps_the_trials_of_living_processes(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    study = open_study(url, "s", random_sampler(), ["minimize"])
    alive, dead = (study.ask({"x": optuna.distributions.IntDistribution(0, 9)}) for _ in range(2))
    alive.set_user_attr("worker", module._worker())
    dead.set_user_attr("worker", module._worker().replace(str(os.getpid()), "4194304"))
    again = open_study(url, "s", random_sampler(), ["minimize"])
    assert states(again) == ["RUNNING", "FAIL", "WAITING"]
    run_trials(again, lambda t: t.suggest_int("x", 0, 9), trials=2)
    assert states(again) == ["RUNNING", "FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look like one" * 40, None])
def test_a_damaged_file_is_named(path, content):
    study = open_study(path, "s", random_sampler(), ["minimize"])
    run_trials(study, sphere, trials=60, durable=False)
    close_study(study)
    if content is None:  # a hole in the middle of a good file
        content = bytearray(path.read_bytes())
        content[4096 : len(content) // 2] = b"\xa5" * (len(content) // 2 - 4096)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"study\.db .*move it"):
        open_study(path, "s", random_sampler(), ["minimize"])


def test_a_file_in_use_is_refused(path):
    study = open_study(path, "s", random_sampler(), ["minimize"])
    with pytest.raises(UserError, match="in use"):
        open_study(path, "s", random_sampler(), ["minimize"])
    close_study(study)
    close_study(open_study(path, "s", random_sampler(), ["minimize"]))


def test_other_directions_and_other_knobs_are_refused(path):
    study = open_study(path, "s", random_sampler(), ["minimize"])
    run_trials(study, sphere, trials=2)
    with pytest.raises(UserError, match=r"n was Int.*high=8.*high=9"):
        run_trials(study, lambda t: t.suggest_int("n", 0, 9), trials=3)
    close_study(study)
    with pytest.raises(UserError, match="directions minimize, not maximize"):
        open_study(path, "s", random_sampler(), ["maximize"])


@pytest.mark.parametrize("url", ["nosuch://host/db", "sqlite:////no/such/folder/x.db", "mysql://me:secret@nowhere/x"])
def test_a_bad_url_is_named_without_its_password(url):
    with pytest.raises(UserError) as caught:
        open_study(url, "s")
    assert url.split(":")[0] in str(caught.value)
    assert "secret" not in str(caught.value)


def test_failures_are_recorded_and_many_in_a_row_end_the_search():
    study = open_study(None, "s", random_sampler())
    answers = iter([1.0, float("nan"), (1.0, 2.0), "x", None, 2.0])
    ran = run_trials(study, lambda t: next(answers), trials=2)
    assert (ran.complete, ran.failed) == (2, 4)
    assert "objective returned nan" in study.get_trials()[1].user_attrs["error"]
    with pytest.raises(UserError, match=f"{module.FAILURES} trials in a row failed.*no such thing"):
        run_trials(study, always_wrong, trials=100)


def test_an_end_is_needed_and_workers_need_ray():
    study = open_study(None, "s", random_sampler())
    with pytest.raises(UserError, match="no end"):
        run_trials(study, sphere)
    with pytest.raises(UserError, match="workers is 3"):
        run_trials(study, sphere, trials=1, workers=3)
    assert run_trials(study, sphere, seconds=0.0).complete == 0


def test_notes_that_are_not_json_are_refused_where_they_are_set(path):
    study = open_study(path, "s", random_sampler())
    trial = study.ask()
    with pytest.raises(TypeError):
        trial.set_user_attr("x", {1, 2})
    study.tell(trial, 1.0)
    close_study(study)


def test_a_full_disk_is_reported(path, monkeypatch):
    study = open_study(path, "s", random_sampler())

    def full(self, trials):
        raise module.sqlalchemy.exc.OperationalError("insert", {}, Exception("database or disk is full"))

    monkeypatch.setattr(FileStorage, "_write", full)
    with pytest.raises(UserError, match=r"cannot write .*study\.db.*full"):
        run_trials(study, sphere, trials=1)
    monkeypatch.undo()
    close_study(study)


@pytest.mark.timeout(120)
def test_trials_run_on_ray(path):
    ray = pytest.importorskip("ray")
    _ray._start(ray, "local", 2)  # once for both runs
    study, told = open_study(path, "s", random_sampler(), ["minimize"]), []
    ran = run_trials(study, on_worker, trials=6, ray_address="local", on_trial=lambda t: told.append(t.number))
    trials = study.get_trials()
    assert (ran.complete, sorted(told)) == (6, list(range(6)))
    assert all(t.values == [t.params["x"] ** 2] for t in trials)
    pids = {t.user_attrs["pid"] for t in trials[1:]}
    assert os.getpid() not in pids
    assert trials[0].user_attrs["pid"] == os.getpid()
    assert in_file(path) == 6
    with pytest.raises(UserError, match=r"in a row failed.*no such thing"):
        run_trials(study, always_wrong, trials=99, ray_address="local")
    close_study(study)
    ray.shutdown()


def on_worker(trial):
    trial.set_user_attr("pid", os.getpid())
    return trial.suggest_int("x", -9, 9) ** 2


def test_an_absent_ray_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"lilliput\[ray\]"):
        run_trials(open_study(None, "s", random_sampler()), sphere, trials=3, ray_address="local")
