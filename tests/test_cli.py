"""The command as a whole: help, exit codes, errors, what it imports."""

import ast
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import panfoma_hf
from panfoma_cli import app
from panfoma_hf import doctor
from tests.conftest import ROOT, cells_of_counts, run_python


VERBS = ("check", "annotate", "embed", "demo", "finetune", "evaluate", "pretrain", "export", "push", "pull")
CORPUS_VERBS = ("build", "info", "push")
HEAVY = ("anndata", "datasets", "numpy", "pandas", "panfoma_hf", "torch", "transformers")


def command(*arguments, **options):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


@pytest.mark.parametrize("arguments", [["--help"], ["annotate", "--help"], ["check", "--no-such-option"]])
def test_help_and_wrong_options_do_not_wait_for_the_package(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['panfoma', *{arguments}]\n"
        "from panfoma_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('\\n', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    assert ast.literal_eval(run_python(code).splitlines()[-1].strip()) == []


def test_every_verb_is_in_the_help_and_nothing_else_is():
    shown = {info.name or info.callback.__name__ for group in app.registered_groups for info in _verbs_of(group)}
    assert shown == {*VERBS, *CORPUS_VERBS}
    text = command("--help", env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert all(f" {verb} " in text for verb in (*VERBS, "corpus"))
    assert "Exit codes: 0 done; 1" in text


def _verbs_of(group: typer.models.TyperInfo):
    return group.typer_instance.registered_commands


@pytest.mark.parametrize("verb", [*VERBS, *(f"corpus {verb}" for verb in CORPUS_VERBS)])
def test_the_help_of_every_verb_has_an_example_on_a_line_of_its_own(verb):
    result = command(*verb.split(), "--help", env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    examples = [line for line in lines if line.startswith(f"Example: panfoma {verb}")]
    assert len(examples) == 1
    assert lines[lines.index(examples[0]) - 1] == ""


def test_a_mistyped_verb_or_option_is_exit_code_2():
    assert command("anotate").exit_code == 2
    assert command("annotate", "x.h5ad").exit_code == 2


def test_errors_have_no_traceback_unless_that_is_asked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ("embed", tmp_path / "no.h5ad", tmp_path / "empty", "--out", tmp_path / "out.h5ad")
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    debugged = command("--debug", *arguments)
    assert debugged.exit_code == 1
    assert isinstance(debugged.exception, OSError | ValueError)
    assert str(debugged.exception) in result.stderr
    assert command(*arguments).stderr == result.stderr  # not from then on


def test_a_fault_of_the_command_is_told_from_one_of_the_input(monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("a bug")

    monkeypatch.setattr(doctor, "check", broken)
    result = command("check", "x.h5ad")
    assert result.exit_code == 1
    assert "error: KeyError: 'a bug'" in result.stderr
    assert "This is a fault of panfoma" in result.stderr
    assert "panfoma --debug" in result.stderr


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    path = tmp_path / "[red]cells[/red].h5ad"
    assert str(path) in command("check", path).stdout


def test_what_is_printed_to_a_file_has_no_colours_and_no_line_breaks_of_a_screen(adata, tmp_path):
    long = tmp_path / ("x" * 100) / "cells.h5ad"
    long.parent.mkdir()
    adata.write_h5ad(long)
    result = command("check", long, env={"COLUMNS": "60"})
    assert result.exit_code == 0
    assert str(long) in result.stdout.splitlines()
    assert "\x1b" not in result.stdout
    assert json.loads(command("check", long, "--json").stdout)["ready"]


SMALL_CHUNKS = """
from panfoma_cli import main
from panfoma_hf.data import storage
storage.CHUNK_ENTRIES = 2000
main()
"""


@pytest.mark.slow
def test_a_real_ctrl_c_ends_with_130_and_the_same_command_goes_on(tokenizer, tmp_path):
    panfoma_hf.export_checkpoint("small", tmp_path / "small")
    num_cells = 1000
    counts = np.random.default_rng(0).poisson(1.0, (num_cells, 40))
    cells_of_counts(tokenizer, counts, "cell").write_h5ad(tmp_path / "cells.h5ad")
    arguments = [sys.executable, "-c", SMALL_CHUNKS, "embed", "cells.h5ad", "small", "--out", "out.h5ad", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "out.h5ad.parts"
    while not list(parts.glob("chunk-*.safetensors")) and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "stopped: what is finished is kept in out.h5ad.parts. The same command goes on from there" in said
    assert "Traceback" not in said
    again = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["cells"] == num_cells
    assert 0 < report["cells_resumed"] < num_cells
