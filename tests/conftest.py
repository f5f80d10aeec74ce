"""Where tests keep their files, the models they merge, and the two ways to run a merge: in process and as a command."""

import importlib
import os
import shutil
import tempfile

# Before any import of Hugging Face libraries, which read these once.
_HOME = tempfile.mkdtemp(prefix="pave-tests-")
os.environ |= {
    "HF_HOME": f"{_HOME}/hf",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MERGEKIT_PAVE_CACHE": f"{_HOME}/pave-cache",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from models import Family, make_family  # noqa: E402

from mergekit_pave.plugin import wrap  # noqa: E402
from mergekit_pave.report.page.picture import draw_ranks  # noqa: E402

torch.set_num_threads(1)
for _module in ("cache", "doctor", "plan", "restore", "score", "tune"):  # before a test pretends that mergekit lacks something
    importlib.import_module(f"mergekit_pave.cli.{_module}")
if os.environ.get("PRETEND_DEVICE"):  # any test can be run on it; tests/test_device.py does so with some
    import pretend_device

    pretend_device.register()
    pretend_device.take_all_merges()

    @pytest.fixture(autouse=True)
    def nothing_is_left_on_the_device(undrawn):
        with pretend_device.all_freed():
            yield


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_card_pictures():
    """A model card gets no picture, which takes longer than the tiny merge before it, unless `card_pictures` is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrap, "draw_ranks", lambda *_: None)
        yield


@pytest.fixture
def card_pictures(monkeypatch):
    monkeypatch.setattr(wrap, "draw_ranks", draw_ranks)


@pytest.fixture
def undrawn(monkeypatch):
    """The plots of a page are made, but not drawn, which takes most of its time."""
    from mergekit_pave.report.page import document

    monkeypatch.setattr(document, "png", lambda plot: b"")
    monkeypatch.setattr(document, "svg", lambda plot: "<svg/>")


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> dict[str, Family]:
    """The models of each architecture. Shared by all tests: nobody may write there."""
    return {kind: make_family(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "gpt2", "bert")}


@pytest.fixture
def llama(families) -> Family:
    return families["llama"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A PAVE cache of the test's own, also for commands that it starts."""
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
