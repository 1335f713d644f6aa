"""The figures of model_analysis.py that the README states are those that the code gives."""

from conftest import ROOT

from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import bundled_names, load_configuration
from expert_parallel.projection.hardware import MACHINES
from expert_parallel.projection.step import estimate


def rows_under(heading):
    """Cells of the README's table that begins with this column."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n| {heading} |")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_parameters_of_every_bundled_model():
    rows = {row[0]: row[1:] for row in rows_under("model")}
    assert sorted(rows) == bundled_names()
    for name, (parameters, published, source) in rows.items():
        configuration = load_configuration(name)
        assert parameters == f"{describe(configuration).whole.parameters:,}", name
        assert float(published.removesuffix(" B")) * 1e9 == configuration.published["total"], name
        assert source


def test_predictions_for_quantisations_on_the_m4_max():
    rows = rows_under("bits")
    assert [int(row[0]) for row in rows] == [3, 4, 5, 6, 8, 16]
    configuration = load_configuration("qwen3-coder-30b")
    for bits, said, _ in rows:
        demand = describe(configuration, bits=int(bits)).demand
        predicted = estimate(demand, MACHINES["m4-max"], context=2048 + 64).tokens_per_second
        assert said == f"{predicted:.1f}"
