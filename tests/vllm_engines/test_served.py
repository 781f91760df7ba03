import threading
from contextlib import suppress

import pytest

from simct.rollouts.vllm_server import ServedVLLM

from .conftest import MAX_MODEL_LEN, greedy, plain
from .engine_contract import EngineContract
from .test_training import check_equal, trained

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(server_url):
    return ServedVLLM(server_url, vocab_size=2048, max_model_len=MAX_MODEL_LEN, timeout=120)


class TestServed(EngineContract):
    pass


def test_another_vocabulary_is_refused(server_url):
    with pytest.raises(ValueError, match="has token id 2000, the student has 2000 token ids"):
        ServedVLLM(server_url, vocab_size=2000)
    with pytest.raises(ValueError, match="has not token id 4095, the student has 4096 token ids"):
        ServedVLLM(server_url, vocab_size=4096)


def test_too_short_a_context_is_refused(server_url):
    with pytest.raises(ValueError, match=rf"is {MAX_MODEL_LEN}.*--max-model-len 512"):
        ServedVLLM(server_url, max_model_len=512)


def test_an_unknown_model_name_is_refused(server_url):
    with pytest.raises(ValueError, match="model_name is 'other': expected one that .* serves, student"):
        ServedVLLM(server_url, model_name="other")


def test_a_server_left_paused_goes_on(server_url, engine, student, prompts, sampling):
    engine._post("/pause?mode=wait")
    with pytest.warns(UserWarning, match="left paused"):
        again = ServedVLLM(server_url)
    settings = sampling(temperature=0.0)
    assert plain(again.generate(prompts, settings, seed=0)) == greedy(student, prompts, settings)


def test_files_of_weights_are_read_from_the_given_folder_and_removed(
    engine, server_url, student, prompts, sampling, tmp_path
):
    folder = tmp_path / "deep" / "sync"
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            with suppress(FileNotFoundError):  # it goes while it is looked at
                seen.extend(path.name for path in folder.glob("*/update-*/*.safetensors"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ServedVLLM(server_url, sync_folder=folder).update_weights(student)
    finally:
        done.set()
        watcher.join()
    assert set(seen) == {"weights-00000.safetensors"} and not list(folder.iterdir())
    settings = sampling(temperature=0.0)
    assert plain(engine.generate(prompts, settings, seed=0)) == greedy(student, prompts, settings)


def test_greedy_training_runs_agree(tmp_path, student_folder, server_url):
    served = trained(
        tmp_path, student_folder, "vllm-server", vllm_server_url=server_url, vllm_sync_dir=str(tmp_path / "sync")
    )
    check_equal(served, trained(tmp_path, student_folder, "static"))


def test_weights_that_do_not_fit_are_reported(engine, demo_teacher):
    """The last test here: it ends the server."""
    unchecked = ServedVLLM(engine.base_url)
    with pytest.raises(RuntimeError, match="/collective_rpc answered 500"):
        unchecked.update_weights(demo_teacher)
