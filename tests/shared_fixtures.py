"""What all tests share: models and tokenizers of the demo, quiet libraries, one thread."""

import gc
import os

import pytest
import torch
from hypothesis import settings
from moved_clock import at_once, clock  # noqa: F401
from packages import or_skip
from programs import Programs
from same_samples import Tape
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bench import texts
from simct.demo import ASSETS
from simct.training import plots

pytest.register_assert_rewrite("served_answers", "served_contract")
# The models are tiny, and waiting threads cost more than they bring on a busy machine.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
settings.register_profile("suite", deadline=None)  # on a busy machine an example takes as long as it takes
settings.load_profile("suite")
logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_collection_finish():
    """Trainers collect garbage at their start and end: half a second over the objects of modules, which are none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def no_garbage_of_others():
    """And a tenth of a second or more over what the tests before have left: session fixtures, modules imported on the way."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def demo_tokenizers():
    return tuple(AutoTokenizer.from_pretrained(ASSETS / name) for name in ("student", "teacher"))


@pytest.fixture(scope="session")
def demo_teacher():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "teacher", dtype=torch.float32)


@pytest.fixture
def demo_student():
    """A fresh copy: tests train it."""
    return AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32)


@pytest.fixture(scope="session")
def programs():
    with Programs() as programs:
        yield programs


@pytest.fixture
def tape(monkeypatch):
    return Tape(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def without_pictures():
    """Drawing them is two thirds of what a short `simct train` does; a test that looks at them asks for `pictures`."""
    drawing = {name: getattr(plots, name) for name in ("plot_curves", "plot_phases")}
    with pytest.MonkeyPatch.context() as patch:
        for name in drawing:
            patch.setattr(plots, name, lambda *_: None)
        yield drawing


@pytest.fixture
def pictures(without_pictures, monkeypatch):
    for name, draw in without_pictures.items():
        monkeypatch.setattr(plots, name, draw)


@pytest.fixture
def gpu(request, tmp_path_factory):
    """A pretended one, see `pretended_gpu.py`."""
    from pretended_gpu import load_guard, pretended_gpu

    from simct import SimCTConfig

    cache = getattr(request.config, "cache", None)
    load_guard(tmp_path_factory.getbasetemp() if cache is None else cache.mkdir("pretended-gpu"))
    with pretended_gpu(SimCTConfig) as gpu:
        yield gpu


@pytest.fixture(scope="session")
def qwen():
    return or_skip(texts.qwen)


@pytest.fixture(scope="session")
def deepseek():
    return or_skip(texts.deepseek)
