"""`tda-export serve`: serve an artifact through OpenAI's API."""

from __future__ import annotations

from pathlib import Path

import click

from tda_export.cli.deployment_options import Deployed, deployment_options
from tda_export.cli.help_groups import command, option
from tda_export.cli.options import (
    RARE_DEPLOYMENT_OPTIONS,
    artifact_argument,
    context_option,
    keep_answers_option,
    lookup_option,
)
from tda_export.errors import TdaError

PACKAGES = ("fastapi", "prometheus_client", "pydantic", "starlette", "h11", "uvicorn")  # of the extra `serve`


@command(
    rare=("allowed_host", "cors", "max_connections", "max_body", "grace", "keep_answers", *RARE_DEPLOYMENT_OPTIONS)
)
@artifact_argument
@option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. The default can be reached from this machine only.",
)
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="Accept this Host header. Repeatable.  [default: this machine's own names and --host; any name if --host is "
    "reachable from elsewhere]",
)
@option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Accept requests from pages of this site, such as https://example.org; '*' is every site. Repeatable.",
)
@option("--name", help="Name of the model in the API.  [default: the artifact's folder]")
@option(
    "--queue", type=click.IntRange(0), default=64, show_default=True, help="Maximum waiting requests; others get a 503."
)
@option(
    "--max-connections",
    type=click.IntRange(1),
    help="Maximum open connections; beyond that, the one idle longest is closed.  [default: 1000, or what file "
    "descriptors allow]",
)
@option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Maximum tokens of an answer.  [default: the context; 1024 for a chat request without a number]",
)
@option(
    "--max-body", type=click.IntRange(1), default=1 << 20, show_default=True, help="Maximum bytes of a request's body."
)
@option(
    "--grace",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds for answers to finish after Ctrl-C or SIGTERM.",
)
@context_option
@deployment_options
@keep_answers_option
@lookup_option
def serve(
    artifact: Path,
    host: str,
    port: int,
    allowed_host: tuple[str, ...],
    cors: tuple[str, ...],
    name: str | None,
    queue: int,
    max_connections: int | None,
    max_new_tokens: int | None,
    max_body: int,
    grace: int,
    context: int | None,
    deployed: Deployed,
    keep_answers: bool,
    lookup: int,
) -> None:
    """Serve ARTIFACT through OpenAI's chat and completions API, with streaming.

    One request runs at a time, in order of arrival. With prices, a request may give its own budget in one of the
    fields price, sparsity and max_kl. /v1/models lists the model, /health is for load balancers, /metrics for
    Prometheus. There is no authentication: put a proxy in front if others can reach the server.
    """
    from tda_export.runtime.lookup import check_lookup

    try:
        from tda_export.serve.access import make_access
        from tda_export.serve.app import create_app
        from tda_export.serve.connections import most_connections
        from tda_export.serve.metrics import ServerMetrics
        from tda_export.serve.orders import Limits
        from tda_export.serve.run import Server, is_loopback, listen, url
        from tda_export.serve.worker import Worker
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise TdaError(
            f'serve needs {package}, which is not installed. Install it: pip install "tda-export[serve]"'
        ) from error

    check_lookup(lookup)
    with listen(host, port) as opened:
        access = make_access(host=host, loopback=is_loopback(opened), allowed_hosts=allowed_host, origins=cors)
        model, deployment = deployed.load(artifact, keep_answers=keep_answers)
        context = model.check_context(context)
        worker = Worker(
            model,
            queue_size=queue,
            context=context,
            mask=deployed.mask,
            deployment=deployment,
            metrics=ServerMetrics(),
            keep_answers=keep_answers,
            lookup=lookup,
        )
        name = name or artifact.resolve().name
        app = create_app(worker, name, Limits(body_bytes=max_body, new_tokens=max_new_tokens), access)
        server = Server(app, worker, grace, most_connections(max_connections))
        if not is_loopback(opened):
            click.echo(f"Anyone who can reach {url(opened)} can use it: there is no authentication.", err=True)
        click.echo(f"Serving {name} on {url(opened)}/v1. Ctrl-C stops.", err=True)
        server.run(sockets=[opened])
