"""Verbs over corpora of pretraining: corpus build, info, push."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .outcome import say, say_json, told


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Build, inspect and publish a corpus of tokenized cells."
)


@app.command()
def build(
    sources: Annotated[Path, typer.Argument(help="Source list in YAML: studies, files, columns, labels.")],
    out: Annotated[Path, typer.Argument(help="Folder of the corpus: new, or one to bring up to date.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder that the list's paths start from; its own if left out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores if left out.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler to run on instead.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint whose tokenizer to use.")] = None,
) -> None:
    """Build a corpus from raw files, or bring it up to date: files that are finished and unchanged are not read again.

    Exit code 1 if a file cannot be read, the disk is full, or a donor or equal cells are on both sides of a split; what
    is finished stays.

    Example: panfoma corpus build sources.yaml corpus --root /data --workers 8
    """
    with told(f"what is finished stays in {out}; the same command goes on from there."):
        from transformers import AutoTokenizer

        from panfoma_hf.data.corpus import build_corpus

        built = build_corpus(
            sources,
            out,
            root=root,
            workers=workers or os.cpu_count() or 1,
            scheduler=scheduler,
            tokenizer=None if model is None else AutoTokenizer.from_pretrained(model),
        )
        say(str(built))
        say(f"\n{out / 'README.md'} is its data card")


@app.command()
def info(
    out: Annotated[str, typer.Argument(help="A corpus' folder, or its name on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare every shard with its checksum.")] = False,
) -> None:
    """Say what is in a corpus: studies, cancer types, donors, what was left out, splits.

    Exit code 1 if there is none, or a shard is not as it was written.

    Example: panfoma corpus info corpus --verify
    """
    with told():
        from panfoma_hf.data.corpus import Corpus

        opened = Corpus.open(out)
        if verify:
            opened.verify()
        if as_json:
            say_json(opened.manifest)
        else:
            say(opened)
        if verify and not as_json:
            say("\nall shards and splits are as they were written")


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="A corpus' folder.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as lab/panfoma-bench.")],
    private: Annotated[bool, typer.Option(help="Whether a new one is hidden from others.")] = False,
) -> None:
    """Publish a corpus with its data card on the Hugging Face Hub.

    Exit code 1 if it is not whole, or the Hub does not take it.

    Example: panfoma corpus push corpus lab/panfoma-bench --private
    """
    with told():
        from panfoma_hf.data.corpus import Corpus

        say(Corpus.open(out.resolve()).push_to_hub(repo_id, private=private))
