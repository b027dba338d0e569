"""Who may import whom, and that nothing but public names of others is used."""

import ast
import functools
import graphlib
import pathlib
import re

import keras
import keras_hub
import pytest

import attention

pytestmark = pytest.mark.same_everywhere

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("attention", "blocks")


def files_of(*folders):
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


SOURCES = files_of(*PACKAGES)
# Scripts have no privates of their own; they follow the same rules.
FILES = [*SOURCES, *files_of("examples", "benchmarks")]


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree):
    """Each import as `(module, name)`, where `import module` has no name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from ((node.module, alias.name) for alias in node.names)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_uses(tree):
    """The private attributes that are read or written, on whatever object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            function, name = node.func, node.args[1]
            by_name = getattr(function, "id", "") in ("getattr", "hasattr", "setattr")
            if by_name and isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value


def private_definitions(tree):
    """The private names that a file gives to its classes and their objects."""
    for node in ast.walk(tree):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # Only on `self`: an assignment to a foreign object defines nothing.
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def names_of_others():
    """The private names of the classes that ours are subclasses of."""
    models, layers = keras_hub.models, keras.layers
    bases = (models.CausalLM, models.CausalLMPreprocessor, keras_hub.samplers.Sampler)
    # Objects, too: much is assigned in `__init__`.
    owners = (*bases, models.Backbone, layers.Layer(), keras.Sequential())
    return {name for owner in owners for name in dir(owner) if is_private(name)}


OURS = {
    name for path in SOURCES for name in private_definitions(parse(path))
} - names_of_others()


def foreign_privates(tree):
    """Private names that are not ours: also those inherited, through `self`."""
    return sorted({name for name in private_uses(tree) if name not in OURS})


def test_the_rule_finds_what_it_should():
    code = """
layer._flatten_layers()
model._something = 1
self._build_shapes_dict
getattr(tensor, "_keras_mask")
x.__class__
self._check_width
"""
    found = ["_build_shapes_dict", "_flatten_layers", "_keras_mask", "_something"]
    assert foreign_privates(ast.parse(code)) == found
    assert "_check_width" in OURS


def test_only_public_names_of_others_are_used():
    for path in FILES:
        assert foreign_privates(parse(path)) == [], path


def test_only_public_modules_of_others_are_imported():
    for path in FILES:
        for module, name in imports(parse(path)):
            parts = [*module.split("."), name or ""]
            if parts[0] in ("keras", "keras_hub"):
                assert "src" not in parts, (path, module)
            private = [part for part in parts if is_private(part)]
            assert parts[0] in PACKAGES or not private, (path, module, name)


def test_blocks_take_what_is_public():
    rooms = {room.__name__: room for room in (attention, attention.contract)}
    for path in (ROOT / "blocks").rglob("*.py"):
        for module, name in imports(parse(path)):
            if module.split(".")[0] == "attention" and path.parent.name != "testing":
                assert module in rooms, f"{path} imports {module}"
                assert name in rooms[module].__all__, f"{path} imports {name}"


def room(module):
    """The folder of a module; files at the top of a package are one room, too."""
    path = ROOT.joinpath(*module.split("."))
    folder = path if path.is_dir() else path.parent
    return str(folder.relative_to(ROOT))


def imports_of_rooms():
    """For each folder the other folders that its files import."""
    found = {}
    for path in SOURCES:
        own = str(path.parent.relative_to(ROOT))
        # The top of a package imports its rooms.
        if path.name == "__init__.py" and own in PACKAGES:
            continue
        for module, _ in imports(parse(path)):
            if module.split(".")[0] in PACKAGES and room(module) != own:
                found.setdefault(own, set()).add(room(module))
    return found


def test_architecture_shows_these_imports():
    found = imports_of_rooms()
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)` \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    shown = {room: set(re.findall(r"[\w/]+", names)) for room, names in rows}
    rooms = {str(path.parent.relative_to(ROOT)) for path in SOURCES} - {"attention"}
    assert shown == {**{room: set() for room in rooms}, **found}
    # There is no circle.
    list(graphlib.TopologicalSorter(found).static_order())


def test_helpers_of_tests_have_one_name():
    """Under a second one (`helpers`) their classes would be registered again."""
    paths = list((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in paths}
    for path in paths:
        for module, _ in imports(parse(path)):
            assert module not in names, f"{path.name}: import tests.{module}"


def test_files_stay_readable():
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_all_names_are_there_and_documented():
    for name in attention.__all__:
        assert getattr(attention, name).__doc__, name
