"""Turns what a client asks of an answer's form into a grammar in llguidance's syntax.

Cheap checks and rewriting only: the engine compiles, within limits of time and size. Host only:
imports no jax.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, grammar_from

from jaxserve.structured_outputs import Grammar, StructuredOutputsParams, Vocabulary
from jaxserve.text.tokenizer import Tokenizer

MAX_BYTES = 256 * 2**10
MAX_DEPTH = 64
MAX_GBNF_BYTES = 8 * 2**10  # it is rewritten as Lark in Python

# Where a text can only go on in one way, the model still chooses the tokens that spell it:
# llguidance would force the spelling of a tokenizer that the engine does not have.
NO_FORCING = '%llguidance {"no_forcing": true}'


def grammar_for(params: StructuredOutputsParams, tokenizer: Tokenizer) -> Grammar:
    """Returns the grammar of the answers that `params` allows. Raises `RequestError`.

    Whether the engine can compile it is not known yet.
    """
    if tokenizer.pieces is None:
        raise params.error("this model's tokenizer cannot be constrained: its tokens have no bytes")
    match params.kind:
        case "json":
            source = _from_schema(params, _parsed(params, params.json))
        case "json_object":
            source = _from_schema(params, {"type": "object"})
        case "regex":
            source = _lark_of(LLMatcher.grammar_from_regex(_bounded(params, params.regex or "")))
        case "choice":
            source = _from_choice(params)
        case "grammar":
            source = _from_grammar(params)
        case _:
            source = _from_tags(params, tokenizer)
    if "%llguidance" not in source:  # else it is the client's own, who decides
        source = f"{NO_FORCING}\n{source}"
    return Grammar(source=source, param=params.param)


def vocabulary_of(
    tokenizer: Tokenizer,
    marks: Sequence[str] = (),  # tokens that count as special beside those that are
) -> Vocabulary | None:
    """Returns the bytes of every token; None for a tokenizer whose tokens have none."""
    pieces = tokenizer.pieces
    if pieces is None:
        return None
    special = {token for mark in marks if (token := tokenizer.token_of(mark)) is not None}
    num_tokens = max(tokenizer.vocabulary().values(), default=-1) + 1
    return Vocabulary(
        tokens=tuple(pieces[token] for token in range(num_tokens)),
        special_tokens=tuple(sorted(tokenizer.special_ids | special)),
    )


def _bounded(params: StructuredOutputsParams, text: str, limit: int = MAX_BYTES) -> str:
    """Returns the text if it may be compiled."""
    if not text:
        raise params.error(f"{params.kind} is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise params.error(f"{params.kind} is not valid Unicode") from error
    if size > limit:
        raise params.error(f"{params.kind} has {size} bytes; the limit is {limit}")
    return text


def _parsed(params: StructuredOutputsParams, value: Any) -> Any:
    """Returns JSON that the client gave as such or as a text, checked for size and depth."""
    if isinstance(value, str):
        try:
            value = json.loads(_bounded(params, value))
        except (ValueError, RecursionError) as error:
            raise params.error(f"{params.kind} is not JSON: {error}") from error
    if (depth := _depth(value, MAX_DEPTH + 1)) > MAX_DEPTH:
        raise params.error(f"{params.kind} nests {depth} levels or more; the limit is {MAX_DEPTH}")
    try:
        _bounded(params, json.dumps(value))
    except (TypeError, ValueError) as error:
        raise params.error(f"{params.kind} is not JSON: {error}") from error
    return value


def _depth(value: Any, limit: int) -> int:
    """Returns how deep lists and objects nest, up to `limit`."""
    level, depth = [value], 0
    while level and depth < limit:
        inner = [one.values() if isinstance(one, dict) else one for one in level if _nests(one)]
        if not inner:
            break
        level = [part for parts in inner for part in parts]
        depth += 1
    return depth


def _nests(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def _from_schema(params: StructuredOutputsParams, schema: Any) -> str:
    return f"start: %json {json.dumps(_with_options(params, schema))}"


def _with_options(params: StructuredOutputsParams, schema: Any) -> Any:
    """Returns a schema with the client's options in it, as llguidance reads them there."""
    if not isinstance(schema, dict | bool):
        raise params.error(f"a schema is an object or a boolean, not {schema!r:.80}")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = _bounded(params, params.whitespace_pattern)
    given = schema.get("x-guidance", {})
    if not isinstance(given, dict):
        raise params.error(f"x-guidance is {given!r:.80}; it takes an object")
    return {**schema, "x-guidance": {**given, **options}}


def _closed(schema: Any) -> Any:
    """Returns a schema whose objects take no properties but those it names, if it names any."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: value if key in ("enum", "const", "default", "examples") else _closed(value)
        for key, value in schema.items()
    }
    names_some = isinstance(schema.get("properties"), dict) or "patternProperties" in schema
    if names_some and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def _from_choice(params: StructuredOutputsParams) -> str:
    choices = params.choice or ()
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise params.error("choice takes a list of one or more non-empty strings")
    for text in choices:
        _bounded(params, text)
    return _bounded(params, "start: " + " | ".join(map(_quoted, choices)))


def _from_grammar(params: StructuredOutputsParams) -> str:
    text = _bounded(params, params.grammar or "")
    if "::=" not in text:
        return text
    _bounded(params, text, MAX_GBNF_BYTES)
    try:
        return _lark_of(grammar_from("gbnf", text))
    except (ValueError, RecursionError) as error:
        raise params.error(f"grammar is neither Lark nor GBNF: {error!s:.500}") from error


def _lark_of(source: str) -> str:
    """Returns the Lark text in what llguidance's own converters return, without options."""
    if not source.startswith("{"):
        return source.replace("%llguidance {}", "", 1)
    lark: str = json.loads(source)["grammars"][0]["lark_grammar"]
    return lark


def _from_tags(params: StructuredOutputsParams, tokenizer: Tokenizer) -> str:
    """Returns text in which a trigger begins one of the tags, each with JSON by its schema.

    The form is that of vLLM's `structures` and `triggers`.
    """
    value = _parsed(params, params.structural_tag)
    if not isinstance(value, dict) or not {"structures", "triggers"} <= value.keys():
        raise params.error(
            'structural_tag takes {"structures": [{"begin", "schema", "end"}], "triggers": [...]}'
        )
    structures, triggers = value["structures"], value["triggers"]
    if not isinstance(triggers, list) or not all(isinstance(one, str) and one for one in triggers):
        raise params.error("triggers takes a list of non-empty strings")
    if not isinstance(structures, list) or not structures:
        raise params.error("structures takes a list of one or more objects")
    rules = [
        _tag_rules(params, f"tag_{index}", one, triggers, tokenizer)
        for index, one in enumerate(structures)
    ]
    names = " | ".join(f"tag_{index}" for index in range(len(rules)))
    return "\n".join([f"start: ({names})* tag_end", "tag_end: TAG_TEXT", _TAG_TEXT, *rules])


_TAG_TEXT = r"TAG_TEXT: /(.|\n)*/"


def _tag_rules(
    params: StructuredOutputsParams,
    name: str,
    structure: Any,
    triggers: list[str],
    tokenizer: Tokenizer,
) -> str:
    """Returns the rules of one tag: any text up to its trigger, the rest of its begin, its JSON."""
    if not isinstance(structure, dict):
        raise params.error("structures holds something that is no object")
    begin, end = structure.get("begin"), structure.get("end", "")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise params.error("begin and end of a structure must be strings")
    trigger = next((one for one in triggers if begin.startswith(one)), None)
    if trigger is None:
        raise params.error(f"no trigger starts {begin!r:.80}")
    schema = json.dumps(_with_options(params, structure.get("schema", {})))
    rest = begin[len(trigger) :]
    body = f"{_quoted(rest) if rest else ''} %json {schema} {_quoted(end) if end else ''}"
    token = tokenizer.token_of(trigger)
    if token is not None and token in tokenizer.special_ids:
        return f"{name}: TAG_TEXT <[{token}]> {body}"
    return f"{name}_head[lazy]: TAG_TEXT {_quoted(trigger)}\n{name}: {name}_head {body}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
