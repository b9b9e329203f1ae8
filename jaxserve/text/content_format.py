"""Decides if a chat template reads a message's content as one string or as a list of parts.

Host only: imports no jax.
"""

from __future__ import annotations

from jinja2 import nodes


def loops_over_content(tree: nodes.Template) -> bool:
    """True if some loop runs over a message's `content`, also under another name."""
    names: dict[str, set[str]] = {"messages": {"messages"}}
    size = -1
    # Names get their meaning from one another, in any order: repeat until nothing is new.
    while size != (size := sum(map(len, names.values()))):
        for assign in tree.find_all(nodes.Assign):
            _learn(names, assign.target, _kinds(assign.node, names))
        for loop in tree.find_all(nodes.For):
            if "messages" in _kinds(loop.iter, names):
                _learn(names, loop.target, {"message"})
        _learn_macro_arguments(tree, names)
    return any("content" in _kinds(loop.iter, names) for loop in tree.find_all(nodes.For))


def _learn(names: dict[str, set[str]], target: nodes.Node, kinds: set[str]) -> None:
    if isinstance(target, nodes.Name):
        names.setdefault(target.name, set()).update(kinds)
    elif isinstance(target, nodes.NSRef):
        names.setdefault(f"{target.name}.{target.attr}", set()).update(kinds)


def _learn_macro_arguments(tree: nodes.Template, names: dict[str, set[str]]) -> None:
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            continue
        for parameter, argument in zip(macro.args, call.args, strict=False):
            _learn(names, parameter, _kinds(argument, names))
        for keyword in call.kwargs:
            names.setdefault(keyword.key, set()).update(_kinds(keyword.value, names))


def _kinds(node: nodes.Node | None, names: dict[str, set[str]]) -> set[str]:
    """Returns which of "messages", "message" and "content" an expression may be."""
    if isinstance(node, nodes.Name):
        return names.get(node.name, set())
    if isinstance(node, nodes.Filter | nodes.Test):
        return _kinds(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _kinds(node.expr1, names) | _kinds(node.expr2, names)
    if isinstance(node, nodes.Call):  # message.get("content")
        is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and node.args
        return _member(node.node.node, node.args[0], names) if is_get else set()  # type: ignore[attr-defined]
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _kinds(node.node, names)
        return _member(node.node, node.arg, names)
    if isinstance(node, nodes.Getattr):
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in names:
            return names[f"{node.node.name}.{node.attr}"]
        return _member(node.node, nodes.Const(node.attr), names)
    return set()


def _member(base: nodes.Node, key: nodes.Node, names: dict[str, set[str]]) -> set[str]:
    """Returns what `base[key]` may be."""
    kinds = _kinds(base, names)
    name = key.value if isinstance(key, nodes.Const) else None
    found = {"content"} if "message" in kinds and name == "content" else set()
    return found | ({"message"} if "messages" in kinds and not isinstance(name, str) else set())
