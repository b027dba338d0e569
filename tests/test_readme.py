"""Runs what README.md shows, and compares what it prints with what it says."""

import ast
import contextlib
import doctest
import io
import pathlib
import re

import keras
import pytest

pytestmark = pytest.mark.same_everywhere

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def comment_after(statement, lines):
    """The comment at the end of a statement, or in the lines after it."""
    comment = re.search(r"  # (.*)", lines[statement.end_lineno - 1])
    if comment:
        return comment[1]
    rest = "\n".join(lines[statement.end_lineno :])
    return re.match(r"(# .*(\n|$))*", rest)[0].replace("# ", "").rstrip()


def run_block(block, namespace):
    """Returns pairs of what each statement printed and what is said that it prints."""
    lines, pairs = block.splitlines(), []
    for statement in ast.parse(block).body:
        code = compile(ast.Module([statement], []), "README.md", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, namespace)
        if out.getvalue():
            pairs.append((out.getvalue().rstrip(), comment_after(statement, lines)))
    return pairs


def same(printed, said):
    checker = doctest.OutputChecker()
    return checker.check_output(said, printed, doctest.ELLIPSIS)


@pytest.mark.skipif(
    keras.config.backend() == "jax", reason="takes long to compile there"
)
def test_every_python_block_prints_what_it_says():
    blocks, namespace = python_blocks(README), {}
    assert len(blocks) >= 4
    for block in blocks:
        pairs = run_block(block, namespace)
        assert pairs, f"says nothing of what it prints:\n{block}"
        for printed, said in pairs:
            assert same(printed, said), f"prints {printed!r}, not {said!r}"


@pytest.mark.parametrize(
    "code, agrees",
    [
        ("print(1 + 1)  # 2", True),
        ("print('a\\nb')\n# a\n# b\n\n# Something else.", True),
        ("print('ab' * 9)  # ab...", True),
        ("for i in (1, 2):\n    print(i, end='')  # 12", True),
        ("print(1 + 1)  # 3", False),
        ("print(1 + 1)", False),
    ],
)
def test_a_wrong_comment_is_found(code, agrees):
    assert all(same(*pair) for pair in run_block(code, {})) == agrees


def test_the_two_commands_are_there():
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    run, test = (command.strip() for command in commands)
    assert run.endswith("python examples/swap_attention.py") and "\n" not in run
    assert test.endswith("python -m pytest") and "\n" not in test


@pytest.mark.parametrize(
    "name",
    ["README.md", "ARCHITECTURE.md", "benchmarks/README.md", "examples/README.md"],
)
def test_links_lead_somewhere(name):
    """Also that the pages that a newcomer reads stay short."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    # The first page also has the table of published architectures, and three kinds of
    # models.
    assert len(text.splitlines()) <= (260 if name == "README.md" else 210)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def lines_of(name):
    """Returns the lines of a published architecture's model and of its table.

    From the class statement on; functions count where they stand, and conversions of
    tensors do not.
    """
    path = ROOT / "blocks" / "models" / f"{name}.py"
    model = found = 0
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ClassDef):
            parent = ast.unparse(statement.bases[0])
        elif isinstance(statement, ast.FunctionDef):
            parent = None
        else:
            continue
        if parent not in ("Conversion", "Plain"):
            found += statement.end_lineno - statement.lineno + 1
        if parent is not None and parent.endswith("Backbone"):
            # What follows it belongs to the table.
            model = found
    return model, found - model


def test_published_architectures_fit_on_a_screen():
    row = r"\[[^]]+\]\(blocks/models/(\w+)\.py\) \| (\S+) \+ (\d+) \|"
    said = {
        name: (int(model.replace("–", "0")), int(table))
        for name, model, table in re.findall(row, README)
    }
    # Gemma 3 with images is another name of the same.
    names = {path.stem for path in (ROOT / "blocks" / "models").glob("*.py")}
    assert said.keys() == names - {"__init__", "gemma3"}
    assert said == {name: lines_of(name) for name in said}
    # Tables of encoders and decoders have two kinds of blocks, those of encoders heads.
    assert all(model <= 80 and table <= 89 for model, table in said.values())


def test_every_example_is_described():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f"## {path.name}\n" in text, path.name
