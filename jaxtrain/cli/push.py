"""`jaxtrain push`: upload an exported model or adapter to the Hugging Face hub."""

import pathlib
from collections.abc import Sequence

from jaxtrain.cli.command import Parser
from jaxtrain.run import hub

_EXAMPLES = """\
Upload what a run exported to the Hugging Face hub:

  jaxtrain push out/lora me/my-adapter          the run's adapter, else its model
  jaxtrain push out/lora/model me/my-model --public
  jaxtrain push export/step_20 me/my-model --message="Step 20"

Log in first with `hf auth login`, or set HF_TOKEN. A repository that does not exist is
made, private unless --public is given. Read README.md in the directory, the model card,
before you upload it. training.push_to_hub does the same at the end of a run."""


def main(arguments: Sequence[str]) -> None:
    """Upload the directory, and print its address.

    Raises:
        ValueError: there is nothing to upload, or the hub cannot be written to.
    """
    parser = Parser("push", _EXAMPLES)
    add = parser.add_argument
    add("source", metavar="RUN_OR_DIR", help="an exported directory, or a run's folder")
    add("repository", metavar="OWNER/NAME", help="on the hub")
    add("--public", action="store_true", help="make a new repository public")
    add("--message", default="", help="of the commit")
    options = parser.parse(arguments)
    directory = hub.find_export(pathlib.Path(options.source).expanduser())
    hub.check(options.repository)
    address = hub.push(
        directory,
        options.repository,
        private=not options.public,
        message=options.message,
    )
    print(f"{directory}: {address}")
