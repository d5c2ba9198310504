"""``cogview push``: publish a checkpoint folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from cogview.cli.options import FILE, Command, argument


@click.command(cls=Command)
@argument("folder", type=FILE, metavar="FOLDER", help="checkpoint or adapter folder")
@argument("name", metavar="OWNER/NAME", help="repository on the Hub")
@click.option("--private", is_flag=True, help="make a new repository private")
@click.option("--revision", metavar="BRANCH", show_default="main", help="branch to push to")
@click.option(
    "--commit-message", metavar="TEXT", show_default="Upload FOLDER with cogview VERSION", help="message of the commit"
)
def command(folder: Path, name: str, private: bool, revision: str | None, commit_message: str | None) -> int:
    """Check a checkpoint or adapter folder, push it to the Hugging Face Hub as one commit, and print its address.

    The repository and the branch are created if needed. Run hf auth login or set HF_TOKEN first.
    """
    from cogview.checkpoints.hub import push_folder

    print(push_folder(folder, name, revision=revision, private=private, commit_message=commit_message))
    return 0
