"""To the Hub and back: a checkpoint is published in one commit, and fetched by revision."""

import glob
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from ..tokenization import PanFoMaTokenizer
from .card import plain_card
from .folder import (
    CARD,
    CHECKPOINT_FILES,
    SETTINGS_FILES,
    HubError,
    check_complete,
    checkpoint_files,
    is_panfoma,
    read_settings,
    refuse_pickles,
    written_whole,
)


def push_to_hub(
    checkpoint: str | Path | PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PanFoMaTokenizer | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Publish a checkpoint on the Hub, complete by itself, in one commit that also removes files of an earlier one.

    Weights, configuration, tokenizer with its genes, code and card become visible together or not at all. What is there
    already is not sent again, and files of the repository that are none of a checkpoint stay. A checkpoint without a
    ``README.md`` gets a card that says what its configuration and tokenizer do. Model or tokenizer alone have a
    ``push_to_hub`` of their own, which is Transformers'.

    Parameters
    ----------
    checkpoint
        The folder of a checkpoint or of a PEFT adapter; or a model, such as `PanFoMaForCellClassification` or a
        `peft.PeftModel`, of which the adapter is published.
    repo_id
        Its name on the Hub, such as ``lab/panfoma-pancreas``; made if it is not there.
    tokenizer
        That of a model; a folder has its own.
    private
        Whether a new repository is hidden from others; None does what its owner has settled. True refuses to publish
        to one that everybody can read.
    revision
        Branch to publish to; made if it is not there. None takes the main one.
    token
        Access token; None takes the one that you logged in with.
    message
        Of the commit.

    Returns
    -------
    The commit, whose ``commit_url`` is its address and ``oid`` its hash; the last one where nothing has changed.

    Raises
    ------
    HubError
        If the checkpoint is not complete or has a pickle, the repository holds something else, or the Hub does not take
        it. There is no commit then; a repository or branch that was made for it stays, without it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = {path.name: path for path in checkpoint_files(_folder_of(checkpoint, tokenizer, Path(scratch)))}
        contents: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
        if CARD not in files:
            contents[CARD] = plain_card(next(iter(files.values())).parent).encode()
        api = HfApi(token=token)
        try:
            return _commit(api, repo_id, contents, private, revision, message or "Upload PanFoMa checkpoint")
        except HubError:
            raise
        except Exception as error:  # of the network or the Hub, from several libraries
            raise _explained(error, "The Hub must take the checkpoint", repo_id, may="write to it") from error


def _folder_of(checkpoint, tokenizer: PanFoMaTokenizer | None, scratch: Path) -> Path:
    """The folder that holds what is to be published; a model is saved to ``scratch``."""
    is_folder = isinstance(checkpoint, (str, Path))
    if is_folder != (tokenizer is None):
        raise HubError(
            "A folder has its tokenizer in it and a model needs one beside it, got "
            + ("a folder and a tokenizer, too. Leave that out." if is_folder else "a model alone. Pass `tokenizer`.")
        )
    if is_folder:
        return Path(checkpoint)
    checkpoint.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / CARD).unlink(missing_ok=True)  # PEFT's, which is a form to fill in
    return scratch


def _commit(
    api: HfApi,
    repo_id: str,
    contents: dict[str, str | bytes],
    private: bool | None,
    revision: str | None,
    message: str,
) -> CommitInfo:
    """Publish contents, by name, in place of the files of an earlier checkpoint."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        state, is_new_branch = api.model_info(repo_id, revision=revision), False
    except RevisionNotFoundError:
        state, is_new_branch = api.model_info(repo_id), True
    if private and not state.private:
        raise HubError(
            f"What is private must not be published to where everybody can read it, got {repo_id}, which is public. "
            "Choose another name, or make it private in its settings first."
        )
    there = [file.rfilename for file in state.siblings]
    refuse_pickles(there, f"{repo_id} on the Hub")
    _refuse_others(api, repo_id, state.sha, there, "push to")
    if is_new_branch:
        api.create_branch(repo_id, branch=revision, revision=state.sha)
    stale = [path for path in there if CHECKPOINT_FILES.fullmatch(path) and path not in contents]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(path) for path in stale),
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=state.sha,  # what was looked at is what is replaced
    )


def pull(
    repo_id: str, folder: str | Path | None = None, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch a checkpoint from the Hub: its files, and no others that may lie beside them.

    Parameters
    ----------
    repo_id
        Its name there.
    folder
        Where it goes, whole or not at all: new, empty, or an older PanFoMa checkpoint to replace. None keeps it in the
        cache of the Hub's client, where ``from_pretrained(repo_id)`` finds it, too.
    revision
        A branch, a tag or a commit's hash; None takes the newest of the main branch.
    token
        Access token, for what is private; None takes the one that you logged in with.

    Returns
    -------
    The folder that it is in.

    Raises
    ------
    HubError
        If there is no such repository, revision or right to read it, it is none of PanFoMa or has a pickle in it, the
        connection breaks, or, with ``folder``, it is not complete.
    FileExistsError
        If ``folder`` holds something else.
    """
    if folder is None:
        return _fetched(repo_id, revision, token, None)
    with written_whole(folder) as new:
        _fetched(repo_id, revision, token, new)
        shutil.rmtree(new / ".cache", ignore_errors=True)  # what the Hub's client notes of a download
        check_complete(new)  # or what is there stays
    return Path(folder)


def _fetched(repo_id: str, revision: str | None, token: str | None, folder: Path | None) -> Path:
    api = HfApi(token=token)
    try:
        state = api.model_info(repo_id, revision=revision)
        there = [file.rfilename for file in state.siblings]
        refuse_pickles(there, f"{repo_id} on the Hub")
        _refuse_others(api, repo_id, state.sha, there, "fetch")
        # Code that a later version adds is fetched, too.
        wanted = [path for path in there if CHECKPOINT_FILES.fullmatch(path) or _is_code(path)]
        return Path(
            snapshot_download(
                repo_id,
                # What was looked at; the cache also notes which branch or tag that is.
                revision=revision if folder is None else state.sha,
                token=token,
                local_dir=folder,
                allow_patterns=[glob.escape(path) for path in wanted],
            )
        )
    except HubError:
        raise
    except RevisionNotFoundError as error:
        raise HubError(
            f"A revision is a branch, a tag or a commit's hash, got {revision!r}, which {repo_id} does not have. "
            f"It has {_revisions(api, repo_id)}: name one of these, or leave it out."
        ) from error
    except Exception as error:  # of the network, the Hub or the disk, from several libraries
        raise _explained(error, "The Hub must give the checkpoint", repo_id, may="read it") from error


def _is_code(path: str) -> bool:
    return "/" not in path and PurePosixPath(path).suffix == ".py"


def _refuse_others(api: HfApi, repo_id: str, commit: str, there: list[str], doing: str) -> None:
    """Raise HubError if a repository holds another model; an empty one may be written to."""
    names = [name for name in SETTINGS_FILES if name in there]
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            hf_hub_download(repo_id, name, revision=commit, token=api.token, local_dir=scratch)
        settings = read_settings(Path(scratch))
    is_empty = doing == "push to" and not names
    if not is_empty and not is_panfoma(settings):
        got = ", ".join(names) + " of another model" if names else "no configuration"
        raise HubError(f"A repository to {doing} holds a PanFoMa checkpoint, got {repo_id} with {got}. Check its name.")


def _revisions(api: HfApi, repo_id: str) -> str:
    try:
        refs = api.list_repo_refs(repo_id)
    except Exception:  # it is only to help
        return "others"
    return ", ".join(ref.name for ref in (*refs.branches, *refs.tags))


def _explained(error: Exception, rule: str, repo_id: str, may: str) -> HubError:
    """An error with what a library said, and what to do."""
    # Of an upload, the client only says which file it was of, and leaves the reason to the cause.
    said = [error, error.__cause__] if isinstance(error, RuntimeError) and error.__cause__ else [error]
    said = ": ".join(" ".join(str(each).split()).rstrip(".") or type(each).__name__ for each in said)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        remedy = f"Check the name, and log in (`hf auth login`, or HF_TOKEN) with a token that may {may}."
    elif status == 412:
        remedy = "Somebody else has published there meanwhile: look at that, and push again."
    elif isinstance(error, ValueError):  # of the client, about what was passed
        remedy = "Mend what it names."
    else:
        remedy = "Check the connection, and try again: it is whole or not at all."
    return HubError(f"{rule}, got for {repo_id}: {said}. {remedy}")
