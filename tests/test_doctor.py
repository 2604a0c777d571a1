"""zsu doctor: on this machine, and on broken ones."""

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from zsu import ZsuError, cli, doctor, models


def test_this_machine_is_ready_and_each_part_is_looked_at():
    findings = {finding.what: finding for finding in doctor.check()}
    assert list(findings) == ["python", "packages", "memory", "disk", "course", "notebooks"]
    assert all(findings[what].ok for what in ("python", "packages", "course"))
    assert "trousers recognised 97% before, 0% after" in findings["course"].found


def test_a_missing_and_an_old_package(monkeypatch):
    version = importlib.metadata.version
    there = {"numba": "0.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: there.get(name) or version(name))
    finding = doctor.packages()
    assert not finding.ok
    assert "numba>=0.60" in finding.found
    assert finding.remedy == 'pip install "numba>=0.60"'
    assert str(finding).startswith("FIX  packages: missing or too old: numba>=0.60\n       -> pip install")
    assert not doctor.is_installed(Requirement("a-package-that-is-not-there"))


def test_a_damaged_model_is_found(monkeypatch):
    bundled = models.bundled

    def damaged(kind="original", seed=0):
        if (kind, seed) == ("retrained", 3):
            raise ZsuError("damaged", where="retrained-trouser-3.safetensors")
        return bundled(kind, seed)

    monkeypatch.setattr(models, "bundled", damaged)
    finding = doctor.examine(doctor.course)
    assert not finding.ok
    assert "retrained-trouser-3" in finding.found
    assert "install the package anew" in finding.remedy


def test_a_wrong_model_is_not_called_slow(monkeypatch):
    model = models.bundled()
    model.head.bias.data[1] -= 11
    monkeypatch.setattr(models, "bundled", lambda *_: model)
    finding = doctor.course()
    assert not finding.ok
    assert "install zsu anew" in finding.remedy


def test_what_raises_is_a_finding_with_a_remedy():
    def broken():
        raise RuntimeError("no such library")

    finding = doctor.examine(broken)
    assert finding.what == "broken"
    assert not finding.ok
    assert finding.found == "RuntimeError: no such library"
    assert "install the package anew" in finding.remedy


def test_no_program_for_notebooks(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert not doctor.notebooks().ok
    assert not doctor.is_there("a.package.that.is.not.there")


@pytest.mark.parametrize(("ok", "code", "last"), [(True, 0, "Ready for the course."), (False, 1, "1 to mend")])
def test_the_command_ends_in_its_verdict(ok, code, last, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check", lambda: [doctor.Finding("disk", ok, "2 GB", "make room")])
    monkeypatch.setattr("sys.argv", ["zsu", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    printed = capsys.readouterr().out
    assert last in printed.splitlines()[-1]
    assert ("-> make room" in printed) is not ok
