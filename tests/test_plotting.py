"""Pictures: what is in them, looked up in the figures as they are saved."""

import logging
import time

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from panfoma_hf import inference, plotting
from panfoma_hf.plotting import (
    MISSING,
    UNASSIGNED,
    name_colors,
    save_confusion_matrix,
    save_gene_ranking,
    save_label_composition,
    save_umap,
)


GREY, LIGHT_GREY = "#8c8c8c", "#dedede"
STARTS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    found, save = [], Figure.savefig

    def saved(self, *arguments, **options):
        found.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


@pytest.fixture
def cells() -> ad.AnnData:
    """90 cells with a place each, true and called names, a score, donors and a batch."""
    rng = np.random.default_rng(0)
    true = np.array(["B cell", "T cell", "mast"], dtype=object)[np.arange(90) % 3]
    called = true.copy()
    called[::10] = UNASSIGNED
    called[5] = None
    score = rng.random(90)
    score[7] = np.nan
    obs = {
        "cell_type": pd.Categorical(true),
        "panfoma_cell_type": pd.Categorical(called, categories=["B cell", "NK cell", "T cell", "mast", UNASSIGNED]),
        "score": score,
        "donor_id": [f"donor {1 + index % 11}" for index in range(90)],
        "batch": np.arange(90) % 2,
        "is_tumour": np.arange(90) % 2 == 0,
    }
    cells = ad.AnnData(obs=pd.DataFrame(obs, index=[f"cell-{index}" for index in range(90)]))
    cells.obsm["X_umap"] = rng.normal(size=(90, 2)).astype(np.float32)
    cells.obsm["X_own"] = rng.normal(size=(90, 5)).astype(np.float32)
    return cells


def panels(figure: Figure) -> dict:
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def colors_of_cells(axis, cells: ad.AnnData) -> list[str]:
    """The colour that each cell is drawn in; a cell that is not drawn, or drawn twice, fails."""
    found = {}
    for dots in axis.collections:
        places = np.asarray(dots.get_offsets())
        colors = dots.get_facecolor()
        colors = np.broadcast_to(colors, (len(places), 4)) if len(colors) == 1 else colors
        for place, color in zip(places, colors, strict=True):
            assert tuple(place) not in found
            found[tuple(place)] = to_hex(color)
    return [found[tuple(place)] for place in cells.obsm["X_umap"].astype(float)]


def legend_of(axis) -> dict[str, str]:
    legend = axis.get_legend()
    if legend is None:
        return {}
    return {
        text.get_text(): to_hex(line.get_color())
        for text, line in zip(legend.texts, legend.legend_handles, strict=True)
    }


# -- UMAP ------------------------------------------------------------------------------------------------------------


def test_each_cell_has_the_colour_of_its_name_in_the_legend_whatever_the_panel(cells, figures, tmp_path):
    columns = ["cell_type", "panfoma_cell_type", "donor_id"]
    save_umap(cells, tmp_path / "umap.png", columns, embedding="X_umap")
    drawn = panels(figures[0])
    legends = {column: legend_of(drawn[column]) for column in columns}
    legends["cell_type"] = legends["panfoma_cell_type"]
    for column in columns:
        names = cells.obs[column].astype(object).fillna(MISSING)
        assert colors_of_cells(drawn[column], cells) == [legends[column][name] for name in names]
        assert len(set(legends[column].values())) == len(legends[column])


def test_panels_that_share_names_share_a_legend_and_others_have_their_own(cells, figures, tmp_path):
    columns = ["cell_type", "donor_id", "panfoma_cell_type", "score"]
    save_umap(cells, tmp_path / "umap.png", columns, embedding="X_umap")
    drawn = panels(figures[0])
    assert legend_of(drawn["cell_type"]) == {}
    assert list(legend_of(drawn["panfoma_cell_type"])) == ["B cell", "mast", "T cell", UNASSIGNED, MISSING]
    assert list(legend_of(drawn["donor_id"])) == [f"donor {number}" for number in range(1, 12)]  # 2 before 10


def test_unassigned_is_grey_and_what_is_missing_lies_light_grey_below(cells, figures, tmp_path):
    save_umap(cells, tmp_path / "umap.png", "panfoma_cell_type", embedding="X_umap")
    axis = panels(figures[0])["panfoma_cell_type"]
    colors = np.array(colors_of_cells(axis, cells))
    assert set(colors[::10]) == {GREY}
    assert colors[5] == LIGHT_GREY
    assert len(axis.collections[0].get_offsets()) == 1
    assert list(legend_of(axis).values())[-2:] == [GREY, LIGHT_GREY]
    assert not {GREY, LIGHT_GREY} & set(list(legend_of(axis).values())[:-2])


def test_names_are_drawn_in_an_order_by_chance_that_is_always_the_same(cells, figures, tmp_path):
    cells = cells[np.argsort(cells.obs["cell_type"].to_numpy())].copy()
    for _ in range(2):
        save_umap(cells, tmp_path / "umap.png", "cell_type", embedding="X_umap")
    first, second = (panels(figure)["cell_type"].collections[-1] for figure in figures)
    np.testing.assert_array_equal(first.get_offsets(), second.get_offsets())
    assert len({to_hex(color) for color in first.get_facecolor()[-20:]}) == 3


def test_numbers_have_a_colour_bar_and_a_colour_by_their_amount(cells, figures, tmp_path):
    save_umap(cells, tmp_path / "umap.png", ["score", "cell_type"], embedding="X_umap")
    axis = panels(figures[0])["score"]
    score = cells.obs["score"].to_numpy()
    scaled = (score - np.nanmin(score)) / (np.nanmax(score) - np.nanmin(score))
    expected = [to_hex(color) for color in matplotlib.colormaps["viridis"](scaled)]
    expected[7] = LIGHT_GREY
    assert colors_of_cells(axis, cells) == expected
    bar = next(axis for axis in figures[0].axes if axis.get_label() == "<colorbar>")
    np.testing.assert_allclose(bar.get_ylim(), (np.nanmin(score), np.nanmax(score)))
    assert legend_of(axis) == {"missing (1 cells)": LIGHT_GREY}
    assert list(legend_of(panels(figures[0])["cell_type"])) == ["B cell", "mast", "T cell"]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        pytest.param(np.arange(90) % 12, [str(number) for number in range(12)], id="few_whole_numbers"),
        pytest.param(np.arange(90), None, id="many_whole_numbers"),
        pytest.param(np.arange(90) % 2 / 2, None, id="fractions"),
        pytest.param(pd.Categorical(np.arange(90) % 30), [str(number) for number in range(30)], id="categories"),
        pytest.param(np.arange(90) % 2 == 0, ["False", "True"], id="yes_or_no"),
        pytest.param(pd.array([1, None, 2] * 30, dtype="Int64"), ["1", "2", MISSING], id="nullable"),
    ],
)
def test_what_counts_as_names(values, names, cells, figures, tmp_path):
    cells.obs["column"] = values
    save_umap(cells, tmp_path / "umap.png", "column", embedding="X_umap")
    axis = panels(figures[0])["column"]
    assert list(legend_of(axis)) == (names or [])
    assert ("<colorbar>" in {axis.get_label() for axis in figures[0].axes}) == (names is None)


@pytest.mark.parametrize("count", [20, 21, 70])
def test_many_names_have_as_many_colours_and_none_is_grey(count, cells, figures, tmp_path):
    cells.obs["cluster"] = pd.Categorical(np.arange(90) % count)
    save_umap(cells, tmp_path / "umap.png", "cluster", embedding="X_umap")
    colors = legend_of(panels(figures[0])["cluster"])
    assert list(colors) == [str(number) for number in range(count)]
    assert len(set(colors.values())) == count
    assert all(np.ptp(matplotlib.colors.to_rgb(color)) > 0.1 for color in colors.values())


def test_a_name_has_the_same_colour_in_all_pictures_of_the_same_cells(cells, figures, tmp_path):
    save_umap(cells, tmp_path / "1.png", ["panfoma_cell_type"], embedding="X_umap")
    save_umap(cells, tmp_path / "2.png", ["donor_id", "cell_type"], embedding="X_umap")
    save_label_composition(cells, tmp_path / "3.png", "cell_type", "donor_id")
    save_label_composition(cells, tmp_path / "4.png", "panfoma_cell_type", "batch")
    of_figures = [legend_of(axis) for figure in figures for axis in figure.axes]
    for name in ("B cell", "T cell", "mast"):
        colors = [legend[name] for legend in of_figures if name in legend]
        assert len(colors) == 4
        assert len(set(colors)) == 1


def test_names_of_no_kin_do_not_share_the_palette(cells):
    of_donors, of_types = name_colors(cells.obs, "donor_id"), name_colors(cells.obs, "cell_type")
    assert of_donors["donor 1"] == of_types["B cell"]
    assert of_types == name_colors(cells.obs, "panfoma_cell_type")
    assert "NK cell" in of_types  # which no cell is called


def test_a_column_of_barcodes_is_left_alone(cells, caplog):
    before = name_colors(cells.obs, "cell_type")
    cells.obs["barcode"] = cells.obs_names
    assert name_colors(cells.obs, "cell_type") == before
    with caplog.at_level(logging.WARNING):
        name_colors(
            cells.obs.assign(a=[f"a{index % 70}" for index in range(90)], b=["a1", *"bcdefghijklm" * 8][:90]), "a"
        )
    assert "77 colours are told apart, got 82 names like those of a" in caplog.text


def test_dots_are_smaller_the_more_there_are(figures, tmp_path):
    sizes = []
    for count in (100, 5_000, 50_000):
        cells = ad.AnnData(obs=pd.DataFrame({"x": np.zeros(count)}, index=np.arange(count).astype(str)))
        cells.obsm["X_umap"] = np.random.default_rng(0).normal(size=(count, 2))
        save_umap(cells, tmp_path / "umap.png", "x", embedding="X_umap")
        sizes.append(panels(figures[-1])["x"].collections[0].get_sizes()[0])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 10 * sizes[2] > 0


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_a_picture_of_100_000_cells_can_be_opened(kind, tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"name": rng.choice(list("abc"), 100_000), "score": rng.random(100_000)})
    cells = ad.AnnData(obs=obs.set_index(obs.index.astype(str)), obsm={"X_umap": rng.normal(size=(100_000, 2))})
    started = time.perf_counter()
    save_umap(cells, tmp_path / f"umap.{kind}", ["name", "score"], embedding="X_umap")
    assert time.perf_counter() - started < 60
    assert (tmp_path / f"umap.{kind}").stat().st_size < 5_000_000  # 100,000 circles take 20 MB


def test_a_umap_of_real_cells_is_written_and_parts_them_by_type(baron, tmp_path):
    counts = baron.X.toarray()
    counts = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    left, values, _ = np.linalg.svd(counts - counts.mean(0), full_matrices=False)
    baron = ad.AnnData(obs=baron.obs, obsm={"X_panfoma": left[:, :15] * values[:15]})
    save_umap(baron, tmp_path / "umap.png", ["cell_type"])
    points = baron.obsm["X_umap"].copy()
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(len(points), np.inf))
    types = baron.obs["cell_type"].astype(str).to_numpy()
    assert (types[distances.argmin(1)] == types).mean() > 0.8
    save_umap(baron, tmp_path / "umap.png", ["cell_type"])
    np.testing.assert_array_equal(baron.obsm["X_umap"], points)


def test_a_umap_that_is_there_is_drawn_as_it_is(cells, tmp_path):
    before = cells.obsm["X_umap"].copy()
    save_umap(cells, tmp_path / "umap.png", "cell_type", embedding="X_umap")
    np.testing.assert_array_equal(cells.obsm["X_umap"], before)
    save_umap(cells, tmp_path / "umap.png", "cell_type", embedding="X_own")
    assert not np.array_equal(cells.obsm["X_umap"], before)


def test_nothing_but_the_umap_is_written_to_the_cells(cells, tmp_path):
    obs = cells.obs.copy()
    save_umap(cells, tmp_path / "umap.png", ["cell_type", "score", "batch", "is_tumour"], embedding="X_own")
    pd.testing.assert_frame_equal(cells.obs, obs)
    assert list(cells.uns) == []


@pytest.mark.parametrize("count", [5, 6, 12])
def test_a_few_cells_have_a_umap(count, cells, tmp_path):
    save_umap(cells[:count].copy(), tmp_path / "umap.png", "cell_type", embedding="X_own")
    assert (tmp_path / "umap.png").is_file()


def changed(cells: ad.AnnData, **columns) -> ad.AnnData:
    for name, values in columns.items():
        cells.obs[name] = values
    return cells


BAD_UMAPS = {
    "column": (lambda cells: cells, ["cell_tpye"], "X_own", "got 'cell_tpye'; there are cell_type, panfoma_cell_type"),
    "columns": (lambda cells: cells, [], "X_own", "At least one column"),
    "key": (lambda cells: cells, ["score"], "X_panfoma", r"got 'X_panfoma'; there are \['X_own', 'X_umap'\]"),
    "one_cell": (lambda cells: cells[:1].copy(), ["score"], "X_own", "at least 5 cells, got 1"),
    "all_missing": (lambda cells: changed(cells, a=[None] * 90), ["a"], "X_own", "got 90 missing ones in 'a'"),
    "no_number": (lambda cells: changed(cells, a=np.nan), ["a"], "X_own", "got 90 missing ones in 'a'"),
    "infinite": (lambda cells: changed(cells, a=np.inf), ["a"], "X_own", "got no such cell in 'a'"),
    "barcodes": (lambda cells: changed(cells, a=cells.obs_names), ["a"], "X_own", "At most 77 names .* got 90 in 'a'"),
}


@pytest.mark.parametrize(("change", "colors", "embedding", "message"), BAD_UMAPS.values(), ids=BAD_UMAPS)
def test_what_cannot_be_drawn_is_refused_and_no_umap_written(change, colors, embedding, message, cells, tmp_path):
    cells = change(cells)
    del cells.obsm["X_umap"]
    with pytest.raises(ValueError, match=message.replace(", 'X_umap'", "")):
        save_umap(cells, tmp_path / "umap.png", colors, embedding=embedding)
    assert "X_umap" not in cells.obsm
    assert not list(tmp_path.iterdir())


def test_an_embedding_that_is_not_finite_is_refused(cells, tmp_path):
    cells.obsm["X_own"][3, 2] = np.nan
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity in obsm\['X_own'\]"):
        save_umap(cells, tmp_path / "umap.png", "score", embedding="X_own")


def test_an_embedding_of_one_column_is_refused(cells, tmp_path):
    cells.obsm["X_own"] = cells.obsm["X_own"][:, :1]
    with pytest.raises(ValueError, match=r"at least two columns, got \(90, 1\) in obsm\['X_own'\]"):
        save_umap(cells, tmp_path / "umap.png", "score", embedding="X_own")


# -- shares of names -------------------------------------------------------------------------------------------------


def bars(axis) -> dict[str, np.ndarray]:
    """(groups,), left edge and width of the bars of each name."""
    return {bar.get_label(): np.array([[part.get_x(), part.get_width()] for part in bar]) for bar in axis.containers}


def test_shares_are_those_of_the_cells_and_add_up(cells, figures, tmp_path):
    cells.obs.loc["cell-0", "donor_id"] = None
    save_label_composition(cells, tmp_path / "shares.png", "panfoma_cell_type", "donor_id")
    axis = figures[0].axes[0]
    groups = [label.get_text() for label in axis.get_yticklabels()]
    assert groups == [*(f"donor {number}" for number in range(1, 12)), MISSING]
    found = bars(axis)
    assert list(found) == ["B cell", "mast", "T cell", UNASSIGNED, MISSING] == list(legend_of(axis))
    names = cells.obs["panfoma_cell_type"].astype(object).fillna(MISSING)
    donors = cells.obs["donor_id"].fillna(MISSING)
    reached = np.zeros(len(groups))
    for name, places in found.items():
        np.testing.assert_allclose(places[:, 0], reached, atol=1e-9)
        np.testing.assert_allclose(places[:, 1], [(names[donors == group] == name).mean() for group in groups])
        reached += places[:, 1]
    np.testing.assert_allclose(reached, 1)
    assert [text.get_text() for text in axis.texts] == [str((donors == group).sum()) for group in groups]


def test_bars_have_the_colours_of_the_legend(cells, figures, tmp_path):
    save_label_composition(cells, tmp_path / "shares.png", "panfoma_cell_type", "batch")
    axis = figures[0].axes[0]
    assert {bar.get_label(): to_hex(bar[0].get_facecolor()) for bar in axis.containers} == legend_of(axis)
    assert legend_of(axis)[UNASSIGNED] == GREY


@pytest.mark.parametrize(
    ("label", "groupby", "message"),
    [
        pytest.param("cell_tpye", "donor_id", "got 'cell_tpye'; there are cell_type", id="no_label"),
        pytest.param("cell_type", "donor", "`groupby` is a column .* got 'donor'; .* donor_id", id="no_group"),
        pytest.param("cell_type", "empty", "got 'empty'; columns with one are cell_type", id="no_groups"),
        pytest.param("score", "donor_id", r"got numbers in 'score'. .*astype\('category'\)", id="numbers"),
        pytest.param("empty", "donor_id", "got 90 missing ones in 'empty'", id="all_missing"),
    ],
)
def test_shares_need_names_and_groups(label, groupby, message, cells, tmp_path):
    cells.obs["empty"] = None
    with pytest.raises(ValueError, match=message):
        save_label_composition(cells, tmp_path / "shares.png", label, groupby)


# -- confusion matrix and ranking ------------------------------------------------------------------------------------


def numbers(axis) -> dict[tuple[str, str], int]:
    rows = [label.get_text() for label in axis.get_yticklabels()]
    columns = [label.get_text() for label in axis.get_xticklabels()]
    places = {tuple(int(at) for at in text.get_position()): int(text.get_text()) for text in axis.texts}
    return {(rows[row], columns[column]): count for (column, row), count in places.items()}


def test_a_confusion_matrix_counts_cells_and_has_unassigned_last(figures, tmp_path):
    true = ["T cell", "T cell", "alpha", "alpha", "alpha"]
    predicted = ["T cell", UNASSIGNED, "alpha", "alpha", "beta"]
    save_confusion_matrix(pd.Categorical(true), np.array(predicted), tmp_path / "matrix.png")
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["alpha", "beta", "T cell", UNASSIGNED]
    assert numbers(axis) == {
        ("alpha (3)", "alpha"): 2,
        ("alpha (3)", "beta"): 1,
        ("T cell (2)", "T cell"): 1,
        ("T cell (2)", UNASSIGNED): 1,
    }
    np.testing.assert_allclose(axis.images[0].get_array(), [[2 / 3, 1 / 3, 0, 0], [0, 0, 0.5, 0.5]])


def test_a_large_confusion_matrix_leaves_out_what_is_rare(figures, tmp_path):
    names = [f"type {number}" for number in range(30)]
    true = np.repeat(names, 200)
    predicted = true.copy()
    predicted[0], predicted[200:202] = "type 5", "type 6"
    save_confusion_matrix(true, predicted, tmp_path / "matrix.png")
    found = numbers(figures[0].axes[0])
    assert len(found) == 31
    assert found["type 1 (200)", "type 6"] == 2
    assert ("type 0 (200)", "type 5") not in found
    assert max(figures[0].get_size_inches()) < 14


@pytest.mark.parametrize(("true", "predicted"), [([], []), (["a"], ["a", "b"])])
def test_a_confusion_matrix_needs_two_names_of_each_cell(true, predicted, tmp_path):
    with pytest.raises(ValueError, match="Each cell needs a true and a predicted name, got"):
        save_confusion_matrix(true, predicted, tmp_path / "matrix.png")


def ranking(groups: dict[str, int]) -> pd.DataFrame:
    rows = [
        {"group": group, "gene": f"GENE{rank}", "score": 2 / rank, "share": 0.5, "rank": rank}
        for group, count in groups.items()
        for rank in range(1, count + 1)
    ]
    return pd.DataFrame(rows)


def test_the_best_gene_is_on_top_and_level_in_all_panels(figures, tmp_path):
    save_gene_ranking(ranking({"B cell": 12, "mast": 3}), tmp_path / "genes.png", num_genes=8)
    drawn = panels(figures[0])
    for group, count in (("B cell", 8), ("mast", 3)):
        axis = drawn[group]
        assert [label.get_text() for label in axis.get_yticklabels()] == [f"GENE{rank}" for rank in range(count, 0, -1)]
        np.testing.assert_allclose(axis.get_ylim()[1] - (count - 1), 0.7)
        assert np.ptp(axis.get_ylim()) == pytest.approx(8.4)


def test_a_ranking_needs_the_table_of_gene_scores(tmp_path):
    with pytest.raises(ValueError, match="got one without share, rank"):
        save_gene_ranking(ranking({"B cell": 2})[["group", "gene", "score"]], tmp_path / "genes.png")


# -- files -----------------------------------------------------------------------------------------------------------


def draw_umap(cells: ad.AnnData, path) -> None:
    save_umap(cells, path, ["cell_type", "score"], embedding="X_umap")


def draw_composition(cells: ad.AnnData, path) -> None:
    save_label_composition(cells, path, "cell_type", "batch")


def draw_matrix(cells: ad.AnnData, path) -> None:
    save_confusion_matrix(cells.obs["cell_type"], cells.obs["panfoma_cell_type"], path)


def draw_ranking(cells: ad.AnnData, path) -> None:
    save_gene_ranking(ranking({"B cell": 3}), path)


DRAWN = [draw_umap, draw_composition, draw_matrix, draw_ranking]


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("draw", DRAWN)
def test_pictures_are_written_in_three_formats(draw, kind, cells, tmp_path):
    draw(cells, str(tmp_path / f"picture.{kind}"))
    assert (tmp_path / f"picture.{kind}").read_bytes().startswith(STARTS[kind])


@pytest.mark.parametrize("draw", DRAWN)
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_computed(draw, cells, tmp_path):
    with pytest.raises(ValueError, match=r"ends in .png, .pdf or .svg, got .*picture.docx"):
        draw(cells, tmp_path / "picture.docx")
    with pytest.raises(ValueError, match="written to a folder that exists, got"):
        draw(cells, tmp_path / "none" / "picture.png")


def test_unassigned_is_called_as_by_annotate():
    assert plotting.UNASSIGNED == inference.UNASSIGNED
