"""The script for machines with a graphics card runs on a CPU, and keeps what it has measured."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device.py"
SMALL = ["--device", "cpu", "--names", "resnet18", "--size", "32", "--batches", "2", "--rounds", "1", "--steps", "1"]


def run(out, *more):
    return subprocess.run([sys.executable, SCRIPT, *SMALL, "--out", out, *more], capture_output=True, text=True)


@pytest.mark.large
def test_every_part_is_measured(tmp_path):
    assert run(tmp_path / "device.csv").returncode == 0
    with open(tmp_path / "device.csv", newline="") as file:
        header, machine, *rows = csv.reader(file)
    assert machine[0] == "machine"
    assert {row[0] for row in rows} == {"relevance", "paths", "training"}
    plain = next(row for row in rows if row[header.index("case")] == "plain")
    assert float(plain[header.index("ms")]) > 0
    assert plain[header.index("of plain")] == "1.00"
    assert not any("does not run" in cell for row in rows for cell in row)


def test_what_the_minutes_do_not_suffice_for_is_called_not_run(tmp_path):
    assert run(tmp_path / "device.csv", "--minutes", "0").returncode == 0
    assert "not run,3 of 3 parts" in (tmp_path / "device.csv").read_text()
