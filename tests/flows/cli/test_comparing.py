"""`quantflow compare`, from hand-made runs."""

import json

from click.testing import CliRunner
from finished_runs import FIRST, INGREDIENTS, SECOND, write_run

from flows.cli.commands import main
from flows.cli.outcome import WRONG_INPUT


def compare(home, *arguments):
    """(exit status, standard output, standard error)"""
    done = CliRunner().invoke(main, ["compare", *arguments, "--home", str(home)])
    return done.exit_code, done.stdout, done.stderr


def test_each_change_is_a_line(tmp_path):
    write_run(tmp_path, FIRST)
    changed = INGREDIENTS | {"code.quantlib.quantize.ranges": "c2", "images.split.fingerprint": f'"{"ab" * 32}"'}
    write_run(tmp_path, SECOND, num_right=80, milliseconds=1.5, ingredients=changed)
    status, out, _ = compare(tmp_path, FIRST, SECOND)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"From {FIRST} to {SECOND}"
    assert lines[1:3] == ["Recipe", "  no change"]
    assert "  validation images: f0 -> abababababab" in lines
    assert "  calibrate: quantlib.quantize.ranges" in lines
    place = lines.index("Winner")
    assert lines[place + 1] == "  small in onnxruntime"
    assert lines[place + 2].startswith("    -10.00 points of top-1 (95% interval ")
    assert lines[place + 2].endswith("not on the same images): less accurate")
    assert lines[place + 3].startswith("    1.50x the latency (1.5")
    assert lines[place + 3].endswith("x relative to float): slower")
    assert lines[-1].startswith("Note: The runs evaluated different validation images")


def test_json_has_the_same_for_programs(tmp_path):
    write_run(tmp_path, FIRST)
    write_run(tmp_path, SECOND, num_right=84)
    status, out, _ = compare(tmp_path, FIRST, SECOND, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["before"], found["after"]) == (FIRST, SECOND)
    assert (found["winner"]["accuracy"], found["winner"]["p_value"]) == ("worse", 0.03125)


def test_a_run_that_does_not_exist_is_one_message(tmp_path):
    write_run(tmp_path, FIRST)
    status, out, said = compare(tmp_path, FIRST, "nowhere")
    assert (status, out) == (WRONG_INPUT, "")
    assert said.startswith("quantflow: No run 'nowhere'.")
    assert len(said.splitlines()) == 1
