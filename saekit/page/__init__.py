"""`saekit report`: what was learned, on one page of HTML that needs no network."""

from saekit.page.build import build_report

__all__ = ["build_report"]
