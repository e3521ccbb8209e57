"""The source list: what a good one means, and what is said of every kind of bad one."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from panfoma_hf.data import schema
from panfoma_hf.data.corpus.sources import (
    SourceList,
    Study,
    cell_fields,
    check_labels_occur,
    check_vocabulary,
    is_excluded,
    resolved_settings,
)
from panfoma_hf.data.quality import Quality
from tests.conftest import ROOT


BASICS = {"files": "[a.h5ad]", "licence": "MIT", "citation": "Somebody 2020"}


def yaml_of(*study: str, top: str = "name: small", name: str = "a", **basics: str | None) -> str:
    """A list of one study: lines of its settings beyond the basic ones, which None leaves out; lines of the list's."""
    basics = {key: value for key, value in {**BASICS, **basics}.items() if value is not None}
    lines = [*(f"{key}: {value}" for key, value in basics.items()), *study]
    return "\n".join([top, "studies:", f"  {name}:", *(f"    {line}" for line in lines), ""])


@pytest.fixture
def load(tmp_path):
    """From text to a list, by way of a file."""

    def load(text: str) -> SourceList:
        path = tmp_path / "list.yaml"
        path.write_text(text, encoding="utf-8")
        return SourceList.load(path)

    return load


@pytest.fixture
def study(load):
    """From lines of settings to the study."""
    return lambda *lines: load(yaml_of(*lines)).studies["a"]


def words(fields: pd.DataFrame, field: str) -> list:
    """A column's words, None where one is missing."""
    return [None if pd.isna(word) else word for word in fields[field]]


# -- good lists ------------------------------------------------------------------------------------------------------


def test_a_list_with_the_least_in_it_takes_the_defaults(load):
    sources = load(yaml_of())
    assert (sources.name, list(sources.studies), sources.duplicates) == ("small", ["a"], "error")
    study = sources.studies["a"]
    assert (study.files, study.licence, study.citation) == (["a.h5ad"], "MIT", "Somebody 2020")
    assert (study.columns, study.values, study.labels, study.exclude) == ({}, {}, {}, {})
    assert sources.quality_of("a") == Quality()
    assert sources.cohort_of("a") == "a"
    assert {name: settings.by for name, settings in sources.split_settings().items()} == {
        "donor": "donor",
        "study": "study",
        "cancer_type": "cancer_type",
        "random": "cell",
    }
    assert {name for name, settings in sources.split_settings().items() if settings.donors == "allow"} == {"random"}


def test_the_worked_example_loads():
    sources = SourceList.load(ROOT / "scripts" / "sources" / "small.yaml")
    assert len(sources.studies) == 27
    assert sources.cohort_of("kang8k_muscat") == sources.cohort_of("kang_ifnb_harmony") == "kang_2018"
    assert sources.quality_of("crc_infercnv").max_mitochondrial == 0.5
    assert sources.quality_of("pdac_card") == Quality()
    assert sources.studies["pdac_card"].labels["cell_type"]["T_cells_&_NK_cells"] is None


def test_a_studys_thresholds_stand_before_the_lists_and_these_before_the_defaults(load):
    text = yaml_of(
        "quality: {max_mitochondrial: null, min_genes: 7}",
        top="name: small\nquality: {min_genes: 5, max_genes_mads: 3}",
    )
    quality = load(text).quality_of("a")
    assert quality == Quality(max_mitochondrial=None, min_genes=7, max_genes_mads=3)


def test_a_split_that_says_nothing_of_duplicates_does_as_the_list_says(load):
    splits = "splits:\n  first: {by: donor}\n  second: {by: study, duplicates: allow}"
    settings = load(yaml_of(top=f"name: small\nduplicates: leave_out\n{splits}")).split_settings()
    assert {name: its.duplicates for name, its in settings.items()} == {"first": "leave_out", "second": "allow"}


def test_text_that_is_not_ascii_is_read_as_utf_8(load):
    assert load(yaml_of(citation="Müller 2020, 癌")).studies["a"].citation == "Müller 2020, 癌"


def test_an_alias_of_yaml_repeats_what_its_anchor_holds(load):
    top = "name: small\nsplits:\n  first: &it {by: study, held_out: [a]}\n  second: *it"
    splits = load(yaml_of(top=top)).split_settings()
    assert splits["first"] == splits["second"]
    assert splits["second"].held_out == ["a"]


def test_a_merge_key_of_yaml_gives_what_a_study_does_not_say_itself(load):
    basics = "files: [a.h5ad], licence: MIT, citation: X"
    text = f"name: small\nstudies:\n  a: &a {{{basics}, url: here}}\n  b: {{<<: *a, files: [b.h5ad], url: there}}\n"
    sources = load(text)
    second = sources.studies["b"]
    assert (second.files, second.url, second.licence) == (["b.h5ad"], "there", "MIT")
    assert sources.studies["a"].url == "here"


# -- bad lists -------------------------------------------------------------------------------------------------------

SPLIT = "name: small\nsplits: {{s: {{{}}}}}"
BAD = [
    pytest.param("name: [small\n", ["must be YAML", "line 2", "Mend it"], id="no_yaml"),
    pytest.param("name: small\n\tstudies: {}\n", ["must be YAML", "line 2", "Mend it"], id="tab"),
    pytest.param("name: a\n---\nname: b\n", ["must be YAML", "single document", "Mend it"], id="two_documents"),
    pytest.param("", ["`name` and `studies`", "got NoneType"], id="empty"),
    pytest.param("- name: small\n", ["`name` and `studies`", "got list"], id="a_list"),
    pytest.param("just words", ["`name` and `studies`", "got str"], id="words"),
    pytest.param(yaml_of("licence: BSD"), ["the key 'licence' twice", "line 7"], id="key_twice"),
    pytest.param(yaml_of() + "  a: {}\n", ["the key 'a' twice", "line 7"], id="study_twice"),
    pytest.param(
        yaml_of("columns: {cell_type: t}", "labels: {cell_type: {1: a, 1: b}}"), ["the key 1 twice"], id="word_twice"
    ),
    pytest.param(yaml_of(top=""), ["name is missing"], id="no_name"),
    pytest.param("name: small\n", ["studies is missing"], id="no_studies"),
    pytest.param("name: small\nstudies: {}\n", ["studies:", "at least 1", "got {}"], id="empty_studies"),
    pytest.param("name: small\nstudies: [a]\n", ["studies:", "dictionary", "got ['a']"], id="list_of_studies"),
    pytest.param(yaml_of(top="name: a b"), ["name:", "match pattern", "got 'a b'"], id="list_name_with_space"),
    pytest.param(yaml_of(licence=None), ["studies.a.licence is missing"], id="no_licence"),
    pytest.param(yaml_of(citation=None), ["studies.a.citation is missing"], id="no_citation"),
    pytest.param(yaml_of(files=None), ["studies.a.files is missing"], id="no_files"),
    pytest.param(yaml_of(licence='""'), ["studies.a.licence:", "at least 1 character", "got ''"], id="empty_licence"),
    pytest.param(
        yaml_of(citation='""'), ["studies.a.citation:", "at least 1 character", "got ''"], id="empty_citation"
    ),
    pytest.param(yaml_of(files="[]"), ["studies.a.files:", "at least 1 item", "got []"], id="empty_files"),
    pytest.param(yaml_of(files="a.h5ad"), ["studies.a.files:", "list", "got 'a.h5ad'"], id="files_as_text"),
    pytest.param(
        yaml_of("license: MIT", licence=None),
        ["studies.a.license is no setting", "did you mean 'licence'?", "studies.a.licence is missing"],
        id="unknown_setting_of_a_study",
    ),
    pytest.param(
        yaml_of(top="name: small\ndescripton: x"),
        ["descripton is no setting", "did you mean 'description'?"],
        id="unknown_setting_of_the_list",
    ),
    pytest.param(
        yaml_of(top="name: small\nquality: {min_gene: 3}"),
        ["quality.min_gene is no setting", "did you mean 'min_genes'?"],
        id="unknown_threshold",
    ),
    pytest.param(
        yaml_of("quality: {max_mitocondrial: 0.3}"),
        ["quality of a", "max_mitocondrial is no setting", "did you mean 'max_mitochondrial'?"],
        id="unknown_threshold_of_a_study",
    ),
    pytest.param(
        yaml_of("quality: {max_mitochondrial: 20}"),
        ["quality of a", "max_mitochondrial:", "less than or equal to 1", "got 20"],
        id="percent_of_a_study",
    ),
    *(
        pytest.param(
            yaml_of(top=f"name: small\nquality: {{{setting}: {value}}}"),
            [f"quality.{setting}:", f"got {shown or value}"],
            id=f"{setting}_{name}",
        )
        for setting, value, shown, name in (
            ("min_genes", "-1", None, "negative"),
            ("min_genes", "many", "'many'", "text"),
            ("min_genes", "1.5", None, "not_whole"),
            ("max_mitochondrial", "20", None, "as_percent"),
            ("max_mitochondrial", "-0.1", None, "negative"),
            ("max_mitochondrial", ".nan", "nan", "nan"),
            ("max_genes_mads", "0", None, "zero"),
            ("max_counts_mads", "-5", None, "negative"),
            ("min_sample_cells", "1", None, "one"),
            ("min_cells_per_gene", "-1", None, "negative"),
            ("doublets", "doubletfinder", "'doubletfinder'", "unknown"),
            ("expected_doublet_rate", "1", None, "all"),
            ("expected_doublet_rate", "0", None, "none"),
        )
    ),
    pytest.param(yaml_of("min_coverage: 70"), ["studies.a.min_coverage:", "got 70"], id="coverage_as_percent"),
    *(
        pytest.param(
            yaml_of(name=name), [f"studies.{name if shown is None else shown}.", f"got {got}"], id=f"study_name_{kind}"
        )
        for name, shown, got, kind in (
            ("a b", None, "'a b'", "with_space"),
            ("a/b", None, "'a/b'", "with_slash"),
            ("../a", None, "'../a'", "of_a_parent"),
            (".a", None, "'.a'", "hidden"),
            ('""', "", "''", "empty"),
            ("ä", None, "'ä'", "not_ascii"),
            ("a" * 81, None, repr("a" * 81), "too_long"),
            ("2019", None, "2019", "a_number"),
            ("true", "1", "True", "a_truth"),
        )
    ),
    pytest.param(yaml_of("cohort: a/b"), ["studies.a.cohort:", "got 'a/b'"], id="cohort_with_slash"),
    *(
        pytest.param(
            yaml_of(*((f"{setting}: {{donor: {value}}}",) if setting != "vocabularies" else ()), top=top),
            [f"{setting}: must be one of", *schema.CELL_FIELDS, "got 'donor'", "did you mean 'donor_id'?"],
            id=f"unknown_field_in_{setting}",
        )
        for setting, value, top in (
            ("columns", "x", "name: small"),
            ("values", "x", "name: small"),
            ("labels", "{x: y}", "name: small"),
            ("vocabularies", "", "name: small\nvocabularies: {donor: [x]}"),
        )
    ),
    pytest.param(
        yaml_of("columns: {tissue: t}", "values: {tissue: lung}"),
        ["studies.a: tissue must come from `columns` or `values`, got both", "keep one"],
        id="field_in_columns_and_values",
    ),
    pytest.param(
        yaml_of("values: {tissue: lung}", "labels: {tissue: {lung: liver}}"),
        ["studies.a: `labels` of tissue need a column in `columns`, got none", "name it or leave them out"],
        id="labels_without_a_column",
    ),
    pytest.param(
        yaml_of("values: {is_malignant: tumour}"),
        ["studies.a: is_malignant is true or false", "got is_malignant: 'tumour'"],
        id="malignancy_as_a_word",
    ),
    pytest.param(
        yaml_of('values: {is_malignant: "true"}'),
        ["studies.a: is_malignant is true or false", "got is_malignant: 'true'"],
        id="malignancy_as_text",
    ),
    pytest.param(
        yaml_of("values: {tissue: true}"),
        ["studies.a:", "other fields are text", "got tissue: True"],
        id="text_as_a_truth",
    ),
    pytest.param(yaml_of("exclude: {kind: doublet}"), ["studies.a.exclude.kind:", "got 'doublet'"], id="exclude_text"),
    pytest.param(
        yaml_of(top=SPLIT.format("by: donor, validation: 0.5, test: 0.5")),
        ["splits.s: validation and test must leave cells to train on, got 0.5 and 0.5"],
        id="nothing_to_train_on",
    ),
    pytest.param(
        yaml_of(top=SPLIT.format("by: cell, held_out: [a]")),
        ["splits.s:", "by cell holds no names out, got `held_out`", "leave it out"],
        id="held_out_by_cell",
    ),
    pytest.param(
        yaml_of(top=SPLIT.format("by: patient")), ["splits.s.by:", "'donor', 'study'", "got 'patient'"], id="unknown_by"
    ),
    pytest.param(yaml_of(top=SPLIT.format("test: 0.1")), ["splits.s.by is missing"], id="split_without_by"),
    pytest.param(yaml_of(top=SPLIT.format("by: donor, test: 0")), ["splits.s.test:", "got 0"], id="no_test"),
    pytest.param(
        yaml_of(top=SPLIT.format("by: donor, validation: -0.1")),
        ["splits.s.validation:", "got -0.1"],
        id="negative_share",
    ),
    pytest.param(
        yaml_of(top=SPLIT.format("by: study, heldout: [a]")),
        ["splits.s.heldout is no setting", "did you mean 'held_out'?"],
        id="unknown_setting_of_a_split",
    ),
    pytest.param(
        yaml_of(top=SPLIT.format("by: study, held_out: a")), ["splits.s.held_out:", "got 'a'"], id="held_out_text"
    ),
    pytest.param(
        yaml_of(top=SPLIT.format("by: donor, duplicates: drop")),
        ["splits.s.duplicates:", "'leave_out'", "got 'drop'"],
        id="unknown_duplicates",
    ),
]


@pytest.mark.parametrize(("text", "parts"), BAD)
def test_a_bad_list_is_an_error_that_names_the_place_and_what_was_got(text, parts, load, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "list.yaml"))) as caught:
        load(text)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert re.search(r"Mend it\.$|docs/corpus\.md (shows one|lists the settings)\.$", message), message


def test_all_that_is_wrong_is_told_at_once(load):
    with pytest.raises(ValueError, match=r"studies\.a\.licence is missing; studies\.a\.citation is missing"):
        load(yaml_of(licence=None, citation=None))


def test_bytes_that_are_no_utf_8_are_an_error(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_bytes(yaml_of(citation="Müller").encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be YAML, got .*utf-8.*list\.yaml"):
        SourceList.load(path)


@pytest.mark.parametrize("name", ["missing.yaml", ""], ids=["no_file", "folder"])
def test_no_list_is_an_error_that_names_the_path(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name)) + r".*Check the path"):
        SourceList.load(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [pytest.param("name: {{name}}\n", id="template"), pytest.param(yaml_of(citation="2019-02-30"), id="no_such_day")],
)
def test_what_yaml_cannot_make_a_value_of_is_an_error_that_names_the_file(text, load, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "list.yaml"))):
        load(text)


@pytest.mark.parametrize(
    ("lines", "place", "got"),
    [
        pytest.param(["values: {donor_id: 1}"], "donor_id", r"got (donor_id: )?1\b", id="value_1"),
        pytest.param(["values: {donor_id: 5}"], "donor_id", r"got (donor_id: )?5\b", id="value_5"),
        pytest.param(
            ["columns: {cell_type: t}", "labels: {cell_type: {x: true}}"], "cell_type", "True", id="label_true"
        ),
        pytest.param(["columns: {cell_type: t}", "labels: {cell_type: {x: 1}}"], "cell_type", r"\b1\b", id="label_1"),
    ],
)
def test_a_number_or_truth_where_text_is_due_is_an_error_that_shows_it(lines, place, got, load):
    with pytest.raises(ValueError, match=got) as caught:
        load(yaml_of(*lines))
    assert place in str(caught.value)


# -- files -----------------------------------------------------------------------------------------------------------


def two_studies(first: str, second: str = "[z.h5ad]") -> str:
    """Studies named against the alphabet, with these files."""
    return "name: small\nstudies:\n" + "".join(
        f"  {name}: {{files: {files}, licence: MIT, citation: X}}\n" for name, files in (("s2", first), ("s1", second))
    )


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_files_come_in_the_lists_order_of_studies_and_sorted_within_one(load, tmp_path):
    touch(tmp_path, "z.h5ad", "d/b.h5ad", "d/a.h5ad", "d/10.h5ad", "d/9.h5ad", "d/a.txt", "c.h5ad", "e/f/g.h5ad")
    sources = load(two_studies("[d/*.h5ad, c.h5ad, e/**/*.h5ad]"))
    assert sources.files(tmp_path) == [
        ("s2", "c.h5ad"),
        ("s2", "d/10.h5ad"),
        ("s2", "d/9.h5ad"),
        ("s2", "d/a.h5ad"),
        ("s2", "d/b.h5ad"),
        ("s2", "e/f/g.h5ad"),
        ("s1", "z.h5ad"),
    ]


def test_a_files_name_may_look_like_a_pattern(load, tmp_path):
    touch(tmp_path, "z.h5ad", "a[1].h5ad", "a1.h5ad")
    assert load(two_studies('["a[1].h5ad"]')).files(tmp_path)[0] == ("s2", "a[1].h5ad")


def test_files_and_patterns_without_a_file_are_an_error_that_names_them_and_the_folder(load, tmp_path):
    touch(tmp_path, "z.h5ad", "a.h5ad")
    sources = load(two_studies("[a.h5ad, b.h5ad, c/*.h5ad]", "[z.h5ad, y.h5ad]"))
    with pytest.raises(FileNotFoundError) as caught:
        sources.files(tmp_path)
    message = str(caught.value)
    assert "got nothing for 3: b.h5ad of s2, c/*.h5ad of s2, y.h5ad of s1." in message
    assert str(tmp_path.resolve()) in message
    assert "name another folder as the root, or mend the list" in message


def test_of_many_missing_files_the_first_five_are_named(load, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing for 7: 0 of s2, 1 of s2, 2 of s2, 3 of s2, 4 of s2, \.\.\.\."
    ):
        load(two_studies('["0", "1", "2", "3", "4", "5"]')).files(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        pytest.param("[z.h5ad]", "[z.h5ad]", "got z.h5ad in s2 and in s1", id="two_studies"),
        pytest.param("[z.h5ad, '*.h5ad']", "[b]", "got z.h5ad in s2 and in s2", id="pattern_of_one_study"),
        pytest.param("[z.h5ad]", "[./z.h5ad]", "got z.h5ad in s2 and in s1", id="spelled_otherwise"),
    ],
)
def test_a_file_listed_twice_is_an_error_that_names_both_studies(first, second, message, load, tmp_path):
    touch(tmp_path, "z.h5ad", "b")
    with pytest.raises(ValueError, match=message):
        load(two_studies(first, second)).files(tmp_path)


# -- a study's words -------------------------------------------------------------------------------------------------


def test_every_field_has_a_column_and_comes_from_obs_or_the_list_or_is_missing(study):
    obs = pd.DataFrame({"who": ["p1", "p2"]}, index=["x", "y"])
    fields, seen = cell_fields(
        obs, study("columns: {donor_id: who}", "values: {tissue: lung, is_malignant: false}"), "f"
    )
    assert list(fields) == list(schema.CELL_FIELDS)
    assert words(fields, "donor_id") == ["p1", "p2"]
    assert words(fields, "tissue") == ["lung", "lung"]
    assert words(fields, "is_malignant") == [False, False]
    assert words(fields, "assay") == [None, None]
    assert seen == {"donor_id": ["p1", "p2"]}


def test_words_are_renamed_several_to_one_and_null_to_missing(study):
    obs = pd.DataFrame({"kind": ["CD4 T", "CD8 T", "B", "?", "NK"]})
    settings = study("columns: {cell_type: kind}", "labels: {cell_type: {CD4 T: T cell, CD8 T: T cell, '?': null}}")
    fields, seen = cell_fields(obs, settings, "f")
    assert words(fields, "cell_type") == ["T cell", "T cell", "B", None, "NK"]
    assert fields["cell_type"].cat.categories.tolist() == ["B", "NK", "T cell"]
    assert sorted(seen["cell_type"]) == ["?", "B", "CD4 T", "CD8 T", "NK"]


def test_words_may_swap_their_names(study):
    settings = study("columns: {cell_type: kind}", "labels: {cell_type: {a: b, b: a}}")
    assert words(cell_fields(pd.DataFrame({"kind": ["a", "b"]}), settings, "f")[0], "cell_type") == ["b", "a"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        pytest.param(["a", np.nan, None, "nan", "NaN", "None", "<NA>", "", "  "], ["a"] + [None] * 8, id="text"),
        pytest.param(pd.Categorical(["a", None], categories=["a", "unused"]), ["a", None], id="categorical"),
        pytest.param(pd.array(["a", pd.NA], dtype="string"), ["a", None], id="string_type"),
        pytest.param([np.nan, np.nan], [None, None], id="nothing_at_all"),
        pytest.param([" a", "a ", "a"], ["a", "a", "a"], id="spaces_around"),
        pytest.param([1015.0, np.nan, 7.0], ["1015", None, "7"], id="whole_numbers_with_a_gap"),
        pytest.param(np.array([1015, 7], dtype=np.int32), ["1015", "7"], id="whole_numbers"),
        pytest.param(np.array([1.5, 2.0], dtype=np.float32), ["1.5", "2"], id="numbers"),
        pytest.param(["007", "1e3", "1015.0"], ["007", "1e3", "1015.0"], id="text_of_digits"),
        pytest.param([1, "a", None], ["1", "a", None], id="of_several_types"),
        pytest.param([True, False], ["True", "False"], id="truths"),
    ],
)
def test_columns_are_compared_as_text_and_nothing_is_missing(column, expected, study):
    fields, seen = cell_fields(pd.DataFrame({"who": column}), study("columns: {donor_id: who}"), "f")
    assert words(fields, "donor_id") == expected
    assert set(expected) - {None} <= set(seen["donor_id"])
    assert not {"nan", "NaN", "None", "<NA>", ""} & set(seen["donor_id"])


def test_unused_categories_are_no_words_that_a_label_must_match(study):
    obs = pd.DataFrame({"kind": pd.Categorical(["a"], categories=["a", "b"])})
    fields, _ = cell_fields(obs, study("columns: {cell_type: kind}", "labels: {cell_type: {b: c}}"), "f")
    assert words(fields, "cell_type") == ["a"]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        pytest.param([True, False, None], "", id="truths_with_a_gap"),
        pytest.param(["True", "false", ""], "", id="text"),
        pytest.param(["tumour", "normal", "?"], "{tumour: true, normal: false, '?': null}", id="words"),
        pytest.param([1, 0, 2], "{1: true, 0: false, 2: null}", id="numbers"),
        pytest.param([1.0, 0.0, np.nan], "{1: true, 0: false}", id="numbers_with_a_gap"),
        pytest.param([False, True, None], "{true: false, false: true}", id="truths_turned_round"),
    ],
)
def test_malignancy_is_read_from_truths_and_words(column, labels, study):
    lines = ["columns: {is_malignant: m}", *([f"labels: {{is_malignant: {labels}}}"] if labels else [])]
    fields, _ = cell_fields(pd.DataFrame({"m": column}), study(*lines), "f")
    assert words(fields, "is_malignant") == [True, False, None]
    assert {type(word) for word in fields["is_malignant"].cat.categories} <= {bool, np.bool_}


def test_a_word_of_malignancy_that_is_not_mapped_is_an_error(study):
    settings = study("columns: {is_malignant: m}", "labels: {is_malignant: {tumour: true}}")
    with pytest.raises(
        ValueError, match=r"true, false or null, got maybe, normal in obs\['m'\] of some\.h5ad.*`labels`"
    ):
        cell_fields(pd.DataFrame({"m": ["tumour", "normal", "maybe"]}), settings, "some.h5ad")


@pytest.mark.parametrize(
    "key", [pytest.param("{yes: true, no: false}", id="plain"), pytest.param("{'yes': true, 'no': false}", id="quoted")]
)
def test_the_words_yes_and_no_of_a_column_can_be_named(key, study):
    settings = study("columns: {is_malignant: m}", f"labels: {{is_malignant: {key}}}")
    fields, _ = cell_fields(pd.DataFrame({"m": ["yes", "no"]}), settings, "f")
    assert words(fields, "is_malignant") == [True, False]


@pytest.mark.parametrize("key", ["1015", "'1015'", "1015.0"], ids=["number", "text", "float"])
def test_numbers_as_keys_name_the_numbers_of_a_column(key, study):
    settings = study("columns: {donor_id: who}", f"labels: {{donor_id: {{{key}: first}}}}")
    fields, _ = cell_fields(pd.DataFrame({"who": [1015.0, np.nan, 3.0]}), settings, "f")
    assert words(fields, "donor_id") == ["first", None, "3"]


def test_a_missing_column_is_an_error_that_suggests_a_similar_one(study):
    obs = pd.DataFrame({"donor": ["a"], "celltype": ["b"]})
    with pytest.raises(ValueError, match=r"`columns\.cell_type` must name a column of obs, got 'cell_type'") as caught:
        cell_fields(obs, study("columns: {donor_id: donor, cell_type: cell_type}"), "some.h5ad")
    message = str(caught.value)
    assert "did you mean 'celltype'?" in message
    assert "some.h5ad has donor, celltype. Mend the source list." in message


def test_a_missing_column_of_an_empty_obs_is_an_error_too(study):
    with pytest.raises(ValueError, match=r"got 'who'; f has none\."):
        cell_fields(pd.DataFrame(index=["x"]), study("columns: {donor_id: who}"), "f")


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        pytest.param("{}", [0, 0, 0, 0], id="nothing"),
        pytest.param("{kind: [DBL]}", [1, 0, 0, 0], id="one_word"),
        pytest.param("{kind: [DBL, SNG]}", [1, 1, 0, 0], id="two_words"),
        pytest.param("{kind: [DBL], batch: [3]}", [1, 0, 1, 0], id="two_columns_a_number"),
        pytest.param("{flag: [true]}", [0, 1, 0, 1], id="a_truth"),
        pytest.param("{kind: []}", [0, 0, 0, 0], id="no_words"),
        pytest.param("{empty: [x]}", [0, 0, 0, 0], id="column_without_words"),
        pytest.param("{kind: [SN]}", [0, 0, 0, 0], id="part_of_a_word"),
    ],
)
def test_cells_with_an_excluded_word_are_excluded(exclude, expected, study):
    obs = pd.DataFrame(
        {
            "kind": ["DBL", "SNG", None, "NEG"],
            "batch": [1.0, np.nan, 3.0, 4.0],
            "flag": [False, True, False, True],
            "empty": [np.nan] * 4,
        }
    )
    excluded = is_excluded(obs, study(f"exclude: {exclude}"), "f")
    assert excluded.dtype == bool
    assert excluded.tolist() == [bool(value) for value in expected]


def test_a_missing_column_to_exclude_by_is_an_error(study):
    with pytest.raises(ValueError, match=r"`exclude` must name a column of obs, got 'kinds'; did you mean 'kind'\?"):
        is_excluded(pd.DataFrame({"kind": ["a"]}), study("exclude: {kinds: [a]}"), "f")


# -- vocabularies and typos ------------------------------------------------------------------------------------------


def test_words_of_the_vocabulary_pass_and_other_fields_are_free():
    counts = {"tissue": {"lung": 3}, "cell_type": {"anything": 1}}
    check_vocabulary(counts, {"tissue": ["lung", "liver"]}, "f")
    with pytest.raises(ValueError, match="cell_type must be"):
        check_vocabulary(counts, {"cell_type": ["T cell"]}, "f")


def test_a_word_outside_the_vocabulary_is_an_error_that_suggests_one():
    with pytest.raises(
        ValueError, match=r"tissue must be of the list's vocabulary, got 'lungs'; did you mean 'lung'\? in f"
    ):
        check_vocabulary({"tissue": {"lungs": 2, "liver": 1}}, {"tissue": ["lung", "liver"]}, "f")


def test_labels_that_no_cell_has_are_told_with_a_suggestion(load):
    sources = load(yaml_of("columns: {cell_type: t}", "labels: {cell_type: {T cel: T cell, B: B cell, NK: null}}"))
    lines = check_labels_occur(sources, {"a": {"cell_type": {"T cell", "B"}}})
    assert lines == [
        "a: `labels` of cell_type name 'T cel', which no cell has; did you mean 'T cell'?",
        "a: `labels` of cell_type name 'NK', which no cell has",
    ]
    assert check_labels_occur(sources, {"a": {"cell_type": {"T cel", "B", "NK", "more"}}}) == []


def test_labels_of_studies_that_were_not_read_are_not_judged(load):
    sources = load(yaml_of("columns: {cell_type: t}", "labels: {cell_type: {B: B cell}}"))
    assert check_labels_occur(sources, {}) == []


# -- what decides the tokens -----------------------------------------------------------------------------------------

FULL = [
    "columns: {donor_id: who, cell_type: kind, is_malignant: m}",
    "labels: {cell_type: {1: one, b: null}, is_malignant: {t: true, n: false}}",
    "exclude: {kind: [1, x]}",
]


def test_resolved_settings_survive_json(load):
    settings = resolved_settings(load(yaml_of(*FULL, "values: {tissue: lung}")), "a")
    assert json.loads(json.dumps(settings)) == settings
    rebuilt = Study.model_construct(**{key: value for key, value in settings.items() if key != "quality"})
    obs = pd.DataFrame({"who": ["p"], "kind": [1], "m": ["t"]})
    fields, _ = cell_fields(obs, rebuilt, "f")
    assert [words(fields, field)[0] for field in ("donor_id", "cell_type", "is_malignant")] == ["p", "one", True]


@pytest.mark.parametrize(
    ("lines", "top"),
    [
        pytest.param(["layer: counts"], "", id="layer"),
        pytest.param(["gene_column: symbol"], "", id="gene_column"),
        pytest.param(["min_coverage: 0.5"], "", id="min_coverage"),
        pytest.param(["values: {tissue: lung}"], "", id="values"),
        pytest.param(["columns: {tissue: t}"], "", id="columns"),
        pytest.param(["columns: {cell_type: kind}", "labels: {cell_type: {x: y}}"], "", id="labels"),
        pytest.param(["exclude: {kind: [x]}"], "", id="exclude"),
        pytest.param(["quality: {min_genes: 3}"], "", id="quality_of_the_study"),
        pytest.param([], "\nquality: {min_genes: 3}", id="quality_of_the_list"),
        pytest.param([], "\nquality: {doublets: scrublet}", id="doublets"),
    ],
)
def test_what_decides_tokens_or_labels_changes_the_resolved_settings(lines, top, load):
    before = resolved_settings(load(yaml_of("columns: {cell_type: kind}")), "a")
    lines = lines if any(line.startswith("columns") for line in lines) else ["columns: {cell_type: kind}", *lines]
    after = resolved_settings(load(yaml_of(*lines, top=f"name: small{top}")), "a")
    assert after != before


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(yaml_of(*FULL, licence="GPL"), id="licence"),
        pytest.param(yaml_of(*FULL, citation="Somebody else"), id="citation"),
        pytest.param(yaml_of(*FULL, "cohort: shared"), id="cohort"),
        pytest.param(yaml_of(*FULL, "url: https://example.org"), id="url"),
        pytest.param(yaml_of(*FULL, files="[a.h5ad, b.h5ad]"), id="another_file"),
        pytest.param(yaml_of(*FULL, f"quality: {{min_genes: {Quality().min_genes}}}"), id="a_default_written_out"),
        pytest.param(yaml_of(*FULL, top="name: other\ndescription: x\nlicence: mit"), id="the_lists_name"),
        pytest.param(yaml_of(*FULL, top="name: small\nduplicates: allow"), id="duplicates"),
        pytest.param(yaml_of(*FULL, top="name: small\nsplits: {s: {by: study}}"), id="splits"),
        pytest.param(yaml_of(*FULL, top="name: small\nvocabularies: {tissue: [lung]}"), id="vocabularies"),
        pytest.param(yaml_of(*FULL) + "  b: {files: [c], licence: X, citation: Y}\n", id="another_study"),
    ],
)
def test_what_decides_neither_tokens_nor_labels_leaves_the_resolved_settings(changed, load):
    before = resolved_settings(load(yaml_of(*FULL)), "a")
    assert resolved_settings(load(changed), "a") == before
