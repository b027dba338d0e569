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
    out = capsys.readouterr().out
    assert out.startswith("[12 10]\nonce upon a time")
    # The session: 5 + 1 + 9 tokens were absorbed; 5 + 6 + 9 + 6 - 4 are left.
    assert out.endswith("15 22\n")
    assert namespace["text"].startswith("to be")
    assert len(namespace["texts"]) == 3
    assert namespace["state"].cache_update_index[0] == 17


def test_the_two_commands_are_there():
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    run, test = (command.strip() for command in commands)
    assert run.endswith("python examples/swap_attention.py") and "\n" not in run
    assert test.endswith("python -m pytest") and "\n" not in test
