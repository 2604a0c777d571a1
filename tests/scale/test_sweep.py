"""Sweeps: the same result however it is come by; what dies, stops or fails is done again, and nothing twice."""

import os
import shutil
import subprocess
import sys

import cloudpickle
import pandas as pd
import pytest
import torch

from zsu import ZsuError, sweep
from zsu.cli import main
from zsu.evaluation import BASIC
from zsu.scale import pools

OPTIONS = {"methods": ["mask"], "measures": BASIC, "samples": 6, "epochs": 3, "references": 2, "progress": False}
TASKS = ["Trouser", "Bag"]


def run(folder, idx, classes=("Trouser", "Bag"), **options):
    options = {"jobs": 1, "seeds": [0]} | OPTIONS | options
    return sweep.run(folder, "fashion-mnist", str(idx), classes, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Here and in every process: sums over more threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(idx, tmp_path_factory):
    """Two classes, one after the other in this process."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(folder, idx)


def same(one, other):
    timed = ["seconds", "threads"]
    pd.testing.assert_frame_equal(one.drop(columns=timed), other.drop(columns=timed), check_exact=False, rtol=1e-4)


def test_rows_of_every_task(made):
    folder, table = made
    assert table["method"].tolist() == ["original", "retrain", "mask", "bias-shift", "random", "zeroed"] * 2
    assert table["class_name"].tolist() == ["Trouser"] * 6 + ["Bag"] * 6
    assert sorted(p.name for p in folder.glob("tasks/*.csv")) == ["1-0.csv", "8-0.csv"]
    assert len(list(folder.glob("*/*.safetensors"))) == 5
    assert not list(folder.glob("tasks/*.error"))


def test_many_processes_find_the_same(made, idx, tmp_path):
    same(run(tmp_path, idx, jobs=2), made[1])


def script(folder, idx, extra=""):
    """A process that sweeps, after `extra`."""
    code = "from zsu import sweep\n" + extra
    code += f"\nsweep.run({str(folder)!r}, 'fashion-mnist', {str(idx)!r}, ['Trouser', 'Bag'], [0], jobs=1, **{OPTIONS})"
    return [sys.executable, "-c", code]


DIES = """
import os
audit_methods = sweep.audit_methods
def dying(task, settings):
    if task.target == 8:
        os.kill(os.getpid(), 9)
    return audit_methods(task, settings)
sweep.audit_methods = dying
"""


def test_kill_9_loses_the_running_task_only(made, idx, tmp_path):
    done = subprocess.run(script(tmp_path, idx, DIES), capture_output=True)
    assert done.returncode == -9
    kept = {p: p.stat().st_mtime_ns for p in (*tmp_path.glob("tasks/*.csv"), *tmp_path.glob("*/*.safetensors"))}
    assert len(kept) == 6  # five models and one audit
    same(run(tmp_path, idx), made[1])
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())


COUNTS = """
import functools, os
def counted(work):
    @functools.wraps(work)
    def wrapper(task, settings):
        print("did", *task, flush=True)
        return work(task, settings)
    return wrapper
sweep.train_model, sweep.audit_methods = counted(sweep.train_model), counted(sweep.audit_methods)
"""


def test_two_processes_on_one_folder_do_nothing_twice(made, idx, tmp_path):
    both = [subprocess.Popen(script(tmp_path, idx, COUNTS), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [line for process in both for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in both] == [0, 0]
    assert len(lines) == len(set(lines)) == 7  # five models, two audits
    same(run(tmp_path, idx), made[1])


def test_a_task_that_fails_does_not_stop_the_others_and_is_done_again(made, idx, tmp_path, monkeypatch):
    audit_methods = sweep.audit_methods

    def failing(task, settings):
        if task.target == 1:
            raise RuntimeError("out of luck")
        return audit_methods(task, settings)

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "audit_methods", failing)
        with pytest.raises(ZsuError, match=r"1 of 7 tasks failed; audit 1-0: RuntimeError: out of luck.*run it again"):
            run(tmp_path, idx)
    assert [p.name for p in tmp_path.glob("tasks/*.csv")] == ["8-0.csv"]
    assert (tmp_path / "tasks" / "audit-1-0.error").read_text() == "RuntimeError: out of luck"
    same(run(tmp_path, idx), made[1])
    assert not list(tmp_path.glob("tasks/*.error"))


def test_a_process_that_is_killed_costs_its_task_a_second_try(tmp_path):
    def do(task):
        if task == 0 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), 9)
        return task, None

    assert sorted(pools.in_processes(do, list(range(8)), 2)) == [(task, None) for task in range(8)]
    assert (tmp_path / "killed").exists()


def test_a_task_that_always_kills_its_process_is_named_and_the_others_are_done():
    def do(task):
        if task == 3:
            os.kill(os.getpid(), 9)
        return task, None

    found = dict(pools.in_processes(do, list(range(8)), 2))
    assert found == dict.fromkeys(range(8)) | {3: pools.KILLED}


def test_killed_tasks_are_one_error_that_asks_for_fewer_jobs(idx, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "in_processes", lambda do, tasks, jobs: ((task, pools.KILLED) for task in tasks))
    message = r"4 of 4 tasks failed; train None-0: its process was killed.*; train 8-0: .*; train 8-1: .*fewer jobs"
    with pytest.raises(ZsuError, match=message):
        run(tmp_path, idx, ["Bag"], jobs=2)


@pytest.mark.large
def test_a_cluster_of_which_one_worker_is_killed(made, idx, tmp_path):
    """Two workers in processes of their own; the first one to begin a task kills itself, once."""
    distributed = pytest.importorskip("distributed")
    marker = tmp_path / "killed"

    class Killer(distributed.WorkerPlugin):
        def transition(self, key, start, finish, **kwargs):
            if finish == "executing":
                try:
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    return
                os.kill(os.getpid(), 9)

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(**options) as cluster:
        with distributed.Client(cluster) as client:
            client.register_plugin(Killer())
        found = run(tmp_path / "out", idx, scheduler=cluster.scheduler_address)
    assert marker.exists()
    same(found, made[1])


def test_no_scheduler_is_one_clear_error(idx, tmp_path):
    with pytest.raises(ZsuError, match="no Dask scheduler at 'tcp://127.0.0.1:9'"):
        run(tmp_path, idx, scheduler="tcp://127.0.0.1:9")


def test_all_measures_of_several_originals(idx, tmp_path):
    """With U-LiRA each task makes the edits of every seed's original."""
    options = {"classes": ["Bag"], "measures": [*BASIC, "u-lira", "klom"], "references": 3, "methods": ["bias-shift"]}
    table = run(tmp_path, idx, seeds=range(3), controls=False, **options)
    edits = table[table["method"] == "bias-shift"]
    assert len(edits) == 3
    assert edits[["ulira", "klom"]].notna().all(axis=None)
    with pytest.raises(ZsuError, match=r"seeds was \[0, 1, 2\], is \[0, 1\]"):  # its numbers look at every seed
        run(tmp_path, idx, seeds=range(2), controls=False, **options)


def test_bad_input_is_refused(idx, tmp_path):
    with pytest.raises(ZsuError, match="unknown measures"):
        run(tmp_path, idx, measures=["charm"])
    with pytest.raises(ZsuError, match="1 references"):
        run(tmp_path, idx, references=1)
    with pytest.raises(ZsuError, match="seed -1"):
        run(tmp_path, idx, seeds=[-1])
    for bad in ({"seeds": []}, {"classes": []}, {"jobs": 0}, {"measures": []}, {"methods": "all"}):
        with pytest.raises(ZsuError, match=next(iter(bad))):
            run(tmp_path, idx, **bad)
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(ZsuError, match="no JSON object"):
        run(tmp_path, idx)


def test_other_controls_are_other_results(made, idx):
    with pytest.raises(ZsuError, match="controls was True, is False"):
        run(made[0], idx, controls=False)


def test_damaged_files_are_called_so(made, idx, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    file = folder / "tasks" / "1-0.csv"
    text = file.read_text()
    for damaged in (text[: len(text) // 2], text.replace("method", "m", 1)):
        file.write_text(damaged)
        with pytest.raises(ZsuError, match=r"the table is damaged: rows without .*move it away"):
            run(folder, idx)


def call(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["zsu", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code, *capsys.readouterr()


def test_the_command_plans_sweeps_and_resumes(idx, tmp_path, capsys, monkeypatch):
    command = ["sweep", "--out", tmp_path / "out", "--data", "fashion-mnist", "--root", idx, "--class", "Trouser"]
    command += ["--seeds", 1, "--references", 2, "--epochs", 6, "--method", "mask", "--samples", 6, "--jobs", 1]
    command += ["--measure", "accuracy", "--measure", "divergence"]
    code, out, _ = call(capsys, monkeypatch, *command, "--dry-run")
    assert code == 0
    assert "3 models to train, 1 audits of 1 methods" in out
    assert not (tmp_path / "out").exists()
    code, out, err = call(capsys, monkeypatch, *command)
    assert not code, err
    assert (code, out) == (0, f"6 rows written to {tmp_path / 'out' / 'sweep.csv'}\n")
    assert "sweep" in err
    file = tmp_path / "out" / "tasks" / "1-0.csv"
    before = file.stat().st_mtime_ns
    code, out, _ = call(capsys, monkeypatch, *command, "--dry-run")
    assert out.startswith("nothing to do")
    assert call(capsys, monkeypatch, *command)[0] == 0
    assert file.stat().st_mtime_ns == before
