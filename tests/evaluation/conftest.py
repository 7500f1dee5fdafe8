"""What is evaluated, and tasks in the harness's format, kept out of the user's caches, without its slow notes."""

import datasets
import lm_eval.evaluator
import pytest
from helpers.answering import REQUESTS
from helpers.evaluated import TEXT, pruned
from helpers.families import save_model
from helpers.tasks import write_tasks
from lm_eval.tasks import TaskManager

from sparsefw.evaluation import harness
from sparsefw.evaluation import saved as saving
from sparsefw.evaluation.answers import Budget, scores_of


@pytest.fixture(autouse=True, scope="module")
def no_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # Two seconds of programs that describe the machine.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of the tasks."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def manager(tasks):
    """The harness's own manager of tasks."""
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def only_these_tasks():
    """The harness takes seconds to look at all of its own tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.questions.__kwdefaults__, "include_defaults", False)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model, a text, and a model that was pruned."""
    folder = tmp_path_factory.mktemp("job")
    save_model(folder / "dense", "llama")
    (folder / "text.txt").write_text(TEXT)
    pruned(folder, folder / "pruned")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("answers") / "llama", "llama")


@pytest.fixture(scope="module")
def answers(llama):
    return scores_of(llama, REQUESTS, Budget())


@pytest.fixture
def often(monkeypatch):
    """Hidden states are saved behind every block."""
    monkeypatch.setattr(saving, "SECONDS", 0.0)
    monkeypatch.setattr(saving, "TIMES", 0.0)
