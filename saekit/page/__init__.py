"""`saekit report`: what was learned, on one page of HTML that needs no network."""

from saekit.page.build import ReportOptions, build_report

__all__ = ["ReportOptions", "build_report"]
