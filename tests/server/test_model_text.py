"""The text side of a model, and the sampling defaults that it brings."""

import dataclasses

import httpx2
import pytest

from jaxserve.config import EngineConfig, ServerConfig, options_of
from jaxserve.errors import ConfigError
from jaxserve.server.model_text import load_text, sampling_defaults, server_template
from jaxserve.text import reasoning, tool_parsers
from tests.checkpoints import write_llama_folder
from tests.server.serving import EchoServer


@pytest.fixture
def model(tmp_path):
    return write_llama_folder(tmp_path / "model")


def test_the_models_own_template_is_used_unless_another_is_given(model, tmp_path):
    engine = EngineConfig(model=str(model))
    own = load_text(model, engine, ServerConfig()).chat_template
    assert own is not None and "<|im_start|>" in own.source
    file = tmp_path / "mine.jinja"
    file.write_text("from a file")
    for option, source in (("{{ messages }}", "{{ messages }}"), (str(file), "from a file")):
        text = load_text(model, engine, ServerConfig(chat_template=option))
        assert text.chat_template is not None and text.chat_template.source == source


def test_the_template_tells_how_messages_are_read(model):
    engine = EngineConfig(model=str(model))
    template = "{{ tools }}<tool_call><think>"
    format = load_text(model, engine, ServerConfig(chat_template=template)).format
    assert (format.tools_name, format.reasoning_name) == ("hermes", "qwen3")
    given = ServerConfig(
        chat_template=template, tool_call_parser="mistral", reasoning_parser="none"
    )
    format = load_text(model, engine, given).format
    assert (format.tools_name, format.reasoning_name) == ("mistral", "none")


def test_the_options_name_every_format():
    choices = {option.name: set(option.choices) for option in options_of(ServerConfig)}
    assert choices["tool_call_parser"] == {"auto", "none", *tool_parsers.FORMATS}
    assert choices["reasoning_parser"] == {"auto", "none", *reasoning.FORMATS}


def test_a_template_file_that_is_missing_is_an_error():
    with pytest.raises(ConfigError, match="nowhere.jinja"):
        server_template("nowhere.jinja")


def test_generation_config_can_be_left_unread(model):
    engine = EngineConfig(model=str(model))
    assert load_text(model, engine, ServerConfig(generation_config="jaxserve")).defaults == {}


def test_sampling_defaults_take_our_names():
    stored = {"temperature": 0.5, "max_new_tokens": 7, "do_sample": True, "top_p": None}
    assert sampling_defaults(stored) == {"temperature": 0.5, "max_tokens": 7}
    with pytest.raises(ConfigError, match="temperature"):
        sampling_defaults({"temperature": -1})


def test_sampling_defaults_can_be_overridden(model):
    engine = EngineConfig(model=str(model))
    option = '{"temperature": 0.25, "max_new_tokens": 9, "presence_penalty": 1.5}'
    for source in ("auto", "vllm"):
        server = ServerConfig(override_generation_config=option, generation_config=source)
        defaults = load_text(model, engine, server).defaults
        assert (defaults["temperature"], defaults["max_tokens"]) == (0.25, 9)
        assert defaults["presence_penalty"] == 1.5
    for wrong, message in (
        ("{", "not JSON"),
        ("3", "must be an object"),
        ('{"heat": 1}', "heat"),
        ('{"top_p": 7}', "override_generation_config: top_p is 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_text(model, engine, ServerConfig(override_generation_config=wrong))


def test_defaults_apply_where_a_request_says_nothing():
    with EchoServer() as server, httpx2.Client(base_url=server.url) as http:
        assert server.state.text is not None
        server.state.text = dataclasses.replace(server.state.text, defaults={"max_tokens": 3})
        messages = [{"role": "user", "content": "hi"}]
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": messages}),
        ):
            count = http.post(path, json=body).json()["usage"]["completion_tokens"]
            assert count == 3
            asked = http.post(path, json={**body, "max_tokens": 5}).json()
            assert asked["usage"]["completion_tokens"] == 5
