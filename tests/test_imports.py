"""Who may import whom: downwards only, no jax in host modules, no torch anywhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up; modules on one line do not import each other, those under one name may.
LAYERS = (
    ("pallas_kernels",),
    ("jaxserve.errors",),
    ("jaxserve.config",),
    ("jaxserve.mesh",),
    ("jaxserve.batch",),
    ("jaxserve.ops",),
    ("jaxserve.models",),
    ("jaxserve.structured_outputs",),
    ("jaxserve.engine", "jaxserve.text"),
    ("jaxserve.outputs",),
    ("jaxserve.beam_search",),
    ("jaxserve.generation",),
    ("jaxserve.offline", "jaxserve.offline_beams"),
    ("jaxserve.server",),
    ("jaxserve.llm",),
    ("jaxserve",),
    ("jaxserve.address", "jaxserve.flags", "jaxserve.options"),
    ("jaxserve.planning",),
    (
        "jaxserve.bench",
        "jaxserve.complete",
        "jaxserve.doctor",
        "jaxserve.repl",
        "jaxserve.run_batch",
    ),
    ("jaxserve.cli",),
    ("jaxserve.__main__", "jaxserve.asgi"),
    ("jaxserve.ray_serve",),
)
HOST_MODULES = (
    "jaxserve",
    "jaxserve.asgi",
    "jaxserve.ray_serve",
    "jaxserve.errors",
    "jaxserve.config",
    "jaxserve.cli",
    "jaxserve.flags",
    "jaxserve.options",
    "jaxserve.address",
    "jaxserve.repl",
    "jaxserve.complete",
    "jaxserve.run_batch",
    "jaxserve.doctor",
    "jaxserve.bench",
    "jaxserve.outputs",
    "jaxserve.beam_search",
    "jaxserve.generation",
    "jaxserve.offline",
    "jaxserve.offline_beams",
    "jaxserve.llm",
    "jaxserve.structured_outputs",
    "jaxserve.text",
    "jaxserve.server",
    "jaxserve.models.checkpoint",
    "jaxserve.engine.repetition",
    "jaxserve.engine.request",
    "jaxserve.engine.info",
    "jaxserve.engine.pages",
    "jaxserve.engine.prefix_cache",
    "jaxserve.engine.scheduler",
    "jaxserve.engine.client",
    "jaxserve.engine.ipc",
    "jaxserve.engine.cluster",
    "jaxserve.engine.follower",
    "jaxserve.engine.grammar",
    "jaxserve.engine.leader",
    "jaxserve.engine.member",
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in ("jaxserve", "pallas_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports_of(path):
    """Returns every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            # `import jaxserve` alone is for the package's own files, which are hashed.
            found |= {alias.name for alias in node.names} - {"jaxserve"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    found.add(submodule)
                elif (node.module, alias.name) != ("jaxserve", "__version__"):
                    found.add(node.module)
    return found


def layer_of(module):
    """Returns the position of the longest entry of LAYERS that `module` is or lies in."""
    places = [
        (len(name), level, name)
        for level, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "jaxserve" and module.startswith(name + "."))
    ]
    assert places, f"{module} is in no layer: add it to LAYERS"
    return max(places)[1:]


def is_allowed(module, imported):
    level, name = layer_of(module)
    imported_level, imported_name = layer_of(imported)
    return imported_level < level or imported_name == name


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    own = [name for name in imports_of(MODULES[module]) if name in MODULES]
    assert [name for name in own if not is_allowed(module, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_torch(module):
    assert [n for n in imports_of(MODULES[module]) if n.split(".")[0] == "torch"] == []


def test_pallas_kernels_import_nothing_of_jaxserve():
    for module, path in MODULES.items():
        if module.startswith("pallas_kernels"):
            assert not [name for name in imports_of(path) if name.startswith("jaxserve")], module


def test_an_upward_import_would_be_found():
    assert is_allowed("jaxserve.server.app", "jaxserve.engine.request")
    assert not is_allowed("jaxserve.engine.request", "jaxserve.server.app")
    assert not is_allowed("jaxserve.text.tokenizer", "jaxserve.engine.request")
    assert not is_allowed("jaxserve.errors", "jaxserve.config")


def host_modules():
    return [
        module
        for module in MODULES
        if any(module == host or module.startswith(host + ".") for host in HOST_MODULES[1:])
        or module == "jaxserve"
    ]


def test_host_modules_import_no_jax():
    """One process imports them one by one, so that the first at fault is named."""
    source = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules]\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, *host_modules()], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
