import threading
from contextlib import suppress

import pytest

from simct.commands.answers import AnswerArguments, write_answers
from simct.demo import ASSETS
from simct.rollouts.vllm_server import ServedVLLM

from .conftest import MAX_MODEL_LEN, VOCABULARY, greedy, plain, take_steps
from .engine_contract import EngineContract
from .test_training import check_equal, trained

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(server_url):
    return ServedVLLM(server_url, vocab_size=VOCABULARY, max_model_len=MAX_MODEL_LEN, timeout=120)


class TestServed(EngineContract):
    samples = 600  # a request each


def test_another_vocabulary_is_refused(server_url):
    with pytest.raises(ValueError, match="has token id 2000, the student has 2000 token ids"):
        ServedVLLM(server_url, vocab_size=2000)
    with pytest.raises(ValueError, match="has not token id 4095, the student has 4096 token ids"):
        ServedVLLM(server_url, vocab_size=4096)


def test_too_short_a_context_is_refused(server_url):
    with pytest.raises(ValueError, match=rf"is {MAX_MODEL_LEN}.*--max-model-len 512"):
        ServedVLLM(server_url, max_model_len=512)


def test_an_unknown_model_name_is_refused(server_url):
    with pytest.raises(ValueError, match="model_name is 'other': expected one that .* serves, teacher"):
        ServedVLLM(server_url, model_name="other")


def test_a_server_left_paused_goes_on(server_url, engine, student, prompts, sampling):
    engine.post("/pause?mode=wait")
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


def test_a_tied_head_that_stays_old_is_found(server_url, student, engine, prompts, sampling):
    """By `reload_weights` vLLM without a GPU keeps the packed copy of the old head; by its own routes, with our engine in it, it
    does not."""
    take_steps(student, steps=10)
    plainly = ServedVLLM(server_url)
    plainly.transfer = None
    with pytest.raises(RuntimeError, match="took the student's weights, but its log-probabilities of .* tokens are"):
        plainly.update_weights(student)
    engine.update_weights(student)
    settings = sampling(temperature=0.0)
    assert plain(engine.generate(prompts, settings, seed=0)) == greedy(student, prompts, settings)


def test_greedy_training_runs_agree(tmp_path, tied_folder, server_url, programs):
    sides = {"teacher": ASSETS / "student"}
    urls = {"vllm_server_url": server_url, "vllm_sync_dir": str(tmp_path / "sync")}
    served = trained(programs, tmp_path, tied_folder, "vllm-server", **sides, **urls)
    check_equal(served, trained(programs, tmp_path, tied_folder, "static", **sides))


def test_answers_are_the_served_models(tmp_path, engine, student, server_url, tied_folder):
    """`simct answers`, greedy: the same from a server as from transformers."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join((ASSETS / "train.jsonl").read_text().splitlines(keepends=True)[:6]))
    given = dict(samples=1, max_new_tokens=24, temperature=0.0, top_p=1.0, dtype="float32", keep="shortest")
    for name in "static", "vllm-server":
        url = server_url if name == "vllm-server" else None
        output = str(tmp_path / f"{name}.jsonl")
        counts = write_answers(
            AnswerArguments(str(tied_folder), str(data), output, rollout_engine=name, vllm_server_url=url, **given)
        )
    assert counts["kept_unchecked"]
    assert (tmp_path / "static.jsonl").read_bytes() == (tmp_path / "vllm-server.jsonl").read_bytes()


def test_weights_that_do_not_fit_are_reported(engine, student, demo_student):
    unchecked = ServedVLLM(engine.base_url)
    with pytest.raises(RuntimeError, match="/update_weights answered 500"):
        unchecked.update_weights(demo_student)
    with suppress(RuntimeError):  # vLLM is still in the middle of what failed, and gives that up
        engine.update_weights(student)
    engine.update_weights(student)
