"""Building a corpus from a source list, or bringing one up to date."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ...tokenization import PanFoMaTokenizer
from ..cells import tokenizer_fingerprint
from .corpus import MANIFEST_FILE, SPLITS_FOLDER, TOKENIZER_FOLDER, Corpus, CorpusError
from .finishing import finish_corpus
from .running import FATAL, Inputs, run_units
from .sources import SourceList, resolved_settings
from .units import FINISHED_FOLDER, UNITS_FOLDER, WORK_FOLDER, Unit


LOCK_FILE = ".lock"
# Checksums of inputs by path, size and time of change, so that a terabyte is not read again to find it unchanged.
INPUTS_FILE = ".inputs.json"
# What a first build that was cut off leaves.
_UNFINISHED = (LOCK_FILE, INPUTS_FILE, WORK_FOLDER, FINISHED_FOLDER, UNITS_FOLDER, SPLITS_FOLDER, TOKENIZER_FOLDER)


def build_corpus(
    sources: SourceList | str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    tokenizer: PanFoMaTokenizer | None = None,
    progress: bool = True,
) -> Corpus:
    """Build a corpus from a source list, or bring one up to date.

    A file that was finished before, with the same content and settings, is not read again. Shards are the same, byte
    for byte, whatever the number of workers and however often a build was cut off.

    Parameters
    ----------
    sources
        A source list, or its file.
    out
        The corpus' folder: new, empty, or a corpus. For a Dask cluster it lies where every worker sees it.
    root
        The folder that the list's paths start from; None takes the list's own folder, or the current one.
    workers
        Processes on this machine. More than one needs a script's ``if __name__ == "__main__":``.
    scheduler
        Address of a Dask scheduler, such as ``tcp://10.0.0.1:8786``, whose workers are used instead.
    tokenizer
        Knows the genes; None takes the packaged one.
    progress
        Whether to show bars and a line for each file.

    Returns
    -------
    The corpus.

    Raises
    ------
    ValueError
        If the source list is wrong, or donors or equal cells are on both sides of a split (`LeakageError`).
    FileNotFoundError, FileExistsError
        If an input is not there, or the folder holds something else.
    CorpusError
        If files could not be read or written; it names them. What was finished stays.
    """
    if workers < 1:
        raise ValueError(f"`workers` is the number of processes, 1 or more, got {workers}. Leave it out for one.")
    if not isinstance(sources, SourceList):
        root = Path(sources).parent if root is None else root
        sources = SourceList.load(sources)
    root = Path("." if root is None else root)
    files = sources.files(root)
    out = Path(out).absolute()
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        try:
            tokenizer = PanFoMaTokenizer() if tokenizer is None else tokenizer
            tokenizer_folder = _saved_tokenizer(tokenizer, out)
            inputs = Inputs(out / INPUTS_FILE)
            units = [
                Unit(
                    study=study,
                    path=path,
                    file=str(Path(root, path).absolute()),  # of a link, the name tells the format
                    settings=resolved_settings(sources, study),
                    vocabularies=sources.vocabularies,
                    corpus=str(out),
                    tokenizer=str(tokenizer_folder),
                    work=f"{number:06d}",
                    **inputs.known(Path(root, path).absolute()),
                )
                for number, (study, path) in enumerate(files)
            ]
            reports = run_units(units, workers, scheduler, inputs, progress)
            return finish_corpus(sources, out, units, reports, tokenizer_folder, tokenizer)
        except OSError as error:
            if error.errno not in FATAL:
                raise
            raise CorpusError(
                f"A corpus needs a place to write to, got {error} in {out}. What was finished is kept: make room, and "
                "build again."
            ) from error
        finally:
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)


def _check_folder(out: Path) -> None:
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    is_ours = out.is_dir() and names <= {*_UNFINISHED} and (not names or LOCK_FILE in names)
    if not is_ours and out.is_dir() and (out / MANIFEST_FILE).is_file():
        with contextlib.suppress(CorpusError):
            is_ours = "shards" in Corpus.open(out).manifest
    if not is_ours:
        raise FileExistsError(
            f"A corpus is built in a new or empty folder, or brought up to date in its own, got {out} with something "
            "else. Choose another folder."
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CorpusError(
            f"One build at a time writes a corpus, got a second one for {out}. Wait for the first."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _saved_tokenizer(tokenizer: PanFoMaTokenizer, out: Path) -> Path:
    """The folder, below the corpus, that workers load the tokenizer from, and by whose name they know it again."""
    facts = json.dumps(tokenizer_fingerprint(tokenizer), sort_keys=True).encode()
    folder = out / WORK_FOLDER / f"{TOKENIZER_FOLDER}-{hashlib.sha256(facts).hexdigest()}"
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    return folder
