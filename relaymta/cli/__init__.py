"""The command line: `relaymta VERB`. Every reading verb has --json."""

import click

from relaymta import __version__
from relaymta.cli import account, config, dkim, doctor, message, policy, queue, route, serve, sink, site

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="relaymta")
def main() -> None:
    """A relay MTA: accepts mail by SMTP, makes it safe on disk before it replies 250, and delivers it."""


main.add_command(serve.serve)
main.add_command(sink.sink)
main.add_command(config.config)
main.add_command(queue.status)
main.add_command(queue.queue)
main.add_command(message.message)
main.add_command(route.route)
main.add_command(site.site)
main.add_command(site.shaping)
main.add_command(policy.policy)
main.add_command(policy.standing)
main.add_command(account.user)
main.add_command(account.app)
main.add_command(dkim.dkim)
main.add_command(doctor.doctor)
main.add_command(queue.reload)
