from types import SimpleNamespace

from quantlib.report.charts import _epochs, _in_own_runtime, pareto_front


def variant(name, latency, top1, pareto=None):
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


def epoch(variant, number, top1, *, best=False):
    return SimpleNamespace(
        variant=variant, epoch=number, top1=top1, best=best, batch_norm_frozen=True, observers_frozen=number > 0
    )


def test_the_start_of_training_is_the_large_point_where_it_was_kept():
    rows = [epoch("a", 0, 0.5), epoch("a", 1, 0.4), epoch("b", 0, 0.6), epoch("b", 1, 0.7, best=True)]
    variants = [
        SimpleNamespace(variant="float", top1_start=None, kept_start=None),
        SimpleNamespace(variant="a", top1_start=0.55, kept_start=True),
        SimpleNamespace(variant="b", top1_start=0.58, kept_start=False),
    ]
    figure = _epochs(rows, variants)
    a, b = figure.data
    assert (list(a.x), list(a.y), list(a.marker.size)) == ([-1, 0, 1], [0.55, 0.5, 0.4], [13, 7, 7])
    assert (list(b.x), list(b.y), list(b.marker.size)) == ([-1, 0, 1], [0.58, 0.6, 0.7], [7, 7, 13])


def test_what_is_true_of_all_branches_is_noted_once_and_no_note_covers_another():
    figure = _epochs([epoch(name, number, 0.5) for name in "ab" for number in (0, 1)], [])
    assert [note.text for note in figure.layout.annotations] == ["batch norm frozen (all)", "observers frozen (all)"]
    assert len({note.y for note in figure.layout.annotations}) == 2
