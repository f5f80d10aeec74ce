"""README and the documents that it leads to, tried out: every command, config and Python block, in order, on tiny models.

Not run: `pip install` (the package under test is installed already), and what takes minutes (`tests/benchmarks`, `make demo`).
Of these it is checked that they exist and know their options. `--cuda` is left out, but where the pretend device of `test_device`
stands in for it; `torchrun` and `accelerate` are slow tests.
"""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from commands import finish, fresh
from mergekit.config import MergeConfiguration
from mergekit.scripts import multimerge, run_yaml
from merging import forget_checkpoints
from standins import make_standin, make_standins

from mergekit_pave import cache as caches
from mergekit_pave.cli import main
from mergekit_pave.config import PaveConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    ROOT / name: (ROOT / name).read_text()
    for name in ("README.md", "examples/README.md", "tests/benchmarks/README.md", "tests/architectures.md")
}
# By what a command begins with: how it is run in this process, where it can be.
IN_PROCESS = {"mergekit-pave": main, "mergekit-yaml": run_yaml.main, "mergekit-multi": multimerge.main}
LAUNCHERS = ("torchrun", "accelerate")
ON_DEVICE = "PRETEND_DEVICE" in os.environ
LEFT_OUT = () if ON_DEVICE else ("--cuda",)


def blocks(language: str) -> list[str]:
    text = "\n".join(DOCUMENTS.values())
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The words of every command, without comments."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def configs() -> Iterator[dict]:
    """Every config; of a part of one, the first config with this part put into it."""
    first: dict = {}
    for block in blocks("yaml"):
        given = yaml.safe_load(textwrap.dedent(block))
        first = first or given
        if given.keys() <= MergeConfiguration.model_fields.keys():
            yield given if "models" in given else first | given
        elif given.keys() <= PaveConfig.model_fields.keys():
            yield first | {"pave": first["pave"] | given}
        else:
            pytest.fail(f"what are these keys part of? Teach tests/test_readme.py:\n{block}")


@pytest.fixture
def workplace(tmp_path, monkeypatch, cache):
    """The current directory, with README's first config and everything that its configs name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.repo_exists", lambda *args, **kwargs: True)  # mergekit asks for its card
    for config in configs():
        make_standins(config)
    # Of the few rows that there are, some are left to score with.
    Path("config.yml").write_text(f"{blocks('yaml')[0]}  calibration: {{samples: 4}}\n")
    purified = yaml.safe_load(Path("config.yml").read_text())
    purified["pave"] |= {"purify": True, "refine": False}
    Path("purified.yml").write_text(yaml.safe_dump(purified | {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}))
    shared = purified | {"merge_method": "emr"}
    del shared["pave"]
    Path("emr.yml").write_text(yaml.safe_dump(shared))
    return tmp_path


def invoke(words: list[str]) -> None:
    forget_checkpoints()
    result = CliRunner().invoke(IN_PROCESS[words[0]], [word for word in words[1:] if word not in LEFT_OUT])
    assert result.exit_code == 0, (shlex.join(words), result.output[-2000:], result.exception)


def test_every_block_is_of_a_known_kind():
    known = {"sh", "yaml", "python", ""}
    for text in DOCUMENTS.values():
        opening = set(re.findall(r"^ *(?:```|~~~)(.*)$", text, re.MULTILINE)[::2])
        assert opening <= known, f"tests/test_readme.py does not know how to try out {opening - known}"
    assert blocks("sh") and blocks("yaml") and blocks("python")


def test_configs(workplace):
    found = list(configs())
    for i, config in enumerate(found):
        Path(f"{i}.yml").write_text(yaml.safe_dump(config))
        invoke(["mergekit-pave", "plan", f"{i}.yml"])
    assert len(found) == len(blocks("yaml"))


def test_commands(workplace):
    """In the order of README, as each needs what those before it have made."""
    run = 0
    for words in commands():
        if words[:2] == ["pip", "install"]:
            project = (ROOT / "pyproject.toml").read_text()
            for name in words[2:]:
                package, _, extra = name.rstrip("]").partition("[")
                assert f'\nname = "{package}"\n' in project and (not extra or f"\n{extra} = [" in project), words
        elif words[1:] == ["doctor"] and ON_DEVICE:
            continue  # it asks a process of its own, which has no such device
        elif words[0] in IN_PROCESS:
            invoke([real_key(word, words) for word in words])
            run += 1
        elif words[0] in (*LAUNCHERS, "hf"):
            assert (Path(sys.executable).parent / words[0]).exists(), words  # test_launchers runs it
        elif words[0] == "python" and words[1].startswith("tests/benchmarks/"):
            benchmark = ROOT / words[1]
            source = (benchmark / "__main__.py" if benchmark.is_dir() else benchmark).read_text()
            assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--")), words
        elif words[0] == "python" and words[1].startswith("examples/"):
            assert (ROOT / words[1]).is_file(), words  # test_examples runs it
        else:
            pytest.fail(f"README has a command that tests/test_readme.py does not know how to run: {shlex.join(words)}")
    assert run >= 9


def real_key(word: str, words: list[str]) -> str:
    """README names a key of a cache that is not this one: what is removed may not be needed again."""
    if not re.fullmatch("[0-9a-f]{8}", word):
        return word
    kind = "subspace" if "remove" in words else "covariance"
    return next(entry.key for entry in caches.entries(caches.cache_root(None)) if entry.kind == kind)[: len(word)]


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: re.findall(r"\w+", block)[-1])
def test_python(workplace, block):
    for name in re.findall(r'"(\w+/[\w.-]+)"', block):
        make_standin(name)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in commands() if words[0] in LAUNCHERS], ids=lambda words: words[0])
def test_launchers(workplace, words):
    done = finish(fresh(*(word for word in words if word != "--cuda")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights ready") == 1
    assert done.stderr.count("to be calibrated") == len(yaml.safe_load(blocks("yaml")[0])["models"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_what_the_text_names_is_there(document):
    """Commands, targets, folders and links within the text."""
    text = re.sub(r"^```.*?^```", "", DOCUMENTS[document], flags=re.MULTILINE | re.DOTALL)
    spoken = re.findall(r"`([^`\n]+)`", text)
    for words in (code.split() for code in spoken):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        if words[0] == "mergekit-pave" and len(words) > 1:
            assert words[1] in main.list_commands(None), words
    for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        target = (document.parent / link).resolve() if link else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(DOCUMENTS[target]), (link, anchor)
    for name in re.findall(r"`(?:tests|examples)/[\w/.-]*`", text):
        assert (ROOT / name.strip("`")).exists(), name


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_readme_is_short():
    lines = DOCUMENTS[ROOT / "README.md"].splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 200
