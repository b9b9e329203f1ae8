"""JSON schemas, one or more for each keyword that an answer can be kept to."""

from typing import Any

SCHEMAS: dict[str, dict[str, Any]] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "minimum maximum": {"type": "integer", "minimum": -7, "maximum": 130},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 12},
    "number bounds": {"type": "number", "minimum": 0.5, "maximum": 2.5},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "types": {"type": ["integer", "null"]},
    "enum": {"enum": ["a", 1, None, True, ["x"], {"y": 2}]},
    "const": {"const": {"a": [1, "b"]}},
    "minLength maxLength": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{1,4}(-[0-9]+)?$"},
    "unanchored pattern": {"type": "string", "pattern": "ab", "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "items": {"type": "array", "items": {"type": "boolean"}},
    "minItems maxItems": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "minItems": 2,
        "maxItems": 4,
    },
    "prefixItems": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "required": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "additionalProperties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {"b": {"type": "array", "items": {"type": "null"}}},
                "required": ["b"],
                "additionalProperties": False,
            }
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 100}]},
    "oneOf": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}},
                "required": ["kind", "x"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "b"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
        ]
    },
    "allOf": {
        "type": "integer",
        "allOf": [{"minimum": 10}, {"maximum": 99}],
    },
    "$ref": {
        "$ref": "#/$defs/pair",
        "$defs": {
            "pair": {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2},
            "one": {"enum": ["l", "r"]},
        },
    },
    "recursion": {
        "type": "object",
        "properties": {
            "value": {"type": "boolean"},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    },
    "annotations": {
        "title": "t",
        "description": "d",
        "type": "boolean",
        "default": True,
        "examples": [False],
    },
}
