"""Options: what they take, what they refuse, and that files and flags agree."""

import dataclasses
from pathlib import Path

import pytest

from jaxserve.cli import read_toml
from jaxserve.config import (
    EngineConfig,
    ServerConfig,
    compile_cache_path,
    from_table,
    options_of,
    parse_text,
)
from jaxserve.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def engine(**table):
    return from_table(EngineConfig, table)


def test_a_table_changes_the_fields_it_names_and_no_other():
    assert engine(max_num_seqs=3) == dataclasses.replace(EngineConfig(), max_num_seqs=3)


def test_dashes_stand_for_underscores():
    assert from_table(EngineConfig, {"max-num-seqs": 3}).max_num_seqs == 3


def test_vllms_name_for_a_renamed_option_is_known():
    assert engine(block_size=32).page_size == 32


def test_an_option_given_under_two_names_is_an_error():
    with pytest.raises(ConfigError, match="page_size is given twice, once as 'block_size'"):
        engine(page_size=16, block_size=16)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="'max_modl_len'; did you mean 'max_model_len'"):
        engine(max_modl_len=3)


def test_an_option_like_no_other_lists_all():
    with pytest.raises(ConfigError, match="unknown option 'zzz'; known: model, "):
        engine(zzz=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("32k", 32_000),
        ("32K", 32_768),
        ("1.5k", 1_500),
        ("2GiB", 2 * 2**30),
        ("2GB", 2 * 10**9),
        (" 7 ", 7),
        ("auto", "auto"),
    ],
)
def test_integers_take_sizes(text, value):
    assert engine(kv_cache_memory_bytes=text).kv_cache_memory_bytes == value


@pytest.mark.parametrize(
    "text", ["", "k", "1e3", "1.5", "1.5x", "0x10", "1_000", "1/2", "9" * 5000, "nan", "٣"]
)
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(ConfigError, match="must be an integer or 'auto'"):
        engine(kv_cache_memory_bytes=text)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it must be an integer or 'auto'"),
        ({"max_num_seqs": 1.0}, "max_num_seqs is 1.0; it must be an integer or 'auto'"),
        ({"max_num_seqs": None}, "max_num_seqs is None; it must be an integer or 'auto'"),
        ({"gpu_memory_utilization": "0.9"}, "it must be a number"),
        ({"gpu_memory_utilization": 1.5}, "is 1.5; it must be at most 1.0"),
        ({"gpu_memory_utilization": float("nan")}, "is nan; it must be finite"),
        ({"enable_prefix_caching": 1}, "is 1; it must be true or false"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, bfloat16, float32"),
        ({"dtype": ["auto"]}, "dtype is ..auto..; it must be one of"),
        ({"model": 3}, "model is 3; it must be a string"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_a_wrong_value_names_itself_and_what_is_right(table, message):
    with pytest.raises(ConfigError, match=message):
        from_table(EngineConfig, table)


def test_a_list_option_takes_one_string_or_a_list():
    assert from_table(ServerConfig, {"api_key": "a"}).api_key == ("a",)
    assert from_table(ServerConfig, {"api_key": ["a", "b"]}).api_key == ("a", "b")
    with pytest.raises(ConfigError, match="must be a list of strings"):
        from_table(ServerConfig, {"api_key": [1]})


def test_an_integer_is_good_for_a_float():
    assert from_table(ServerConfig, {"shutdown_timeout": 5}).shutdown_timeout == 5.0


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_default_passes_its_own_check(cls):
    defaults = dataclasses.asdict(cls())
    assert dataclasses.asdict(from_table(cls, defaults)) == defaults


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_option_has_a_help_text_and_reads_its_default_from_text(cls):
    for item in options_of(cls):
        assert item.help
        if item.kind in (int, float, str):
            assert parse_text(item, str(item.default)) == item.default


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_in_the_repository_is_valid(path):
    assert read_toml(path)["engine"]


def test_the_compile_cache_can_be_moved_and_turned_off(tmp_path):
    assert compile_cache_path(EngineConfig()) == Path.home() / ".cache" / "jaxserve"
    assert compile_cache_path(EngineConfig(compile_cache_dir="")) is None
    assert compile_cache_path(EngineConfig(compile_cache_dir=str(tmp_path))) == tmp_path
