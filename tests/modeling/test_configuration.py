"""The configuration: sizes, rules, round trips."""

import pytest
from transformers import AutoConfig

from panfoma_hf import PanFoMaConfig
from panfoma_hf.modeling.configuration_panfoma import SIZES


def test_the_default_is_the_papers_shape():
    config = PanFoMaConfig()
    assert config.to_dict() == PanFoMaConfig.from_size("base").to_dict()
    assert (config.hidden_size, config.num_attention_heads, config.chunk_size) == (512, 8, 768)
    assert (config.num_encoder_layers, config.num_hidden_groups, config.num_decoder_layers) == (6, 1, 6)
    assert (config.state_size, config.conv_kernel, config.expand, config.time_step_rank) == (16, 4, 2, 32)
    assert (config.num_expression_bins, config.mask_bin_id, config.pad_bin_id, config.num_bin_ids) == (50, 51, 52, 53)
    assert config.num_hidden_layers == 12


@pytest.mark.parametrize("size", SIZES)
def test_sizes_by_name_take_overrides_and_survive_saving(size, tmp_path):
    config = PanFoMaConfig.from_size(size, num_labels=5, state_size=8)
    assert (config.hidden_size, config.state_size, config.num_labels) == (SIZES[size]["hidden_size"], 8, 5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PanFoMaConfig
    changed = {"transformers_version", "auto_map", "_name_or_path"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in changed} == {
        k: v for k, v in config.to_dict().items() if k not in changed
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, r"`hidden_size` must be a positive integer, got 0\. Set"),
        ({"chunk_size": 2.5}, "`chunk_size` must be a positive integer, got 2.5"),
        ({"num_decoder_layers": True}, "`num_decoder_layers` must be a positive integer, got True"),
        ({"time_step_rank": "large"}, "`time_step_rank` must be a positive integer, got 'large'"),
        ({"hidden_size": 100}, "multiple of `num_attention_heads`, got 100 and 8.*num_attention_heads=4"),
        ({"num_hidden_groups": 4}, "must divide `num_encoder_layers`, got 4 groups for 6 layers"),
        ({"hidden_dropout_prob": 1.0}, "`hidden_dropout_prob` must be at least 0 and below 1, got 1.0"),
        ({"time_step_min": 0.2}, "at most `time_step_max`, got 0.2 and 0.1"),
        ({"pad_bin_id": 50}, "`pad_bin_id` must be above the bins 0 to 50, got 50"),
        ({"mask_bin_id": 60, "pad_bin_id": 60}, "must differ, got 60 twice"),
        ({"pad_token_id": 25_533}, "`pad_token_id` must be a gene id below `vocab_size`, got 25533 of 25533"),
        ({"num_hidden_layers": 12}, "`num_hidden_layers` is the sum"),
        ({"hidden_act": "gleu"}, "`hidden_act` must be .*got 'gleu'"),
    ],
)
def test_a_broken_rule_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        PanFoMaConfig(**settings)


def test_an_unknown_size_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="base, small, tiny, got 'huge'"):
        PanFoMaConfig.from_size("huge")
