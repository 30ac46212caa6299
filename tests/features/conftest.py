from tests.evaluation.conftest import demo_run  # noqa: F401
