"""``cogview push``: publish a checkpoint folder on the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Check a checkpoint or adapter folder, push it to the Hugging Face Hub as one commit, and print the commit's "
        "address. The repository and the branch are created if needed. Run hf auth login or set HF_TOKEN first."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkpoint or adapter folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to push to (default: main)")
    parser.add_argument("--commit-message", metavar="TEXT", help="(default: Upload FOLDER with cogview VERSION)")


def run(args: argparse.Namespace) -> int:
    """Push and print the address of the commit."""
    from cogview.checkpoints.hub import push_folder

    address = push_folder(
        args.folder,
        args.name,
        revision=args.revision,
        private=args.private,
        commit_message=args.commit_message,
    )
    print(address)
    return 0
