"""Everything in README.md was run: here it is."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.strip() == "[12 10]"
    assert namespace["text"].startswith("raw")


def test_the_two_commands_are_there():
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    run, test = (command.strip() for command in commands)
    assert run.endswith("python examples/swap_attention.py") and "\n" not in run
    assert test.endswith("python -m pytest") and "\n" not in test
