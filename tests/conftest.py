"""Runs before any test imports jax: the CPU as eight devices, strict dtypes and ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import signal  # noqa: E402

import pytest  # noqa: E402

# A shell's background job ignores Ctrl-C, and so would every process started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


def fail_if_skipped(report):
    """Turns a skip into a failure where CI asks for it: nothing may go untested unnoticed."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items):
    """Runs the compilers of absent devices first: the longest files, each on one process."""
    items.sort(key=lambda item: "targets" not in item.path.parts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped((yield))
