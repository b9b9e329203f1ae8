"""The store of compiled programs where several processes share its directory."""

import os

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine import executables
from jaxserve.engine.executables import ExecutableStore


@pytest.fixture
def store(tmp_path):
    return ExecutableStore(tmp_path, jax.devices()[:1], "a model")


def compiled():
    return jax.jit(jnp.sin).lower(jnp.zeros(2)).compile()


def test_a_program_is_found_again_by_its_name_alone(store):
    store.save(compiled(), "step", 2)
    assert store.load("step", 4) is None
    assert store.load("step", 2)(jnp.zeros(2)).tolist() == [0.0, 0.0]


def test_what_was_not_used_for_a_month_is_deleted(store, tmp_path):
    for name, age_s in (("old", executables._KEPT_S + 60), ("new", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, executables.time.time() - age_s))
    store.prune()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_file_that_another_process_has_deleted_is_no_error(store, tmp_path, monkeypatch):
    monkeypatch.setattr(executables.Path, "iterdir", lambda folder: [folder / "gone"])
    store.prune()


def test_two_processes_of_one_number_may_write_one_program_at_once(store, tmp_path, monkeypatch):
    replace, program = executables.Path.replace, compiled()

    def write_again_before(path, target):
        monkeypatch.setattr(executables.Path, "replace", replace)
        store.save(program, "step")
        return replace(path, target)

    monkeypatch.setattr(executables.Path, "replace", write_again_before)
    store.save(program, "step")
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"]
    assert store.load("step") is not None
