"""The wheel, installed somewhere else, has its Lua, SQL, migrations, page and union codes."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from service import ROOT

DATA = {".lua", ".sql", ".html", ".css", ".js", ".svg", ".toml"}
LEFT_OUT = ("loadtest/bench/", "loadtest/peers/")
LOOK = """
import sys
from pathlib import Path

import sale
from importlib.resources import files

from sale.api.pages import Pages
from sale.db import migrate, queries
from sale.domain.unions import default_unions_path, load_unions
from sale.host.embedded import launch
from sale.stock import scripts

home = Path(sys.argv[1])
assert Path(sale.__file__).is_relative_to(home), sale.__file__
assert "redis.call" in scripts.PURCHASE.source
Pages(b"{}")
migrations = [each.name for each in files("sale.db").joinpath("migrations").iterdir()]
assert any(name.startswith("0001_") for name in migrations), migrations
assert any(files("sale.db").joinpath("sql").iterdir())
place = default_unions_path()
assert place.is_relative_to(home), place
assert len(load_unions(place)) == 18
assert Path(launch.__file__).is_file()
print("found")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", built, ROOT], cwd=built)
    (made,) = built.glob("sale-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("elsewhere") / "packages"
    run([*PIP, "install", "--no-deps", "-q", "--target", home, wheel], cwd=home.parent)
    return home


def run(words: list[object], *, cwd: Path, path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PIP: list[object] = [
    *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"),
]


def test_wheel_contains_every_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    missing = [
        name
        for package in ("sale", "loadtest")
        for file in (ROOT / package).rglob("*")
        if file.suffix in DATA | {".py"}
        and not (name := file.relative_to(ROOT).as_posix()).startswith(LEFT_OUT)
        and name not in inside
    ]
    assert not missing
    assert "sale/unions.toml" in inside
    assert not [name for name in inside if name.startswith(("tests/", "scripts/", *LEFT_OUT))]


def test_installed_wheel_finds_its_files(installed: Path, tmp_path: Path) -> None:
    assert run([sys.executable, "-c", LOOK, installed], cwd=tmp_path, path=installed) == "found\n"


def test_installed_wheel_runs_its_command(installed: Path, tmp_path: Path) -> None:
    sample = run([sys.executable, "-m", "sale", "cards", "sample", 3], cwd=tmp_path, path=installed)
    assert len(sample.splitlines()) == 4
    scripts = (installed / "sale-0.2.0.dist-info" / "entry_points.txt").read_text("utf-8")
    assert "sale = sale.cli.main:main" in scripts


def test_wheel_says_where_the_benchmarks_are(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "bench"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = "loadtest: bench is not installed: run it in the project's folder\n"
    assert (done.returncode, done.stderr) == (2, said)
