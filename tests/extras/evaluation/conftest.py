"""What is evaluated, and tasks in the harness's format, kept out of the user's caches, without its slow notes."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_cache(tmp_path_factory):
    from sparsefw.extras.evaluation import harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # Two seconds of programs that describe the machine.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        # The harness takes seconds to look at all of its own tasks.
        patch.setattr(harness.Tasks.__init__, "__defaults__", (False,))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of the tasks."""
    from helpers.tasks import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def manager(tasks):
    """The harness's own manager of tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture
def place(pruned):
    """A folder with a dense model, a text, and the output of a run, which nobody may change."""
    from helpers.pages import REPORTED

    return pruned(*REPORTED)[1].parent
