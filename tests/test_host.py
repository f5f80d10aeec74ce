"""A later mergekit whose inside has changed, or which has merge methods of the same names as ours."""

import ast
import functools
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import command
from mergekit import merge_methods
from mergekit.merge_methods import registry
from merging import config_for, invoke, merge, write_config
from reference import weights

import mergekit_pave
from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.hook import host
from mergekit_pave.methods import registry as _methods

NAMES = [(place, name) for place, names in host.PARTS.items() for name in names.split()]


def take_away(monkeypatch, holder, name):
    """What a release does that drops a name."""
    if not isinstance(holder, type):
        return monkeypatch.delattr(holder, name)
    for owner in holder.__mro__:
        monkeypatch.delitem(owner.__dict__.get("__pydantic_fields__", {}), name, raising=False)
        monkeypatch.delitem(vars(owner).get("__annotations__", {}), name, raising=False)
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
        code = getattr(vars(owner).get("__init__"), "__code__", None)
        if code and name in code.co_names:
            monkeypatch.setattr(owner, "__init__", lambda self: None)


def test_this_mergekit_has_everything():
    assert host.missing() == [] and host.problem() is None


def test_everything_that_is_imported_is_looked_for():
    for path in Path(mergekit_pave.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and re.match(r"mergekit\.", node.module):
                names = {alias.name for alias in node.names}
                assert names <= set(host.PARTS.get(node.module, "").split()), f"{path.name}: {node.module}"


def test_nothing_is_looked_for_that_is_not_used():
    """Every name in the tables occurs in the code outside of them."""
    used = set()
    for path in Path(mergekit_pave.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "host.py" else ():
            used |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name")}
            used |= {str(node.value)} if isinstance(node, ast.Constant) else set()
    called = [place.replace(":", ".").rpartition(".")[2] for place in host.CALLS]
    assert {name for _, name in NAMES} | {*called} <= used


@pytest.mark.parametrize(("place", "name"), NAMES)
def test_what_is_gone_is_named(place, name, monkeypatch):
    take_away(monkeypatch, host._find(place), name)
    assert f"{place.replace(':', '.')}.{name} is missing" in host.missing()


@pytest.mark.parametrize(("place", "names"), host.CALLS.items())
def test_arguments_that_changed_are_named(place, names, monkeypatch):
    call = host._find(place)
    own = [one for one in inspect.signature(call).parameters.values() if one.kind is not one.VAR_KEYWORD]
    last = names.split()[-1]

    def now_takes(*parameters):
        changed = inspect.Signature([*sorted(parameters, key=lambda one: (one.kind, one.default is not one.empty))])
        if isinstance(call, type):
            return monkeypatch.setattr(call, "__signature__", changed, raising=False)
        holder, _, name = place.replace(":", ".").rpartition(".")
        module, _, path = place.partition(":")
        holder = host._find(f"{module}:{path.rpartition('.')[0]}" if "." in path else module)
        stand_in = functools.partial(call)
        stand_in.__signature__ = changed
        monkeypatch.setattr(holder, name, stand_in)

    now_takes(*[one.replace(name="renamed") if one.name == last else one for one in own])
    shown = place.replace(":", ".")
    assert {f"{shown} takes no argument {last}", f"{shown} needs an argument renamed"} & set(host.missing())
    now_takes(*own, inspect.Parameter("more", inspect.Parameter.KEYWORD_ONLY))
    assert f"{shown} needs an argument more" in host.missing()
    now_takes(*own, inspect.Parameter("more", inspect.Parameter.KEYWORD_ONLY, default=None))
    assert host.missing() == []


def test_a_block_is_refused_by_name_and_nothing_else_is(llama, tmp_path, monkeypatch):
    monkeypatch.delattr("mergekit.io.tasks.LoaderCache.setup")
    monkeypatch.setitem(host.PARTS, "mergekit.io.tasks:LoaderCache", "setup")
    refused = invoke(config_for(llama, {}), tmp_path / "out")
    assert refused.exit_code == 1 and isinstance(refused.exception, SystemExit)
    assert "mergekit.io.tasks.LoaderCache.setup is missing" in refused.output
    assert len(refused.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    with pytest.raises(PaveError, match=r"LoaderCache\.setup is missing"):
        mergekit_pave.register()
    path = write_config(config_for(llama, merge_method="regmean"), tmp_path / "config.yml")
    planned = CliRunner().invoke(main, ["plan", str(path)])
    assert planned.exit_code == 1 and "LoaderCache.setup is missing" in planned.output


# Put before any command: modules of mergekit have another source, as in a later release.
LATER = """
import importlib.abc, importlib.machinery, sys
CHANGES = {changes!r}

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        text = self.get_data(self.path).decode()
        for old, new in CHANGES[name].items():
            assert old in text
            text = text.replace(old, new)
        return compile(text, self.path, "exec")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Loader(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def later(tmp_path, monkeypatch):
    """Makes mergekit another one for the commands that are started."""

    def change(**changes):
        (tmp_path / "sitecustomize.py").write_text(LATER.format(changes=changes["changes"]))
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
        monkeypatch.setenv("PYTHONPATH", path)

    return change


def test_commands_with_a_later_mergekit(llama, tmp_path, later):
    """A private attribute and an argument have other names: all that has no block works as ever."""
    later(changes={"mergekit.plan": {"self._tensors": "self._planned", " _tensors:": " _planned:", "cfg_reader": "reader"}})
    plain = write_config(config_for(llama), tmp_path / "plain.yml")
    block = write_config(config_for(llama, {}), tmp_path / "block.yml")
    merged = command("mergekit-yaml", plain, tmp_path / "plain")
    refused = command("mergekit-yaml", block, tmp_path / "out")
    planned = command("mergekit-pave", "plan", block)
    doctor = command("mergekit-pave", "doctor")
    assert merged.returncode == 0, merged.stderr
    now = weights(tmp_path / "plain")
    before = merge(config_for(llama), tmp_path / "before")
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    for done in (refused, planned, doctor):
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert "mergekit.plan.MergePlanner._tensors is missing" in line, done.stdout + done.stderr
        assert "MergePlanner.plan_tensor takes no argument cfg_reader" in line
        assert "pip install 'mergekit==0.1.5'" in line
    assert not (tmp_path / "out").exists()
    assert "NOT HONOURED" in doctor.stdout and "NOT USABLE" in doctor.stdout


def test_commands_where_our_own_modules_cannot_be_imported(llama, tmp_path, later):
    """What they import has another name."""
    renamed = {"MultiGPUExecutor": "ParallelExecutor"}
    later(changes={"mergekit.multigpu_executor": renamed, "mergekit.merge": renamed})
    block = write_config(config_for(llama, {}), tmp_path / "block.yml")
    plain = write_config(config_for(llama), tmp_path / "plain.yml")
    merged = command("mergekit-yaml", plain, tmp_path / "plain")
    assert merged.returncode == 0, merged.stderr
    for words in (("mergekit-yaml", block, tmp_path / "out"), ("mergekit-pave", "plan", block), ("mergekit-pave", "doctor")):
        done = command(*words)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "mergekit.multigpu_executor.MultiGPUExecutor is missing" in done.stderr.strip().splitlines()[-1]


FOREIGN = """del method
from mergekit.merge_methods.easy_define import merge_method as _make
register(_make(linear_merge.implementation, name="regmean"))
"""


@pytest.fixture
def foreign(monkeypatch):
    """mergekit has a `regmean` of its own, which averages."""
    method = merge_methods.merge_method(merge_methods.get("linear").implementation, name="regmean")
    monkeypatch.setitem(registry._METHODS, "regmean", method)
    monkeypatch.setattr(_methods, "others", {})
    _methods._log_owner.cache_clear()
    _methods.add(merge_methods)
    yield method
    _methods._log_owner.cache_clear()


def test_a_method_of_mergekits_own_is_used_and_said_to_be(llama, tmp_path, foreign, caplog):
    config = config_for(llama, merge_method="regmean", parameters={"weight": 1.0})
    del config["base_model"]
    written = merge(config, tmp_path / "out")
    assert "`merge_method: regmean` is that of mergekit here, not that of mergekit-pave" in caplog.text
    mean = merge(config | {"merge_method": "linear"}, tmp_path / "linear")
    assert all(torch.equal(written[name], mean[name]) for name in mean)
    assert caplog.text.count("not that of mergekit-pave") == 1


def test_a_block_with_such_a_method_is_planned_as_with_any_other(llama, tmp_path, foreign, caplog):
    config = config_for(llama, {}, merge_method="regmean", parameters={"weight": 1.0})
    del config["base_model"]
    written = merge(config, tmp_path / "out")
    assert "not that of mergekit-pave" in caplog.text
    report = (tmp_path / "out" / "pave_report.json").read_text()
    assert '"regmean"' not in report and "  regmean  " not in caplog.text
    purified = merge(config | {"merge_method": "linear"}, tmp_path / "linear")
    assert all(torch.equal(written[name], purified[name]) for name in purified)


def test_such_a_method_needs_nothing_of_ours(llama, tmp_path, foreign, monkeypatch):
    monkeypatch.setitem(host.PARTS, "mergekit.plan", "NoSuchThing")
    config = config_for(llama, merge_method="regmean", parameters={"weight": 1.0})
    assert merge(config, tmp_path / "out")
    with pytest.raises(PaveError, match="NoSuchThing is missing"):
        merge(config | {"merge_method": "tsv"}, tmp_path / "tsv")


def test_doctor_says_whose_a_method_is_and_what_would_ignore_a_block(later):
    renamed = {"RawPyTorchMergeConfig": "FlatMergeConfig"}
    later(changes={"mergekit.merge_methods.registry": {"del method\n": FOREIGN}, "mergekit.scripts.merge_raw_pytorch": renamed})
    doctor = command("mergekit-pave", "doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert doctor.stderr == "mergekit-pytorch would ignore a `pave:` block\n"
    assert re.search(r"methods +regmean \(that of mergekit\), tsv", doctor.stdout)
