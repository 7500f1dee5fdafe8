"""Tasks in the format of lm-evaluation-harness, kept out of the user's caches, and without the harness's slow notes."""

import datasets
import lm_eval.evaluator
import pytest
from helpers.tasks import write_tasks
from lm_eval.tasks import TaskManager


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
