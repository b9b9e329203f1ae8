"""Pathways: its package runs where JAX_PLATFORMS asks for it, before any device is used."""

import os
import subprocess
import sys

import pytest

# Stands in for the package: notes that it ran, and whether it was in time.
FAKE = """
import jax
from jax._src import xla_bridge

def initialize():
    print("initialize", xla_bridge.backends_are_initialized())
    jax.config.update("jax_platforms", "cpu")
"""
# The engine's first moment, with a core that only uses a device.
START = """
import jax
from jaxserve.config import EngineConfig
from jaxserve.engine import client, core

class Core:
    def __init__(self, config, report, leader):
        print("core", jax.devices()[0].platform)
        raise SystemExit

core.EngineCore = Core
try:
    client.EngineThread(EngineConfig(), print)
except SystemExit:
    pass
except Exception as error:
    print(type(error).__name__, error)
"""


def start(platforms, *folders):
    """Returns what the engine prints when it starts."""
    path = os.pathsep.join([os.getcwd(), *map(str, folders)])
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, "JAX_PLATFORMS": platforms, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "pathwaysutils.py").write_text(FAKE)
    return tmp_path


@pytest.mark.parametrize("platforms", ["proxy", "proxy,cpu"])
def test_pathways_is_initialized_before_a_device_is_used(fake, platforms):
    assert start(platforms, fake) == ["initialize False", "core cpu"]


def test_pathways_is_left_alone_where_nobody_asks(fake):
    assert start("cpu", fake) == ["core cpu"]


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "pathwaysutils.py").write_text("raise ImportError('not here')")
    (line,) = start("proxy", tmp_path)
    assert line.startswith("ConfigError JAX_PLATFORMS is 'proxy', but pathwaysutils cannot be")
    assert "(not here); install jaxserve[pathways]" in line
