from tests.report.conftest import make_evaluation, make_info, make_stats  # noqa: F401
