from types import SimpleNamespace

from quantlib.charts import _in_own_runtime, pareto_front


def variant(name: str, latency: float, top1: float) -> SimpleNamespace:
    return SimpleNamespace(variant=name, latency_p50_ms=latency, top1=top1)


def test_the_front_holds_what_nothing_beats_in_both_respects():
    rows = [
        variant("float", 8.0, 0.75),
        variant("beaten", 3.0, 0.45),
        variant("trained", 2.0, 0.5),
        variant("equal but slower", 2.5, 0.5),
        variant("fast", 1.0, 0.4),
    ]
    assert [row.variant for row in pareto_front(rows)] == ["fast", "trained", "float"]


def test_variants_are_compared_in_the_runtime_that_each_was_evaluated_in():
    pairs = [("float", "torchscript"), ("a", "torchscript-x86"), ("a", "openvino"), ("a", "torchscript-x86")]
    rows = [SimpleNamespace(variant=variant, runtime=runtime) for variant, runtime in pairs]
    assert _in_own_runtime(rows) == [rows[0], rows[1], rows[3]]
