"""`tda-export serve`: an artifact behind OpenAI's API."""

from __future__ import annotations

from pathlib import Path

import click

from tda_export.cli.options import Deployed, artifact_argument, context_option, deployment_options
from tda_export.errors import TdaError

PACKAGES = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")  # of the extra


@click.command()
@artifact_argument
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; only this machine reaches the default.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Name of the model in the API.  [default: the artifact's folder]")
@click.option(
    "--queue", type=click.IntRange(0), default=64, show_default=True, help="Most requests that wait; more get a 503."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Most tokens of an answer.  [default: what the context holds, and 1024 where a chat gives no number]",
)
@click.option(
    "--max-body", type=click.IntRange(1), default=1 << 20, show_default=True, help="Most bytes of a request's body."
)
@click.option(
    "--grace",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that answers have to end on Ctrl-C or a termination request.",
)
@context_option
@deployment_options
def serve(
    artifact: Path,
    host: str,
    port: int,
    name: str | None,
    queue: int,
    max_new_tokens: int | None,
    max_body: int,
    grace: int,
    context: int | None,
    deployed: Deployed,
) -> None:
    """Serve ARTIFACT by OpenAI's chat and completions API, with streaming.

    One model, one answer at a time, in order of arrival. /v1/models lists it, /health says whether it answers,
    /metrics is for Prometheus. There is no authentication: put a proxy in front of it where others can reach it.
    """
    try:
        from tda_export.serve.app import Limits, create_app
        from tda_export.serve.metrics import ServerMetrics
        from tda_export.serve.run import Server, is_loopback, listen, url
        from tda_export.serve.worker import Worker
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in PACKAGES:
            raise
        raise TdaError(
            f'serve needs {error.name}, which is not installed. Install it: pip install "tda-export[serve]"'
        ) from error

    with listen(host, port) as opened:
        model, deployment = deployed.load(artifact)
        context = model.check_context(context)
        worker = Worker(
            model,
            queue_size=queue,
            context=context,
            mask=deployed.mask,
            deployment=deployment,
            metrics=ServerMetrics(),
        )
        name = name or artifact.resolve().name
        app = create_app(worker, name, Limits(body_bytes=max_body, new_tokens=max_new_tokens))
        if not is_loopback(opened):
            click.echo(f"Whoever can reach {url(opened)} can use it: there is no authentication.", err=True)
        click.echo(f"Serving {name} on {url(opened)}/v1. Ctrl-C stops.", err=True)
        Server(app, worker, grace).run(sockets=[opened])
