# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""PanFoMa configuration: every hyperparameter of the architecture, validated when it is built."""

import math

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


# The paper's shape is "base"; "small" and "tiny" keep its proportions for laptops and for tests.
SIZES = {
    "base": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "chunk_size": 768,
    },
    "small": {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "chunk_size": 768,
    },
    "tiny": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "chunk_size": 8,
    },
}


class PanFoMaConfig(PreTrainedConfig):
    """Hyperparameters of PanFoMa; the defaults are the size "base", the paper's shape.

    Parameters
    ----------
    vocab_size
        Number of gene ids, ``len(tokenizer)``.
    hidden_size
        Width of gene states and of the cell embedding (paper: D).
    num_attention_heads
        Heads of the local-context encoder; must divide ``hidden_size``.
    intermediate_size
        Width of the encoder's MLP; None means four times ``hidden_size``.
    num_encoder_layers
        Layers of the local-context encoder (paper: 6).
    num_hidden_groups
        Groups of encoder layers with parameters of their own, as in ALBERT; 1 shares one layer's
        parameters among all (paper).
    num_decoder_layers
        Bidirectional Mamba layers of the global decoder (paper: 6).
    chunk_size
        Genes per chunk (paper: M = 768).
    num_expression_bins
        Bins for non-zero expression; ids 1 to this number. Id 0 means "measured, not expressed".
    mask_bin_id, pad_bin_id
        Ids of the [MASK] and [PAD] bins; None puts them after the last bin.
    state_size, conv_kernel, expand, time_step_rank
        Shape of each Mamba mixer, under the names of Transformers' Mamba. ``time_step_rank="auto"``
        is ``ceil(hidden_size / 16)``.
    time_step_min, time_step_max, time_step_floor, time_step_scale
        Range of Mamba's initial step sizes.
    use_bias, use_conv_bias
        Biases of Mamba's projections and of its convolution.
    hidden_act
        Activation of the encoder's MLP and of the prediction heads.
    hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout
        Dropout rates; ``classifier_dropout=None`` takes ``hidden_dropout_prob``.
    initializer_range
        Standard deviation of the initial embeddings and of [CLS]; linear layers start by the width that they read.
        Keep it small: 0.3 stalled on the majority class.
    layer_norm_eps
        Epsilon of every normalisation.
    gene_loss_weight, cell_loss_weight, presence_loss_weight
        Weights of the three losses of masked-expression pretraining.
    pad_token_id
        Gene id of padding.
    label_name
        What the labels of a classifier are called, such as ``"cell_type"``; names the columns that
        ``annotate`` writes.
    label_tasks
        Of a classifier with several tasks: the names of each one's labels, such as
        ``{"cell_type": ["B cell", "T cell"], "is_malignant": ["False", "True"]}``. The logits of the tasks lie side by
        side in the order of the alphabet, and ``num_labels`` is their number in all. None for a single task, whose
        labels are in ``id2label``.
    use_gene_logits
        Whether a classifier adds a linear function of the bins to what it reads from the cell embedding: a logit of
        each gene for each label, times the gene's bin as a share of the highest; Wide & Deep (Cheng et al., DLRS 2016).
    calibration
        What validation cells told of a classifier's output, by label name: ``temperature``, ``unassigned_threshold``
        and what else `panfoma_hf.finetune` measured.

    Raises
    ------
    ValueError
        If a value breaks a rule; the message says the rule, what was got and the remedy.

    Examples
    --------
    >>> PanFoMaConfig.from_size("small", num_labels=14).hidden_size
    128
    """

    model_type = "panfoma"
    # Trainer gathers all other outputs as predictions.
    keys_to_ignore_at_inference = ["pooler_output"]

    # Size of the packaged gene table; a test holds the two together.
    vocab_size: int = 25_533
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    num_encoder_layers: int = 6
    num_hidden_groups: int = 1
    num_decoder_layers: int = 6
    chunk_size: int = 768
    num_expression_bins: int = 50
    mask_bin_id: int | None = None
    pad_bin_id: int | None = None
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    gene_loss_weight: float = 1.0
    cell_loss_weight: float = 1.0
    presence_loss_weight: float = 0.1
    pad_token_id: int = 0
    label_name: str | None = None
    label_tasks: dict[str, list[str]] | None = None
    use_gene_logits: bool = False
    calibration: dict[str, dict] | None = None

    def __post_init__(self, **kwargs):
        if "num_hidden_layers" in kwargs:
            raise ValueError(
                "`num_hidden_layers` is the sum of `num_encoder_layers` and `num_decoder_layers` and cannot be set, "
                f"got {kwargs['num_hidden_layers']!r}. Set those two instead."
            )
        self._check_positive_integers()
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if self.mask_bin_id is None:
            self.mask_bin_id = self.num_expression_bins + 1
        if self.pad_bin_id is None:
            self.pad_bin_id = self.num_expression_bins + 2
        if self.label_tasks is not None:
            # The order of the logits: that of config.json, whose keys are sorted when it is written.
            self.label_tasks = dict(sorted(self.label_tasks.items()))
            names = [f"{task}: {name}" for task, labels in self.label_tasks.items() for name in labels]
            kwargs["id2label"] = dict(enumerate(names))
            kwargs["label2id"] = {name: index for index, name in enumerate(names)}
        self._check_rules()
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides) -> "PanFoMaConfig":
        """Build a configuration by the name of its size.

        Parameters
        ----------
        size
            "base", "small" or "tiny".
        overrides
            Any other parameter of the configuration; takes precedence over the size.

        Raises
        ------
        ValueError
            If the size is not known.
        """
        if size not in SIZES:
            raise ValueError(
                f"A size is one of {', '.join(SIZES)}, got {size!r}. "
                "Use one of these, or give the hyperparameters to PanFoMaConfig(...) itself."
            )
        return cls(**{**SIZES[size], **overrides})

    @property
    def num_hidden_layers(self) -> int:
        """Encoder plus decoder layers; ``hidden_states`` has one entry more."""
        return self.num_encoder_layers + self.num_decoder_layers

    @property
    def num_bin_ids(self) -> int:
        """Number of bin ids: not expressed, the bins, [MASK] and [PAD]."""
        return max(self.num_expression_bins, self.mask_bin_id, self.pad_bin_id) + 1

    @property
    def mamba_intermediate_size(self) -> int:
        """Channels of each Mamba mixer."""
        return self.expand * self.hidden_size

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Names of the labels by task, in the order of the logits; a single task is called by ``label_name``."""
        if self.label_tasks is not None:
            return self.label_tasks
        return {self.label_name or "label": [self.id2label[index] for index in range(self.num_labels)]}

    def _check_positive_integers(self):
        names = [
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_encoder_layers",
            "num_hidden_groups",
            "num_decoder_layers",
            "chunk_size",
            "num_expression_bins",
            "state_size",
            "conv_kernel",
            "expand",
        ]
        optional = {"intermediate_size": None, "time_step_rank": "auto"}
        names += [name for name, default in optional.items() if getattr(self, name) != default]
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}. Set it to 1 or more.")

    def _check_rules(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}. Change one of them, for example `num_attention_heads="
                f"{math.gcd(self.hidden_size, self.num_attention_heads)}`."
            )
        if self.num_encoder_layers % self.num_hidden_groups:
            raise ValueError(
                f"`num_hidden_groups` must divide `num_encoder_layers`, got {self.num_hidden_groups} groups for "
                f"{self.num_encoder_layers} layers. Use 1 to share one layer's parameters among all."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {value!r}. Use 0 for no dropout.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"`hidden_act` must be an activation of Transformers, got {self.hidden_act!r}. "
                "Use 'gelu', 'relu', 'silu' or another key of transformers.activations.ACT2FN."
            )
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"`time_step_min` must be positive and at most `time_step_max`, got {self.time_step_min} and "
                f"{self.time_step_max}. Mamba's own values are 0.001 and 0.1."
            )
        for name in ("mask_bin_id", "pad_bin_id"):
            if getattr(self, name) <= self.num_expression_bins:
                raise ValueError(
                    f"`{name}` must be above the bins 0 to {self.num_expression_bins}, got {getattr(self, name)}. "
                    "Leave it out to have it set."
                )
        if self.mask_bin_id == self.pad_bin_id:
            raise ValueError(
                f"`mask_bin_id` and `pad_bin_id` must differ, got {self.mask_bin_id} twice. "
                "Leave both out to have them set."
            )
        if self.label_tasks is not None and not (self.label_tasks and all(self.label_tasks.values())):
            raise ValueError(
                f"`label_tasks` needs at least one task, and each of them a label, got {self.label_tasks!r}. "
                "Leave it out for a single task, whose labels `id2label` names."
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be a gene id below `vocab_size`, got {self.pad_token_id} of {self.vocab_size}. "
                "Use `tokenizer.pad_token_id` and `len(tokenizer)`."
            )


PanFoMaConfig.register_for_auto_class()

__all__ = ["SIZES", "PanFoMaConfig"]
