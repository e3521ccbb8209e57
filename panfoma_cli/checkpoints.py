"""Verbs over checkpoints: export, push, pull."""

from pathlib import Path
from typing import Annotated

import typer

from .outcome import say, say_json, told


app = typer.Typer(rich_markup_mode="markdown")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an older PanFoMa checkpoint.")],
    name: Annotated[str, typer.Option(help="Which of the checkpoints that come with the package.")] = "small",
) -> None:
    """Write a checkpoint that comes with the package, complete with code and tokenizer, for any from_pretrained.

    Example: panfoma export panfoma, after which AutoModel.from_pretrained("panfoma") works in that folder.
    """
    with told():
        from panfoma_hf.training import export_checkpoint

        say(export_checkpoint(name, out))


@app.command("push")
def push_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or of a PEFT adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as lab/panfoma-pancreas.")],
    private: Annotated[bool, typer.Option("--private", help="Hide a new one from others.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to publish to, made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print address and hash of the commit as JSON.")] = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, in one commit, and print its address.

    Exit code 1 if it is not complete or holds a pickle, or the Hub does not take it; nothing is published then.

    Example: panfoma push my-model lab/panfoma-pancreas --private
    """
    with told("nothing was published, unless its commit had just been made."):
        from panfoma_hf.hub import push_to_hub

        commit = push_to_hub(folder, repo_id, private=private or None, revision=revision, message=message)
    if as_json:
        say_json({"commit": commit.oid, "url": commit.commit_url})
    else:
        say(commit.commit_url)


@app.command("pull")
def pull_checkpoint(
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as lab/panfoma-pancreas.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an older PanFoMa checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or hash of a commit; the newest.")] = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face Hub, whole or not at all, and print the folder that it is in.

    Exit code 1 if it is not there, is none of PanFoMa or holds a pickle; the folder is as it was then.

    Example: panfoma pull lab/panfoma-pancreas my-model --revision v1
    """
    with told():
        from panfoma_hf.hub import pull

        say(pull(repo_id, folder, revision=revision))
