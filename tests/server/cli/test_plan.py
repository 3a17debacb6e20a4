"""``memplus plan`` as a user calls it."""

from pathlib import Path

import pytest

from benchmarks import limit_meter
from memory_ops.native.library import MEMORY_LIBRARY
from server.cli.main import main

MEMORY_8B = str(Path(__file__).parents[3] / "docs" / "plans" / "memory-8b.json")


def test_a_machine_that_is_not_there(capsys):
    assert main(["plan", MEMORY_8B, "--gpu", "h100", "--host-memory", "256GiB"]) == 0
    out = capsys.readouterr().out
    assert "7,803,824,128 dense parameters" in out and "16,777,216 rows x 4,096" in out
    assert [line.split()[0] for line in out.splitlines()[-5:-2]] == ["device", "host", "disk"]
    assert out.endswith("fastest that fits: host\n")
    main(["plan", MEMORY_8B, "--gpu", "l4", "--host-memory", "16GiB", "--cache-share", "1"])
    assert capsys.readouterr().out.endswith("nothing fits\n")
    main(["plan", MEMORY_8B, "--host-memory", "1TiB", "--gb-per-s", "300", "--tflops", "20"])
    out = capsys.readouterr().out
    assert "1.00 TiB of host memory at 300.0 GB/s, 20.00 TFLOP/s with " in out
    assert [line.split()[0] for line in out.splitlines()[-4:-2]] == ["device", "disk"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], "disk 100,000 reads/s, 100 µs (assumed)"),
        (["--disk-reads", "5000"], "disk 5,000 reads/s, 100 µs (partly given, partly assumed)"),
        (["--disk-reads", "5000", "--disk-latency-us", "70"], "disk 5,000 reads/s, 70 µs (given)"),
    ],
)
def test_the_plan_says_where_the_limits_of_the_disk_are_from(capsys, given, shown):
    machine = ["--host-memory", "1TiB", "--gb-per-s", "300", "--tflops", "20"]
    assert main(["plan", MEMORY_8B, *machine, *given]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.skipif(MEMORY_LIBRARY.best_build is None, reason="needs the native library")
def test_this_machine(memory_plus_folder, capsys, monkeypatch):
    monkeypatch.setattr(limit_meter, "PRODUCT", (16, 32, 64))
    arguments = ["plan", str(memory_plus_folder)]
    assert main([*arguments, "--batches", "1", "4"]) == 0
    out = capsys.readouterr().out
    assert "this machine" in out and "at 4" in out and "fastest that fits: device" in out


def test_a_mistake_is_one_line(capsys):
    assert main(["plan", MEMORY_8B, "--gpu", "h100"]) == 2
    assert "--host-memory: must be given with --gpu" in capsys.readouterr().err
    assert main(["plan", "missing.json"]) == 2
    assert "missing.json" in capsys.readouterr().err
