"""Checkpoints on the Hub: published in one commit, fetched as they were, refused where they are unsafe or not ours."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import panfoma_hf
from panfoma_cli import app
from panfoma_hf import PanFoMaForCellClassification, PanFoMaModel, pull, push_to_hub, save_checkpoint
from panfoma_hf.hub import HubError, check_replaceable, checkpoint_files
from panfoma_hf.training.finetuning import _with_adapters
from tests.conftest import run_python, spread_out, tiny_config
from tests.hub_server import Commit, HubServer


NAME = "lab/pancreas"
TYPES = ["B cell", "T cell", "mast"]
CODE = {
    *("configuration_panfoma.py", "modeling_panfoma.py", "selective_scan.py", "reference_kernels.py"),
    *("numba_kernels.py", "triton_kernels.py", "tokenization_panfoma.py", "expression.py", "gene_names.py"),
    *("value_scale.py", "token_kernels.py"),
}
TOKENIZER = {"tokenizer_config.json", "genes.tsv.gz"}
FILES = {"config.json", "model.safetensors", "README.md", *TOKENIZER, *CODE}


@pytest.fixture
def hub(tmp_path):
    """A Hub without repositories, which `huggingface_hub` in this process speaks to."""
    with HubServer() as server, server.connected(tmp_path / "home"):
        yield server


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), id2label=dict(enumerate(TYPES)), label_name="cell_type")
    return spread_out(PanFoMaForCellClassification(config))


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """A checkpoint's folder; tests must not change it."""
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "checkpoint", model, tokenizer)


@pytest.fixture
def folder(saved, tmp_path):
    """The same, for a test to change."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(name, **files):
    """Publish files beside a checkpoint, without this package; dots in their names are written as __."""
    additions = [CommitOperationAdd(path.replace("__", "."), content) for path, content in files.items()]
    HfApi().create_commit(name, additions, commit_message="by hand")


def commits(hub):
    """Messages of the commits of each branch of each repository."""
    return {
        key: {branch: [commit.message for commit in history] for branch, history in repository.branches.items()}
        for key, repository in hub.repositories.items()
    }


def refused(call, *arguments, match, hub, **options):
    """The message of a call that fails and leaves every repository as it was: rule, what was got, remedy."""
    before = commits(hub)
    with pytest.raises(HubError, match=match) as raised:
        call(*arguments, **options)
    for key, found in commits(hub).items():
        # One that was made for it is empty.
        assert found == before.get(key, {"main": ["initial commit"]})
    message = str(raised.value)
    assert ", got " in message
    assert message.count(". ") >= 1
    assert "\n" not in message
    return message


# -- publishing and reading back -------------------------------------------------------------------------------------

READ = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
name, base, scratch = sys.argv[1:4]
model = AutoModelForSequenceClassification.from_pretrained(base, trust_remote_code=True).eval()
if name != base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, name).eval()
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
genes = json.load(open(f"{scratch}/genes.json"))
batch = tokenizer(np.load(f"{scratch}/counts.npy"), gene_names=genes, padding=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits
print(json.dumps([type(tokenizer).__module__, list(model.config.id2label.values()), logits.tolist()]))
"""


def read_elsewhere(name, base, hub, adata, scratch):
    """Labels and logits of a checkpoint on the Hub, in a fresh process that has not got the package."""
    np.save(scratch / "counts.npy", adata.X.toarray())
    (scratch / "genes.json").write_text(json.dumps(adata.var_names.tolist()))
    home = scratch / "elsewhere"
    printed = run_python(READ, name, base, str(scratch), without_package=True, **hub.environment(home))
    module, labels, logits = json.loads(printed.splitlines()[-1])
    assert module.startswith("transformers_modules")
    return labels, torch.tensor(logits)


def logits_of(model, adata, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(adata, padding=True, return_tensors="pt")).logits


def test_a_published_checkpoint_gives_the_same_logits_elsewhere_without_the_package(
    hub, saved, model, tokenizer, adata, tmp_path
):
    before = contents(saved)
    commit = push_to_hub(saved, NAME)
    published = hub.model(NAME)
    assert [each.message for each in published.commits[1:]] == ["Upload PanFoMa checkpoint"]
    assert (commit.oid, commit.commit_url) == (published.commits[-1].oid, f"{hub.url}/{NAME}/commit/{commit.oid}")
    assert set(published.files) == FILES == set(published.commits[-1].added)
    assert {name: content for name, content in published.files.items() if name != "README.md"} == before
    assert contents(saved) == before
    assert sorted(HfApi().list_repo_files(NAME)) == sorted({*FILES, ".gitattributes"})
    config = json.loads(published.files["config.json"])
    assert config["id2label"] == {"0": "B cell", "1": "T cell", "2": "mast"}
    assert config["auto_map"]["AutoModelForSequenceClassification"] == "modeling_panfoma.PanFoMaForCellClassification"
    # Weights and genes went to the storage beside git.
    assert sum(request.startswith("PUT") for request in hub.requests) == 2

    labels, logits = read_elsewhere(NAME, NAME, hub, adata, tmp_path)
    assert labels == TYPES
    torch.testing.assert_close(logits, logits_of(model, adata, tokenizer), rtol=1e-5, atol=1e-5)


def test_a_model_with_its_tokenizer_is_published_as_its_folder_is(hub, saved, model, tokenizer):
    push_to_hub(model, NAME, tokenizer=tokenizer, message="mine")
    push_to_hub(saved, "lab/other")
    assert hub.model(NAME).files == hub.model("lab/other").files
    assert [commit.message for commit in hub.model(NAME).commits[1:]] == ["mine"]


def test_an_adapter_is_published_with_its_tokenizer_and_loads_on_its_base_elsewhere(
    hub, saved, tokenizer, adata, tmp_path
):
    push_to_hub(saved, "lab/base")
    adapted = _with_adapters(AutoModelForSequenceClassification.from_pretrained("lab/base")).eval()
    with torch.no_grad():
        for parameter_name, weight in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(weight, std=0.3)
    push_to_hub(adapted, "lab/adapter", tokenizer=tokenizer)
    published = hub.model("lab/adapter")
    assert len(published.commits) == 2
    code = {name for name in CODE if "kernels" not in name or name == "token_kernels.py"}
    code -= {"configuration_panfoma.py", "modeling_panfoma.py", "selective_scan.py"}
    assert set(published.files) == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *TOKENIZER,
        *code,
    }
    card = ModelCard(published.files["README.md"].decode()).data
    assert (card.base_model, card.library_name) == ("lab/base", "peft")

    labels, logits = read_elsewhere("lab/adapter", "lab/base", hub, adata, tmp_path)
    assert labels == TYPES
    expected = logits_of(adapted, adata, tokenizer)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    plain = logits_of(AutoModelForSequenceClassification.from_pretrained(saved), adata, tokenizer)
    assert (expected - plain).abs().max() > 0.01

    # One adapter in place of the other; a folder of one is known as a checkpoint's.
    for _ in range(2):
        pull("lab/adapter", tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == published.files
    # A full checkpoint in its place takes the adapter away.
    push_to_hub(saved, "lab/adapter")
    assert set(published.files) == FILES
    assert set(published.commits[-1].deleted) == {"adapter_config.json", "adapter_model.safetensors"}


def test_model_and_tokenizer_alone_are_published_by_transformers_with_their_code(hub, model, tokenizer):
    model.push_to_hub(NAME)
    tokenizer.push_to_hub(NAME)
    published = hub.model(NAME)
    assert len(published.commits) == 3
    assert set(published.files) == FILES
    loaded = AutoModelForSequenceClassification.from_pretrained(NAME)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert AutoTokenizer.from_pretrained(NAME).genes_sha256 == tokenizer.genes_sha256


def test_a_later_checkpoint_replaces_the_earlier_in_one_commit_and_nothing_else(hub, saved, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    (tmp_path / "sharded" / "finetuning.json").write_text("{}")
    push_to_hub(tmp_path / "sharded", NAME)
    published = hub.model(NAME)
    shards = {name for name in published.files if name.endswith(".safetensors")}
    assert len(shards) > 1
    add(NAME, LICENSE=b"mine", pictures_umap__png=b"x")
    first = published.commits[1].oid

    push_to_hub(saved, NAME)
    assert len(published.commits) == 4
    assert set(published.files) == {*FILES, "LICENSE", "pictures_umap.png"}
    assert set(published.commits[-1].deleted) == {*shards, "model.safetensors.index.json", "finetuning.json"}
    # What is the same is not sent again.
    assert set(published.commits[-1].added) == {"model.safetensors"}

    last = push_to_hub(saved, NAME)
    assert len(published.commits) == 4
    assert last.oid == published.commits[-1].oid
    pull(NAME, tmp_path / "old", revision=first)
    assert contents(tmp_path / "old") == {
        name: content for name, content in published.commits[1].files.items() if name != ".gitattributes"
    }


def test_what_is_no_part_of_a_checkpoint_stays_here(hub, folder, caplog):
    (folder / "notes.txt").write_text("of patients")
    (folder / ".DS_Store").write_text("x")
    push_to_hub(folder, NAME)
    assert set(hub.model(NAME).files) == FILES
    assert "left out: notes.txt." in caplog.text


# -- what is not complete or not safe --------------------------------------------------------------------------------


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def _pickle(path):
    path.write_bytes(pickle.dumps({"weight": [1.0]}))


def _without_auto_map(path):
    settings = json.loads(path.read_text())
    del settings["auto_map"]
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", Path.unlink, "without model.safetensors"),
        ("genes.tsv.gz", Path.unlink, "without genes.tsv.gz"),
        ("tokenizer_config.json", Path.unlink, "without tokenizer_config.json"),
        ("modeling_panfoma.py", Path.unlink, "without modeling_panfoma.py"),
        ("reference_kernels.py", Path.unlink, "without reference_kernels.py"),
        ("config.json", _without_auto_map, "without `auto_map` in config.json"),
        ("config.json", Path.unlink, "without config.json"),
        ("config.json", _cut, "got config.json of something else"),
        ("model.safetensors", _cut, "damaged ones in .*: model.safetensors"),
        ("model.safetensors", _pickle, "damaged ones in .*: model.safetensors"),
        ("genes.tsv.gz", _cut, "damaged ones in .*: genes.tsv.gz"),
        ("pytorch_model.bin", _pickle, "got pytorch_model.bin in"),
        ("optimizer.pt", _pickle, "got optimizer.pt in"),
    ],
)
def test_a_folder_that_is_not_complete_or_not_safe_is_refused_before_anything_is_sent(
    name, change, message, hub, folder
):
    change(folder / name)
    refused(push_to_hub, folder, NAME, match=message, hub=hub)
    assert hub.requests == []


def test_a_shard_that_is_missing_is_named(hub, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    tokenizer.save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    refused(push_to_hub, tmp_path, NAME, match=f"without {shard.name}", hub=hub)


def test_a_folder_of_something_else_is_refused(hub, folder, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for other in (tmp_path / "none", tmp_path / "bert", panfoma_hf.checkpoint("small")):
        refused(push_to_hub, other, NAME, match="without|is a folder with config.json", hub=hub)
    # The package's own has no code: it says what to do.
    with pytest.raises(HubError, match="panfoma export"):
        checkpoint_files(panfoma_hf.checkpoint("small"))


def test_a_model_without_its_tokenizer_and_a_folder_with_another_are_refused(hub, saved, model, tokenizer):
    refused(push_to_hub, model, NAME, match="Pass `tokenizer`", hub=hub)
    refused(push_to_hub, saved, NAME, tokenizer=tokenizer, match="Leave that out", hub=hub)
    assert hub.requests == []


def test_an_adapter_on_a_base_that_nobody_else_has_is_refused(hub, saved, tokenizer, tmp_path):
    adapted = _with_adapters(AutoModelForSequenceClassification.from_pretrained(saved))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    message = refused(push_to_hub, tmp_path / "adapter", NAME, match="base_model_name_or_path", hub=hub)
    assert "merge_and_unload" in message


# -- what a repository may hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": b'{"model_type": "bert"}'},
        {"config__json": b"no JSON"},
        {"tokenizer_config__json": b'{"tokenizer_class": "BertTokenizer"}'},
        {"adapter_config__json": b'{"auto_mapping": {"base_model_class": "BertModel"}}'},
        {
            "config__json": b'{"model_type": "panfoma"}',
            "tokenizer_config__json": b'{"tokenizer_class": "BertTokenizer"}',
        },
    ],
    ids=lambda files: " and ".join(files),
)
def test_a_repository_of_another_model_is_neither_replaced_nor_fetched(files, hub, saved, tmp_path):
    HfApi().create_repo(NAME)
    add(NAME, **files)
    refused(push_to_hub, saved, NAME, match="to push to holds a PanFoMa checkpoint, got lab/pancreas with", hub=hub)
    refused(push_to_hub, saved, NAME, revision="new", match="of another model", hub=hub)
    refused(pull, NAME, tmp_path / "x", match="to fetch holds a PanFoMa checkpoint", hub=hub)
    assert not (tmp_path / "x").exists()


def test_an_empty_repository_may_be_written_to_and_not_fetched(hub, saved):
    HfApi().create_repo(NAME)
    refused(pull, NAME, match="with no configuration", hub=hub)
    push_to_hub(saved, NAME)
    assert set(hub.model(NAME).files) == FILES


@pytest.mark.parametrize("pickled", ["pytorch_model__bin", "training_args__bin", "runs/last__ckpt"])
def test_a_repository_with_a_pickle_is_neither_fetched_nor_added_to(pickled, hub, saved, tmp_path):
    push_to_hub(saved, NAME)
    add(NAME, **{pickled: pickle.dumps({})})
    path = pickled.replace("__", ".")
    for target in (None, tmp_path / "x"):
        refused(pull, NAME, target, match=f"got {path} in {NAME} on the Hub", hub=hub)
    refused(push_to_hub, saved, NAME, match=f"got {path} in {NAME} on the Hub", hub=hub)
    assert not any("resolve" in request and path in request for request in hub.requests)


# -- who may, and what may go wrong on the way -----------------------------------------------------------------------


def test_a_token_that_is_missing_or_wrong_is_said_and_one_that_is_passed_counts(hub, saved, tmp_path):
    push_to_hub(saved, NAME)
    for token, said in (("hf_wrong", "Invalid credentials"), ("", "Invalid username or password")):
        with hub.connected(tmp_path / "other", token=token):
            for name in (NAME, "lab/new"):
                message = refused(push_to_hub, saved, name, match=said, hub=hub)
                assert "log in (`hf auth login`, or HF_TOKEN) with a token that may write to it" in message
            assert ("model", "lab/new") not in hub.repositories
    with hub.connected(tmp_path / "other", token="hf_wrong"):
        push_to_hub(saved, "lab/new", token=hub.token)
        assert pull("lab/new", tmp_path / "x", token=hub.token).is_dir()


def test_a_private_repository_is_read_by_its_token_only(hub, saved, tmp_path):
    push_to_hub(saved, NAME, private=True)
    assert hub.model(NAME).is_private
    push_to_hub(saved, NAME, private=True)
    with hub.connected(tmp_path / "other", token=""):
        message = refused(pull, NAME, tmp_path / "x", match="Repository Not Found", hub=hub)
    assert "with a token that may read it" in message
    assert not (tmp_path / "x").exists()
    pull(NAME, tmp_path / "x")
    assert contents(tmp_path / "x") == hub.model(NAME).files


def test_what_is_meant_to_be_private_is_not_published_where_everybody_reads(hub, saved):
    HfApi().create_repo(NAME, private=False)
    refused(push_to_hub, saved, NAME, private=True, match="which is public", hub=hub)


def test_an_upload_that_is_cut_off_publishes_nothing_and_the_next_push_does(hub, saved, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
    hub.cut_after = 100_000
    message = refused(push_to_hub, saved, NAME, match="The Hub must take the checkpoint", hub=hub)
    assert "Error while uploading" in message
    assert "Check the connection, and try again" in message
    assert sum(request.startswith("PUT") for request in hub.requests) > 2  # the client tried several times
    assert hub.model(NAME).files == {}
    hub.cut_after = None
    push_to_hub(saved, NAME)
    assert set(hub.model(NAME).files) == FILES
    # Of a later one, too: the earlier stays.
    hub.stored.clear()
    hub.cut_after = 100_000
    spoilt = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(spoilt, folder / "model.safetensors", metadata={"format": "pt"})
    refused(push_to_hub, folder, NAME, match="Error while uploading", hub=hub)
    assert set(hub.model(NAME).files) == FILES


def test_without_a_connection_it_is_said(saved, tmp_path):
    with HubServer() as hub, hub.connected(tmp_path / "home"):
        push_to_hub(saved, NAME)
    with hub.connected(tmp_path / "home"):
        refused(push_to_hub, saved, NAME, match="Check the connection", hub=hub)
        refused(pull, NAME, tmp_path / "x", match="Check the connection", hub=hub)


def test_a_push_that_came_between_is_not_overwritten(hub, saved):
    push_to_hub(saved, NAME)
    commits = hub.model(NAME).commits
    commits.append(Commit("earlier", {**commits[-1].files, "README.md": b"other"}, parent=commits[-1].oid))

    def somebody():
        commits.append(Commit("between", commits[-1].files, parent=commits[-1].oid))

    hub.before_commit = somebody
    with pytest.raises(HubError, match="Somebody else has published there meanwhile"):
        push_to_hub(saved, NAME)
    assert [commit.message for commit in commits[2:]] == ["earlier", "between"]


def test_a_card_that_the_hub_does_not_take_is_said_before_weights_are_sent(hub, folder):
    (folder / "README.md").write_text("---\nlicense: whatever\n---\n\n# Mine\n")
    message = refused(push_to_hub, folder, NAME, match='"license" must be one of', hub=hub)
    assert message.endswith("Mend what it names.")
    assert not any(request.startswith("PUT") for request in hub.requests)


@pytest.mark.parametrize("name", ["a/b/c", "lab/with space", "lab/x.git"])
def test_a_name_that_cannot_be_is_said(name, hub, saved):
    refused(push_to_hub, saved, name, match="for " + name, hub=hub)
    refused(pull, name, match="for " + name, hub=hub)


# -- revisions and folders -------------------------------------------------------------------------------------------


def test_branches_tags_and_hashes_are_fetched_and_others_said(hub, saved, folder, tmp_path):
    first = push_to_hub(saved, NAME).oid
    HfApi().create_tag(NAME, tag="v1")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Second\n")
    push_to_hub(folder, NAME, revision="next")
    published = hub.model(NAME)
    assert set(published.branches) == {"main", "next"}
    assert len(published.commits) == 2
    push_to_hub(folder, NAME)

    expected = {None: b"# Second", "main": b"# Second", "next": b"# Second", "v1": b"# PanFoMa", first: b"# PanFoMa"}
    for revision, title in expected.items():
        assert pull(NAME, tmp_path / "x", revision=revision) == tmp_path / "x"
        assert title in (tmp_path / "x" / "README.md").read_bytes()
    before = contents(tmp_path / "x")
    message = refused(pull, NAME, tmp_path / "x", revision="v3", match="got 'v3'", hub=hub)
    assert "It has main, next, v1: name one of these" in message
    refused(pull, NAME, revision="0" * 40, match="A revision is", hub=hub)
    refused(pull, "lab/none", tmp_path / "x", match="Repository Not Found", hub=hub)
    assert contents(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_files_of_a_checkpoint_are_fetched_and_no_others(hub, saved, tmp_path):
    push_to_hub(saved, NAME)
    add(NAME, run__sh=b"rm", notes__docx=b"x", later_kernels__py=b"x = 1", **{"sub/modeling__py": b"x"})
    cached = pull(NAME)
    assert {path.name for path in cached.iterdir()} == {*FILES, "later_kernels.py"}
    pull(NAME, tmp_path / "x")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {*FILES, "later_kernels.py"}
    # The cache is the Hub client's own, by the branch's name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert AutoModelForSequenceClassification.from_pretrained(NAME).config.label_name == "cell_type"


def test_a_download_that_breaks_off_leaves_the_earlier_checkpoint(hub, saved, folder, monkeypatch):
    push_to_hub(saved, NAME)
    before = contents(folder)

    def break_off(*_, local_dir, **__):
        local_dir.mkdir()
        (local_dir / "config.json").write_text("{")
        raise ConnectionResetError("peer is gone")

    monkeypatch.setattr("panfoma_hf.hub.remote.snapshot_download", break_off)
    message = refused(pull, NAME, folder, match="got for lab/pancreas: peer is gone", hub=hub)
    assert "Check the connection, and try again" in message
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_complete_does_not_take_an_earlier_checkpoints_place(hub, saved, folder):
    push_to_hub(saved, NAME)
    HfApi().delete_file("model.safetensors", NAME)
    before = contents(folder)
    refused(pull, NAME, folder, match="complete by itself, got .* without model.safetensors", hub=hub)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_with_something_else_is_not_fetched_over(hub, saved, tmp_path):
    push_to_hub(saved, NAME)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.docx").write_text("x")
    with pytest.raises(FileExistsError, match=r"something else in it: thesis\.docx"):
        pull(NAME, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.docx": b"x"}
    # Another model's adapter is something else, too.
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"auto_mapping": {"base_model_class": "BertModel"}}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(FileExistsError, match=r"adapter_config\.json of another model"):
        check_replaceable(tmp_path / "adapter")


def test_the_body_of_a_classifier_is_a_checkpoint_too(hub, model, tokenizer):
    push_to_hub(model.panfoma, NAME, tokenizer=tokenizer)
    card = ModelCard(hub.model(NAME).files["README.md"].decode())
    assert card.data.pipeline_tag == "feature-extraction"
    assert "panfoma_hf.annotate" not in card.text
    assert torch.equal(PanFoMaModel.from_pretrained(NAME).encoder.cls_token, model.panfoma.encoder.cls_token)


# -- commands --------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_push_and_pull_print_where_it_went_and_nothing_else(hub, saved, tmp_path):
    result = run("push", saved, NAME, "--private", "--message", "from a shell", "--json")
    assert result.exit_code == 0, result.output
    commit = hub.model(NAME).commits[-1]
    assert json.loads(result.stdout) == {"commit": commit.oid, "url": f"{hub.url}/{NAME}/commit/{commit.oid}"}
    assert (commit.message, hub.model(NAME).is_private) == ("from a shell", True)
    result = run("push", saved, NAME, "--revision", "v2")
    assert result.stdout.strip() == f"{hub.url}/{NAME}/commit/{commit.oid}"  # nothing to change: the branch's start
    result = run("pull", NAME, tmp_path / "x", "--revision", "v2")
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "x"))
    assert contents(tmp_path / "x") == hub.model(NAME).files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "none", NAME], "A PanFoMa checkpoint is a folder"),
        (["pull", NAME, "x"], "Repository Not Found"),
    ],
)
def test_what_goes_wrong_is_one_message_on_stderr_with_exit_code_1(arguments, message, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert message in result.stderr
