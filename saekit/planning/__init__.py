"""What a run will cost before it is started: memory by placement, from the model's config alone."""

from saekit.planning.machine import Machine, describe, detect
from saekit.planning.plan import Choice, Plan, make_plan
from saekit.planning.view import render, to_json

__all__ = ["Choice", "Machine", "Plan", "describe", "detect", "make_plan", "render", "to_json"]
