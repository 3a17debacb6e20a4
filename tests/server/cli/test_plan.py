"""``memplus plan`` as a user calls it."""

from pathlib import Path

import pytest

from benchmarks import disk_meter, limit_meter
from memory_ops.native.library import MEMORY_LIBRARY
from server.cli import main as command
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


def test_several_processes_are_marked_as_computed(capsys, monkeypatch):
    assert main(["plan", MEMORY_8B, "--gpu", "h100", "--tensor-parallel", "8"]) == 0
    out = capsys.readouterr().out
    assert "8 x h100: each 80.00 GiB at 3,000 GB/s" in out and "reads/s" not in out
    assert "16.00 GiB of the table, by columns\n" in out
    assert "exchange  66 in a step of 64 tokens" in out
    assert "450.0 GB/s, 20 µs each (assumed)" in out
    assert "host    refused: table_tier: host cannot be combined with --tensor-parallel" in out
    assert "fastest that fits: device\n" in out
    assert out.endswith("\ncomputed, not measured with several processes, GPUs or machines\n")
    cpu = ["--host-memory", "1TiB", "--gb-per-s", "300", "--tflops", "20", "--threads", "2"]
    given = ["--tensor-parallel", "2", "--link-us", "5", "--table-sharding", "rows"]
    started = []
    monkeypatch.setattr(command, "set_threads", lambda options, ranks: started.append(ranks))
    assert main(["plan", MEMORY_8B, *cpu, *given]) == 0
    # the machine is measured, or given, as a whole
    assert started == [1]
    out = capsys.readouterr().out
    assert "of the table, by rows; they have embedding and head in memory once" in out
    assert "150.0 GB/s, 5 µs each (partly given, partly assumed)" in out


@pytest.mark.skipif(MEMORY_LIBRARY.best_build is None, reason="needs the native library")
def test_the_disk_is_measured_if_a_tier_reads_from_it(memory_plus_folder, capsys, monkeypatch):
    measured = []
    monkeypatch.setattr(limit_meter, "PRODUCT", (16, 32, 64))
    monkeypatch.setattr(disk_meter, "limits_of_tables", measured.append)
    for options in (["--tensor-parallel", "2"], ["--table-dtype", "int8"]):
        assert main(["plan", str(memory_plus_folder), *options]) == 0
        assert "disk    refused: table_" in capsys.readouterr().out and not measured
    assert main(["plan", str(memory_plus_folder)]) == 0
    assert measured == [memory_plus_folder]


def test_replicas_are_planned_together(capsys):
    machine = ["--gpu", "h100", "--host-memory", "256GiB", "--batches", "1", "8"]
    assert main(["plan", MEMORY_8B, *machine, "--replicas", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    one, all_of_them = (line.split() for line in lines if line.startswith("host"))
    header = next(line for line in lines if "at 32" in line)
    assert "at 4 " in header and "GPU memory" in header
    speeds = [float(row[6].replace(",", "")) for row in (one, all_of_them)]
    assert speeds[1] == pytest.approx(4 * speeds[0], rel=0.01)
    assert (one[3], all_of_them[3]) == ("128.00", "512.00")  # GiB of host memory
    assert float(all_of_them[1]) == pytest.approx(4 * float(one[1]), rel=0.01)
    assert lines[-3].endswith("so all KV cache hits of one server remain; by chance, 1 in 4 would")
    assert lines[-1].startswith("computed, not measured")


def test_the_help_is_readable(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "several processes (computed)" in out and len(out.splitlines()) <= 110


def test_a_mistake_is_one_line(capsys):
    assert main(["plan", MEMORY_8B, "--gpu", "h100"]) == 2
    assert "--host-memory: must be given with --gpu" in capsys.readouterr().err
    assert main(["plan", "missing.json"]) == 2
    assert "missing.json" in capsys.readouterr().err
    split = ["--gpu", "h100", "--tensor-parallel", "9"]
    assert main(["plan", MEMORY_8B, *split]) == 2
    assert "--tensor-parallel: 9 exceeds num_key_value_heads 8" in capsys.readouterr().err
