"""The command line: flags, files and environment become configs; mistakes become one line."""

import os
import subprocess
import sys
import time

import pytest

import jaxserve
from jaxserve.cli import run
from jaxserve.config import EngineConfig, ServerConfig, options_of
from jaxserve.errors import ConfigError
from jaxserve.options import PlanOptions


@pytest.fixture
def served(monkeypatch):
    """Returns a function that runs `jaxserve serve` and returns the configs it would start with."""
    calls = []

    def fake_run(engine_config, server_config, *, environ):
        assert environ is os.environ  # which tells whether there is a cluster
        calls.append((engine_config, server_config))
        return 0

    monkeypatch.setattr("jaxserve.server.main.run", fake_run)
    monkeypatch.delenv("JAXSERVE_API_KEY", raising=False)

    def serve(*argv):
        assert run(["serve", *argv]) == 0
        return calls.pop()

    return serve


def mistake(capsys, *argv):
    """Returns the one line that a wrong call prints; checks that the exit status is 2."""
    with pytest.raises(SystemExit) as stopped:
        run(argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_serve_without_options_serves_the_demo(served):
    assert served() == (EngineConfig(), ServerConfig())


def test_flags_become_options(served):
    engine, server = served("folder", "--max-model-len", "4K", "--port=0", "--api-key", "a")
    assert engine == EngineConfig(model="folder", max_model_len=4096)
    assert server == ServerConfig(port=0, api_key=("a",))


def test_a_plan_tells_the_compilers_what_they_must_know(monkeypatch):
    calls = []

    def fake_run(engine_config, options):
        calls.append((engine_config, options, dict(os.environ)))
        return 1

    monkeypatch.setattr("jaxserve.planning.report.run_plan", fake_run)
    monkeypatch.setattr(os, "environ", {**os.environ, "TPU_ACCELERATOR_TYPE": "v6e-8"})
    assert run(["plan", "folder", "--device=h100", "--mesh=2x4"]) == 1
    [(engine_config, options, environment)] = calls
    assert engine_config == EngineConfig(model="folder", mesh="2x4")
    assert options == PlanOptions(device="h100")
    # Beside a server that has the TPU, and beside another plan; what the user set stays.
    assert environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert environment["TPU_ACCELERATOR_TYPE"] == "v6e-8"


def test_underscores_and_dashes_are_the_same(served):
    assert served("--max_model_len", "9")[0].max_model_len == 9
    assert served("--served-model-name=a_b")[1].served_model_name == ("a_b",)


def test_switches_have_a_no_form(served):
    assert served("--no-enable-prefix-caching")[0].enable_prefix_caching is False
    assert served("--enable-prompt-tokens-details")[1].enable_prompt_tokens_details is True


def test_list_flags_are_repeated(served):
    assert served("--api-key", "a", "--api-key", "b")[1].api_key == ("a", "b")


def test_vllms_names_work(served):
    assert served("--block-size", "32", "--model", "x")[0] == EngineConfig(model="x", page_size=32)


def test_every_option_has_a_flag(served):
    for item in options_of(EngineConfig) + options_of(ServerConfig):
        flag = f"--{item.name.replace('_', '-')}"
        text = {bool: None, tuple: "x"}.get(item.kind, str(item.default))
        served(*([flag] if text is None else [flag, text]))


def test_flags_go_over_the_environment_and_that_over_the_file(served, tmp_path, monkeypatch):
    path = tmp_path / "c.toml"
    path.write_text("[engine]\nmodel='m'\nseed=1\nmax_num_seqs=2\n[server]\napi_key='file'\n")
    engine, server = served("--config", str(path), "--seed", "5")
    assert engine == EngineConfig(model="m", seed=5, max_num_seqs=2)
    assert server.api_key == ("file",)
    monkeypatch.setenv("JAXSERVE_API_KEY", "env")
    assert served("--config", str(path))[1].api_key == ("env",)
    assert served("--config", str(path), "--api-key", "flag")[1].api_key == ("flag",)


def test_the_model_named_last_on_the_line_goes_over_the_files(served, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[engine]\nmodel='m'\n")
    assert served("--config", str(path), "other")[0].model == "other"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["serve", "--max-modl-len", "3"], "unknown flag --max-modl-len; did you mean --max-model"),
        (["serve", "--prot=3"], "unknown flag --prot; did you mean --port?"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["serve", "a", "--model", "b"], "MODEL is a and --model is b; give one"),
        (["serve", "--port", "x"], "argument --port: port is 'x'; it must be an integer"),
        (["serve", "--port", "70000"], "port is 70000; it must be at most 65535"),
        (["serve", "--dtype", "int8"], "it must be one of auto, bfloat16, float32"),
        (["sevre"], "invalid choice: 'sevre'"),
        (["generate"], "give at least one prompt with -p"),
        (["bench"], "the following arguments are required: BENCH"),
        (["bench", "serve", "--num-promts", "3"], "did you mean --num-prompts?"),
        (["chat", "--url", "http://h", "--max-num-seqs", "3"], "--url talks to a running server"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, line):
    error = mistake(capsys, *argv)
    assert error.startswith("jaxserve: error: ")
    assert line in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine]\nmax_modl_len=3", "[engine] unknown option 'max_modl_len'; did you mean"),
        ("[enigne]\nseed=3", "unknown key 'enigne'; did you mean [engine]?"),
        ("seed=3", "unknown key 'seed'"),
        ("[server]\nport='x'", "[server] port is 'x'; it must be an integer"),
        ("[engine", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(capsys, tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    error = mistake(capsys, "serve", "--config", str(path))
    assert str(path) in error
    assert message in error


def test_offline_commands_refuse_server_options_that_would_change_answers(capsys, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[server]\ngeneration_config = 'jaxserve'\nport = 1\n")
    assert run(["generate", "-p", "a", "--config", str(path)]) == 1
    assert "[server] generation_config is for `serve` only" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_a_mistake(capsys, tmp_path):
    assert "No such file" in mistake(capsys, "serve", "--config", str(tmp_path / "no.toml"))


def test_an_error_of_the_engine_is_one_line_and_status_1(monkeypatch, capsys):
    def fail(engine_config, server_config, *, environ):
        raise ConfigError("it does not fit:\n 3 GiB")

    monkeypatch.setattr("jaxserve.server.main.run", fail)
    assert run(["serve"]) == 1
    assert capsys.readouterr().err == "jaxserve: error: it does not fit: 3 GiB\n"


def test_generate_checks_sampling_before_it_loads_the_model(capsys):
    assert run(["generate", "no-such-folder/x", "-p", "hi", "--temperature", "9"]) == 1
    assert "temperature is 9.0; it must be in [0, 2]" in capsys.readouterr().err


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jaxserve {jaxserve.__version__}\n"


def test_doctor_reports_versions_and_devices(capsys):
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"jaxserve           {jaxserve.__version__}\n" in out
    assert "device 0           cpu" in out


def test_help_is_quick():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "--help"], capture_output=True, text=True, check=True
    )
    # 0.3 s is the aim; the bound leaves room for a busy machine.
    assert time.perf_counter() - started < 1.0
    assert "serve" in done.stdout
