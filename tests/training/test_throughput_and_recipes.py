"""FLOPs of the model against torch's own count, peaks of devices, and recipes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from panfoma_hf import PanFoMaConfig, PanFoMaForMaskedExpression, finetune, pretrain
from panfoma_hf.training import read_recipe, throughput
from panfoma_hf.training.throughput import PEAK_BY_DEVICE, peak_flops, pretraining_flops
from tests.conftest import ROOT


# -- FLOPs -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "one chunk that is not full": ({}, 3, 5),
    "whole chunks": ({}, 2, 24),
    "chunks and a rest": ({}, 2, 19),
    "other proportions": (
        {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64, "num_encoder_layers": 4}
        | {"num_hidden_groups": 2, "num_decoder_layers": 1, "chunk_size": 6, "state_size": 3, "time_step_rank": 5}
        | {"conv_kernel": 3, "expand": 3, "num_expression_bins": 20},
        2,
        14,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts_and_the_convolutions(name):
    sizes, cells, seq = SHAPES[name]
    config = PanFoMaConfig.from_size("tiny", **{"vocab_size": 120, **sizes})
    config._attn_implementation = "eager"  # so that attention is matrix products, which torch counts
    model = PanFoMaForMaskedExpression(config)
    ids = torch.stack([1 + torch.randperm(119)[:seq] for _ in range(cells)])
    bins = torch.randint(1, config.num_expression_bins + 1, (cells, seq))
    with FlopCounterMode(display=False) as counter:
        model(ids, bins, labels=bins).loss.backward()
    # A short convolution is an operator of ours, which torch cannot look into: kernel products and sums for each
    # channel of each gene, in two directions; three times for forward and backward pass.
    channels = config.expand * config.hidden_size
    convolutions = 3 * config.num_decoder_layers * 2 * (2 * config.conv_kernel * channels * cells * seq)
    assert pretraining_flops(config, cells, seq) == counter.get_total_flops() + convolutions


def test_flops_grow_with_the_cells_and_faster_with_their_genes_within_a_chunk():
    config = PanFoMaConfig.from_size("small")
    assert pretraining_flops(config, 12, 700) == 12 * pretraining_flops(config, 1, 700)
    assert pretraining_flops(config, 1, 700) > 2 * pretraining_flops(config, 1, 350)
    # Chunks do not see each other: beyond one, twice the genes are twice the work.
    whole = [pretraining_flops(config, 1, count * config.chunk_size) for count in (1, 2, 4)]
    assert whole[2] - whole[1] == pytest.approx(2 * (whole[1] - whole[0]))


def test_a_known_gpu_has_the_peak_of_its_data_sheet(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "Tesla V100-SXM2-32GB": 125e12,
        "NVIDIA B200": 2250e12,
    }
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak, source = peak_flops(torch.device("cuda"), torch.bfloat16)
        assert peak == expected
        assert source.startswith("data sheet of ")
    assert set(names.values()) == set(PEAK_BY_DEVICE.values())


def test_a_peak_that_no_data_sheet_gives_is_measured(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0])  # the first product warms up, the third is fastest
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert source.startswith("measured, ")
    size = int(source.removeprefix("measured, ").split()[0])
    assert peak == 2 * size**3


def test_measuring_the_peak_leaves_torchs_random_numbers_as_they_were():
    before = torch.get_rng_state()
    peak_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_names_arguments_of_the_function_and_of_trainer(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: small\nmask_ratio: [0.15, 0.4]\nlearning_rate: 0.001\nbf16: true\nprobe: [pbmc]\n")
    assert read_recipe(pretrain, path, also=["probe"]) == {
        "model": "small",
        "mask_ratio": [0.15, 0.4],
        "learning_rate": 0.001,
        "bf16": True,
        "probe": ["pbmc"],
    }
    path.write_text("# nothing\n")
    assert read_recipe(pretrain, path) == read_recipe(pretrain) == {}
    path.write_text("gene_set: 2000\n")
    assert read_recipe(finetune, path) == {"gene_set": 2000}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_that_come_along_are_understood(path):
    assert read_recipe(pretrain, path, also=["probe"])["model"] in ("small", "base", "tiny")


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("learning_rate=1e-3", 1e-3),
        ("learning_rate = 2", 2),
        ("max_steps=1000", 1000),
        ("bf16=true", True),
        ("tokens_per_batch=null", None),
        ("mask_ratio=[0.15, 0.4]", [0.15, 0.4]),
        ("held_out_studies=[a, b]", ["a", "b"]),
        ("model=runs/a=b", "runs/a=b"),
        ("learning_rate=-1E-03", -1e-3),
        ("save_strategy=no", "no"),
    ],
)
def test_changes_are_yaml_and_go_over_the_recipe(change, value, tmp_path):
    name = change.split("=")[0].strip()
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{name}: before\nseed: 3\n")
    found = read_recipe(pretrain, path, [change])
    assert found == {name: value, "seed": 3}
    assert type(found[name]) is type(value)


def test_a_number_means_the_same_in_a_recipe_as_in_a_change(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1e-3\n")
    assert read_recipe(pretrain, path) == read_recipe(pretrain, None, ["learning_rate=1e-3"]) == {"learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("learing_rate: 1", [], r"arguments of pretrain\(\).*'learing_rate'. Did you mean learning_rate"),
        ("", ["mask_ration=0.3"], "'mask_ration'. Did you mean mask_ratio"),
        ("corpus: x", [], "got 'corpus'"),
        ("2: x", [], "got 2"),
        ("", ["max_steps"], "`name=value`, got 'max_steps'"),
        ("- a\n- b", [], "a mapping of names to values, got list in .*recipe.yaml"),
        ("seed: 1\nseed: 2", [], "the key 'seed' twice"),
        ("a: [", [], "A recipe is YAML, got (?s:.*) in .*recipe.yaml"),
    ],
)
def test_a_recipe_that_is_not_understood_is_an_error_that_says_what_was_meant(content, changes, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_recipe(pretrain, path, changes)


def test_what_the_command_sets_by_itself_cannot_be_set_by_a_recipe():
    with pytest.raises(ValueError, match="output_dir"):
        read_recipe(pretrain, None, ["output_dir=elsewhere"])


def test_an_unknown_name_that_is_like_no_other_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"got 'xyzzy'\.$"):
        read_recipe(pretrain, None, ["xyzzy=1"])
