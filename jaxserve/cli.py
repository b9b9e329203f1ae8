"""The command line: parses argv, the only module that does, and the environment; runs a command.

Flags are generated from the config dataclasses. Each command imports what it needs when it runs,
so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jaxserve.config import EngineConfig, ServerConfig, from_table, nearest
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.flags import (
    Parser,
    VersionAction,
    add_options,
    given_options,
    one_line,
    unknown_message,
    with_dashes,
)
from jaxserve.options import (
    BatchOptions,
    ChatOptions,
    CompleteOptions,
    GenerateOptions,
    LatencyBenchOptions,
    PlanOptions,
    ServeBenchOptions,
    ThroughputBenchOptions,
)

T = TypeVar("T")


def run(argv: Sequence[str]) -> int:
    """Runs the command that `argv` names and returns the exit status."""
    args = _parse(argv)
    if args.command is None:
        args.parser.print_help()
        return 2
    try:
        return int(args.command(args))
    except JaxserveError as error:
        print(f"jaxserve: error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def serve_configs(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """Returns what `jaxserve serve` would run with these arguments, for another host to run.

    Exits with status 2 for a flag that `serve` would not take; raises `ConfigError` for a value.
    """
    return _configs(_parse(["serve", *argv]))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args, unknown = build_parser().parse_known_args(with_dashes(argv))
    if unknown:
        _fail(args, unknown_message(unknown, args.flags))
    return args


def build_parser() -> Parser:
    """Returns the parser of all commands. Flags that are not given leave no attribute behind."""
    parser = Parser(prog="jaxserve", description="Serves language models with JAX.")
    parser.add_argument("--version", action=VersionAction)
    parser.set_defaults(command=None, parser=parser, flags=("--version", "--help"))
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_command(
        commands, "serve", "serve a model through the OpenAI API", _serve, with_server=True
    )
    _add_command(
        commands, "generate", "continue prompts and print the text", _generate, GenerateOptions
    )
    _add_command(commands, "chat", "talk to a server, or to a model here", _chat, ChatOptions)
    _add_command(
        commands,
        "complete",
        "go on with texts, by a server",
        _complete,
        CompleteOptions,
        with_engine=False,
    )
    _add_command(
        commands, "run-batch", "answer a file of requests, offline", _run_batch, BatchOptions
    )
    bench = commands.add_parser("bench", help="measure a server or the engine")
    bench.set_defaults(parser=bench, flags=("--help",))
    benches = bench.add_subparsers(metavar="BENCH", title="benchmarks", required=True)
    _add_command(
        benches,
        "serve",
        "load a running OpenAI-compatible server",
        _bench_serve,
        ServeBenchOptions,
        with_engine=False,
    )
    _add_command(
        benches,
        "throughput",
        "tokens in a second, offline",
        _bench_throughput,
        ThroughputBenchOptions,
    )
    _add_command(
        benches, "latency", "time of one batch, offline", _bench_latency, LatencyBenchOptions
    )
    _add_command(
        commands, "plan", "say what a model takes on devices that are not here", _plan, PlanOptions
    )
    doctor = commands.add_parser("doctor", help="report versions, devices and caches")
    doctor.set_defaults(command=_doctor, parser=doctor, flags=("--help",))
    return parser


def _add_command(
    commands: Any,
    name: str,
    help: str,
    command: Callable[[argparse.Namespace], int],
    options: type | None = None,
    *,
    with_engine: bool = True,
    with_server: bool = False,
) -> None:
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    flags: list[str] = ["--help"]
    # The command's own options come first and win: `chat --api-key` is the client's key.
    if options is not None:
        flags += add_options(parser, options, f"{name} options")
    if with_engine:
        parser.add_argument("MODEL", nargs="?", help="model to load (default: demo)")
        parser.add_argument("--config", metavar="FILE", help="TOML with [engine] and [server]")
        flags += ["--config", *add_options(parser, EngineConfig, "engine options")]
    if with_server:
        flags += add_options(parser, ServerConfig, "server options")
    parser.set_defaults(command=command, parser=parser, flags=tuple(flags))


def _fail(args: argparse.Namespace, message: str) -> NoReturn:
    """Reports a mistake in how the command was called and exits with status 2."""
    parser: Parser = args.parser
    parser.error(message)


def _options(args: argparse.Namespace, cls: type[T]) -> T:
    try:
        return from_table(cls, given_options(args, cls))
    except ConfigError as error:
        _fail(args, str(error))


def _configs(args: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    """Returns both configs: defaults, then the TOML file, then the environment, then flags."""
    try:
        tables = read_toml(Path(args.config)) if args.config else {"engine": {}, "server": {}}
    except ConfigError as error:
        _fail(args, str(error))
    engine = tables["engine"] | given_options(args, EngineConfig)
    if args.MODEL is not None:
        if engine.get("model", args.MODEL) != args.MODEL and given_options(args, EngineConfig).get(
            "model"
        ):
            _fail(args, f"MODEL is {args.MODEL} and --model is {engine['model']}; give one")
        engine["model"] = args.MODEL
    server = tables["server"]
    if key := os.environ.get("JAXSERVE_API_KEY"):
        server["api_key"] = (key,)
    server |= given_options(args, ServerConfig)
    return from_table(EngineConfig, engine), from_table(ServerConfig, server)


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    """Returns the config of a command that runs an engine without a server.

    Raises `ConfigError` if the file sets what would change a server's answers but not these.
    """
    engine, server = _configs(args)
    for name in ("chat_template", "generation_config"):
        if getattr(server, name) != getattr(ServerConfig(), name):
            raise ConfigError(f"--config {args.config}: [server] {name} is for `serve` only")
    return engine


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the [engine] and [server] tables with every value checked.

    Raises `ConfigError`, naming the file, for anything else in it.
    """
    import tomllib

    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    classes: dict[str, type] = {"engine": EngineConfig, "server": ServerConfig}
    for name, table in tables.items():
        if name not in classes or not isinstance(table, dict):
            near = nearest(name, tuple(classes))
            hint = f"; did you mean [{near}]?" if near else "; known: [engine], [server]"
            raise ConfigError(f"{path}: unknown key {name!r}{hint}")
    checked = {}
    for name, cls in classes.items():
        table = tables.get(name, {})
        try:
            config: Any = from_table(cls, table)
        except ConfigError as error:
            raise ConfigError(f"{path}: [{name}] {error}") from error
        defaults = cls()
        # Only what differs: flags and the environment go over it.
        checked[name] = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(cls)
            if getattr(config, field.name) != getattr(defaults, field.name)
        }
    return checked


def _api_key(given: str) -> str:
    return given or os.environ.get("JAXSERVE_API_KEY", "")


def _serve(args: argparse.Namespace) -> int:
    engine_config, server_config = _configs(args)
    from jaxserve.server.main import run as run_server

    return run_server(engine_config, server_config, environ=os.environ)


def _generate(args: argparse.Namespace) -> int:
    options = _options(args, GenerateOptions)
    if not options.prompt:
        _fail(args, "give at least one prompt with -p")
    engine_config = _engine_config(args)
    from jaxserve.complete import generate_text

    return generate_text(engine_config, options)


def _chat(args: argparse.Namespace) -> int:
    options = _options(args, ChatOptions)
    engine_config = _engine_config(args)
    if options.url and (engine_config != EngineConfig() or args.MODEL):
        _fail(args, "--url talks to a running server; MODEL and engine options need no --url")
    from jaxserve.repl import chat_here, chat_with_server

    if options.url:
        options = dataclasses.replace(options, api_key=_api_key(options.api_key))
        return chat_with_server(options)
    return chat_here(engine_config, options)


def _complete(args: argparse.Namespace) -> int:
    options = _options(args, CompleteOptions)
    from jaxserve.repl import complete_with_server

    return complete_with_server(dataclasses.replace(options, api_key=_api_key(options.api_key)))


def _run_batch(args: argparse.Namespace) -> int:
    options = _options(args, BatchOptions)
    if not options.input_file or not options.output_file:
        _fail(args, "give the files with -i and -o")
    engine_config, server_config = _configs(args)
    from jaxserve.run_batch import run_batch

    return run_batch(engine_config, server_config, options)


def _bench_serve(args: argparse.Namespace) -> int:
    options = _options(args, ServeBenchOptions)
    from jaxserve.bench.serve import run_serve_bench

    return run_serve_bench(dataclasses.replace(options, api_key=_api_key(options.api_key)))


def _bench_throughput(args: argparse.Namespace) -> int:
    options = _options(args, ThroughputBenchOptions)
    engine_config = _engine_config(args)
    from jaxserve.bench.offline import run_throughput_bench

    return run_throughput_bench(engine_config, options)


def _bench_latency(args: argparse.Namespace) -> int:
    options = _options(args, LatencyBenchOptions)
    engine_config = _engine_config(args)
    from jaxserve.bench.offline import run_latency_bench

    return run_latency_bench(engine_config, options)


def _plan(args: argparse.Namespace) -> int:
    options = _options(args, PlanOptions)
    engine_config = _engine_config(args)
    from jaxserve.planning.report import run_plan
    from jaxserve.planning.targets import COMPILER_ENVIRONMENT

    for name, value in COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return run_plan(engine_config, options)


def _doctor(args: argparse.Namespace) -> int:
    from jaxserve.doctor import report

    return report()
