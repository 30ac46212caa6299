"""`saekit doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, for a bug report; no token is in it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback when a check itself goes wrong, and stop there.")
    ] = False,
) -> None:
    """Look at this machine: versions, devices, ranks, 8 bits, hub, resources; what will not work, and what mends it."""
    from saekit.cli.output import EXIT_FAULT, messages, results

    with messages().status("Looking at this machine"):
        from saekit.doctor import can_train, diagnose, findings_to_json
        from saekit.views.doctor import render_findings

        findings = diagnose(debug=debug)
    if as_json:
        typer.echo(json.dumps(findings_to_json(findings), indent=2))
    else:
        render_findings(findings, results())
    if not can_train(findings):
        raise typer.Exit(EXIT_FAULT)
