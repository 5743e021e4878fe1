from types import SimpleNamespace

from quantlib.charts import _in_own_runtime, pareto_front


def variant(name: str, latency: float, top1: float, pareto: bool | None = None) -> SimpleNamespace:
    return SimpleNamespace(variant=name, latency_p50_ms=latency, top1=top1, pareto=pareto)


def test_the_front_holds_what_nothing_beats_in_both_respects():
    rows = [
        variant("float", 8.0, 0.75),
        variant("beaten", 3.0, 0.45),
        variant("trained", 2.0, 0.5),
        variant("equal but slower", 2.5, 0.5),
        variant("fast", 1.0, 0.4),
    ]
    assert [row.variant for row in pareto_front(rows)] == ["fast", "trained", "float"]


def test_what_the_verdict_compared_beyond_noise_is_joined_where_it_says():
    rows = [
        variant("winner", 1.01, 0.49, pareto=True),  # As fast and as accurate as the next, and smaller.
        variant("fast", 1.0, 0.5, pareto=True),
        variant("beaten", 3.0, 0.45, pareto=False),
        variant("outside", 0.5, 0.1),
    ]
    assert [row.variant for row in pareto_front(rows)] == ["fast", "winner"]


def test_variants_are_compared_in_the_runtime_that_each_verdict_is_about():
    pairs = [("float", "torchscript"), ("a", "torchscript-x86"), ("a", "openvino"), ("a", "openvino")]
    rows = [SimpleNamespace(variant=variant, runtime=runtime) for variant, runtime in pairs]
    variants = [SimpleNamespace(variant="float", runtime="torchscript"), SimpleNamespace(variant="a", runtime=None)]
    assert _in_own_runtime(rows, variants) == rows[:2]
    variants[1].runtime = "openvino"
    assert _in_own_runtime(rows, variants) == [rows[0], *rows[2:]]
