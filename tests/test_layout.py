"""The layers of the house: imports point downwards, nothing heavy loads unasked, files stay short."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastsepconv
from fastsepconv import dispatch

ROOT = Path(fastsepconv.__file__).parents[1]
FRAMEWORK_FREE = {
    "ops", "operations", "layout", "device_arrays", "dlpack", "activations", "dispatch", "checks", "formulas",
    "kernels",
}  # fmt: skip
LONGEST_FILE = 400
FOLDERS = {"fastsepconv": "fastsepconv", "kernels": "fastsepconv.kernels", "bench": "fastsepconv.bench"}

# From the top down: a module may import what stands below it.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench"},
    {"models", "verify"},
    {"convert", "freeze"},
    {"copying"},
    {"layers"},
    {"bridge"},
    {"ops"},
    {"operations"},
    {"layout", "activations", "dispatch"},
    {"device_arrays"},
    {"dlpack"},
    {"checks", "formulas"},
    {"kernels"},
]
KERNEL_LAYERS = [{"cpu", "cuda"}, {"reference"}, {"geometry", "device_array", "nvidia", "cache_folder"}]


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name, the folders that are installed inside it too."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (path.parent / "__init__.py").exists():
                parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(module: str) -> set[str]:
    """The dotted names that a module imports anywhere in it, those for type checkers left out."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in walk_code(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else base for name in names}
    return found


def walk_code(node):
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk_code(child)


def rank(layers: list[set[str]], name: str) -> int:
    matches = [i for i, layer in enumerate(layers) if name in layer]
    assert matches, f"{name} has no place among the layers: give it one"
    return matches[0]


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "fastsepconv"])
def test_imports_point_downwards(module):
    layers, depth = (KERNEL_LAYERS, 2) if module.startswith("fastsepconv.kernels.") else (LAYERS, 1)
    own = module.split(".")[depth]
    here = rank(layers, own)
    for target in imports(module):
        parts = target.split(".")
        if parts[0] != "fastsepconv":
            continue
        if len(parts) > depth and parts[:depth] == module.split(".")[:depth]:
            below = rank(layers, parts[depth]) > here
            assert below or parts[depth] == own, f"{module} imports {target}, which is not below it"
        else:
            assert depth == 1, f"{module} imports {target}: kernels import nothing of the rest of the package"


def test_nothing_imports_in_circles():
    graph = {module: {target for target in imports(module) if target in SOURCES} - {module} for module in SOURCES}
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize(
    "module", [name for name in SOURCES if name.split(".")[1:2] and name.split(".")[1] in FRAMEWORK_FREE]
)
def test_the_array_api_and_the_kernels_import_no_framework(module):
    outside = {target.partition(".")[0] for target in imports(module)}
    assert outside - sys.stdlib_module_names <= {"fastsepconv", "numpy", "numba", "llvmlite", "cuda"}


def in_a_new_process(code: str, folder: Path) -> str:
    """What `code` prints in an interpreter started outside the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_numpy_users_never_load_a_framework_nor_a_module_named_kernels(tmp_path):
    code = """
import sys
import numpy as np
import fastsepconv
dir(fastsepconv), fastsepconv.__version__, fastsepconv.__all__
x, depthwise, pointwise = np.ones((1, 4, 4, 2), "f4"), np.ones((3, 3, 2, 1), "f4"), np.ones((2, 3), "f4")
for backend in ("reference", "cpu"):
    fastsepconv.set_backend(backend)
    y = fastsepconv.separable_conv2d(x, depthwise, pointwise, activation="gelu")
    fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, y)
    y = fastsepconv.depthwise_conv2d(x, depthwise, activation="relu")
    fastsepconv.depthwise_conv2d_grad(x, depthwise, y)
    y = fastsepconv.pointwise_conv2d(x, pointwise)
    fastsepconv.pointwise_conv2d_grad(x, pointwise, y)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"tensorflow", "keras", "torch", "jax", "kernels"}))
"""
    assert in_a_new_process(code, tmp_path) == "[]"


def test_importing_the_package_alone_loads_not_even_numpy(tmp_path):
    code = "import sys, fastsepconv; print('numpy' in sys.modules or 'numba' in sys.modules)"
    assert in_a_new_process(code, tmp_path) == "False"


def test_the_kernels_are_installed_inside_the_package(tmp_path):
    import fastsepconv.kernels

    assert "kernels" not in sys.modules
    assert fastsepconv.kernels.__name__ == "fastsepconv.kernels"
    assert in_a_new_process("import importlib.util; print(importlib.util.find_spec('kernels'))", tmp_path) == "None"


def test_every_package_is_listed_for_installation():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def test_public_names_are_what_they_say():
    for name in fastsepconv.__all__:
        value = getattr(fastsepconv, name)
        assert inspect.ismodule(value) == (name == "models"), name
        assert value is getattr(fastsepconv, name)
    assert set(fastsepconv.__all__) <= set(dir(fastsepconv))
    with pytest.raises(AttributeError, match="no attribute 'conv2d'"):
        _ = fastsepconv.conv2d


def test_a_function_keeps_its_name_when_the_module_of_that_name_is_imported(tmp_path):
    code = """
import importlib, fastsepconv
for name in ("convert", "verify"):
    module = importlib.import_module(f"fastsepconv.{name}")
    print(getattr(fastsepconv, name) is getattr(module, name), callable(getattr(fastsepconv, name)))
"""
    assert in_a_new_process(code, tmp_path) == "True True\nTrue True"


@pytest.mark.parametrize("module", SOURCES)
def test_files_are_short_and_do_not_assert(module):
    text = SOURCES[module].read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    lines = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert not lines, f"assert in {module}, line {lines}"


def face(module: str) -> dict[str, list[str]]:
    """The public functions of a module and their parameters, read without importing it."""
    body = ast.parse(SOURCES[module].read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return {node.name: [parameter.arg for parameter in node.args.args] for node in functions}


@pytest.mark.parametrize("module", [f"fastsepconv.{backend.module}" for backend in dispatch.BACKENDS])
def test_backends_offer_the_same_functions(module):
    assert face(module) == face("fastsepconv.kernels.cpu")
    operations = {
        f"{name}_{way}" for name in ("depthwise", "pointwise", "separable") for way in ("forward", "backward")
    }
    assert set(face(module)) == operations


def test_cpu_and_cuda_have_a_file_for_each_operation():
    for backend in ("cpu", "cuda"):
        for operation in ("depthwise", "pointwise", "separable"):
            assert f"fastsepconv.kernels.{backend}.{operation}" in SOURCES
            assert {"forward", "backward"} <= face(f"fastsepconv.kernels.{backend}.{operation}").keys()


def test_the_cuda_kernels_load_only_when_asked_for(tmp_path):
    code = """
import sys
import numpy as np
import fastsepconv
from fastsepconv import dispatch
x, kernel = np.ones((1, 2, 2, 3), "f4"), np.ones((3, 2), "f4")
fastsepconv.pointwise_conv2d(x, kernel)
fastsepconv.pointwise_conv2d_grad(x, kernel, np.ones((1, 2, 2, 2), "f4"))
dispatch.runnable(), dispatch.explain()
print([name for name in sys.modules if name.startswith("fastsepconv.kernels.cuda") or name == "cuda.bindings"])
"""
    assert in_a_new_process(code, tmp_path) == "[]"
