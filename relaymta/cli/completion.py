"""`relaymta completion`: the scripts by which shells complete verbs, options and their values (all but bash's are click's)."""

import os
from typing import ClassVar

import click
from click.shell_completion import BashComplete, ShellComplete, add_completion_class, get_completion_class, split_arg_string

from relaymta.cli import COMPLETE, main
from relaymta.cli.console import say
from relaymta.cli.options import Configuration, configured

__all__ = ["completion"]

PROGRAM = "relaymta"
SHELLS = ["bash", "fish", "zsh"]

BASH = """\
# bash completion for %(prog_name)s
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_WORDS="${COMP_LINE:0:COMP_POINT}" %(complete_var)s=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class _Bash(BashComplete):
    """As click's, but it gets the line as it was typed: bash makes three words of "a=b" and of "host:25"."""

    source_template: ClassVar[str] = BASH

    def source(self) -> str:
        """The script. Which bash there is here is not looked at: a package is built elsewhere."""
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words in front of the cursor, and the one that is to be completed."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        last = words.pop() if words and not line[-1:].isspace() else ""
        return words, last


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@configured
def completion(read: Configuration, shell: str) -> None:
    """Print the script by which a shell completes verbs and options. Where to put it: docs/cli.md."""
    found = get_completion_class(shell)
    assert found is not None
    say(*found(main, {}, PROGRAM, COMPLETE).source().removesuffix("\n").split("\n"))
