"""Rows, the bench command, tables, plots and the page: what is written can be read."""

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_toys import TINY, ShiftsColumns, run, tiny

from dynexec import cli
from dynexec.report import bench, experiment, nets, page, plots, rows, systems, tables

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return nets.build(TINY)


@pytest.fixture(scope="module")
def images():
    return nets.make_images(4, 16)


# Rows


def test_rows_have_the_schema_and_survive_a_file(model, images, tmp_path):
    found = run(model, images, keeps=(0.5, 1.0))
    path = tmp_path / "sub" / "rows.jsonl"
    for row in found:
        rows.append_row(path, row)
    assert rows.read_rows(path) == rows.read_rows(path.parent) == found
    assert found[0]["threads"] == torch.get_num_threads() and found[0]["versions"]["torch"] == torch.__version__
    later = found[0] | {"time": "9999-01-01T00:00:00+00:00"}
    rows.append_row(path, later)
    assert rows.read_rows(path)[0] == later and len(rows.read_rows(path)) == 2


def test_a_row_behind_a_line_without_an_end_gets_a_line_of_its_own(model, images, tmp_path):
    (row,) = run(model, images)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    later = row | {"keep": 0.75}
    rows.append_row(path, later)
    assert rows.read_rows(path) == [row, later]


def test_a_device_is_not_read_before_it_is_written_to(model, images, monkeypatch):
    (row,) = run(model, images)
    monkeypatch.setattr(Path, "read_text", lambda path: pytest.fail("would wait for ever for a terminal"))
    rows.append_row(os.devnull, row)


def test_rows_of_another_form_are_refused(model, images, tmp_path):
    (row,) = run(model, images)
    with pytest.raises(ValueError, match="missing.*batch"):
        rows.check_row({key: value for key, value in row.items() if key != "batch"})
    with pytest.raises(ValueError, match="unknown.*speed"):
        rows.check_row(row | {"speed": 1})
    with pytest.raises(TypeError, match="batch"):
        rows.check_row(row | {"batch": "many"})
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\nnot json\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2"):
        rows.read_rows(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1"):
        rows.read_rows(path)


def test_rows_of_earlier_versions_are_read(model, images, tmp_path):
    (row,) = run(model, images)
    assert "seed" not in row
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"seed": 0}))
    assert rows.read_rows(tmp_path / "rows.jsonl") == [row | {"seed": 0}]


# The command


def arguments(tmp_path, *more):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    names = ["masked eager", "dense eager"]
    fixed = ["--baselines", *names, "--seconds", "0", "--out", str(tmp_path / "rows.jsonl"), "--batch", "2"]
    return parser.parse_args([*fixed, *more])


def test_rows_of_a_gpu_are_a_group_of_their_own(tmp_path):
    row = {"cpu": "C", "threads": 2, "dtype": "float16", "net": "n", "batch": 1, "decisions": "bernoulli", "keep": 0.5}
    row |= {"commit": None, "spread": 0.0, "efficiency_own": None}
    cpu, gpu = (row | {"device": device, "image_size": 8} for device in ("cpu", "NVIDIA H100"))
    assert [title for title, _ in tables.group_rows([gpu, cpu])] == [
        "n, 8x8, C, 2 threads",
        "n, 8x8, NVIDIA H100, float16",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_on_a_missing_gpu(tmp_path, capsys):
    for device, message in (("cuda", "torch sees no GPU here"), ("tpu", "must be cpu or cuda, got 'tpu'")):
        with pytest.raises(SystemExit):
            arguments(tmp_path, "--device", device)
        assert message in capsys.readouterr().err


@pytest.fixture
def tiny_nets(monkeypatch):
    absent = nets.Net(tiny, 16, (2,), needs=("no_such_package",))
    for module in (bench, tables):
        monkeypatch.setattr(module, "NETS", {"tiny": TINY, "absent": absent})


def test_bench_prints_a_table_and_writes_rows(tiny_nets, tmp_path, capsys):
    args = arguments(tmp_path, "--nets", "tiny", "absent", "--keep", "0.5", "published")
    assert bench.main(args) == 0
    found = rows.read_rows(args.out)
    assert [row["decisions"] for row in found] == ["bernoulli", "published"]
    captured = capsys.readouterr()
    assert "2 rows written to" in captured.out and "efficiency" in captured.out
    assert "absent: not installed: no_such_package" in captured.err


def test_rows_say_which_dense_networks_were_left_out(tiny_nets, tmp_path, capsys):
    args = arguments(tmp_path, "--nets", "tiny", "--keep", "0.5", "--baselines", "dense eager", "naive gather")
    assert bench.main(args) == 0
    (row,) = rows.read_rows(args.out)
    left_out = {name for name, reason in row["unavailable"].items() if reason == "not asked for"}
    assert left_out == {"dense compiled", "ONNX Runtime", "OpenVINO"}
    assert "not asked for" not in capsys.readouterr().out
    left_out = bench._left_out(arguments(tmp_path, "--baselines", "dense eager"), next(iter(systems.SYSTEMS)))
    assert sorted(left_out) == ["ONNX Runtime", "OpenVINO", "dense compiled"]


def test_bench_json_and_append(tiny_nets, tmp_path, capsys):
    for more, expected in (([], 1), (["--append"], 2), (["--overwrite"], 1)):
        args = arguments(tmp_path, "--nets", "tiny", "--keep", "0.5", "--json", *more)
        assert bench.main(args) == 0
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(printed) == 1 and rows.check_row(printed[0])
        assert len(args.out.read_text().splitlines()) == expected


@pytest.fixture
def nothing_runs(tiny_nets, monkeypatch):
    monkeypatch.setattr(bench, "run_experiment", lambda *a, **k: pytest.fail("it was measured"))


@pytest.mark.parametrize("content", [b"[[[", b'{"net": "tiny"}\n', b"\xff\xfe", b"[" * 100_000])
def test_bench_does_not_append_to_a_damaged_file(nothing_runs, tmp_path, capsys, content):
    args = arguments(tmp_path, "--nets", "tiny", "--append")
    args.out.write_bytes(content)
    assert bench.main(args) == 2 and args.out.read_bytes() == content
    assert re.fullmatch(r"dynexec bench: cannot append: .*rows.jsonl.*\n", capsys.readouterr().err)


def test_bench_does_not_replace_a_file_unasked(nothing_runs, tmp_path, capsys):
    args = arguments(tmp_path, "--nets", "tiny")
    args.out.write_text("rows of years\n")
    assert bench.main(args) == 2 and args.out.read_text() == "rows of years\n"
    message = r"dynexec bench: .*rows.jsonl is there already: --append .*, --overwrite .*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--append", "--overwrite")


def test_bench_replaces_its_default_file_and_an_empty_one(tiny_nets, model, images, tmp_path, monkeypatch):
    found = run(model, images)
    monkeypatch.setattr(bench, "run_experiment", lambda *a, **k: found)
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, "--nets", "tiny")
    args.out.touch()
    assert bench.main(args) == 0 and rows.read_rows(args.out) == found
    args.out, default = None, Path(bench.DEFAULT_OUT)
    default.parent.mkdir()
    default.write_text("old\n")
    assert bench.main(args) == 0 and rows.read_rows(default) == found


def test_bench_makes_the_folder_before_it_measures(nothing_runs, tmp_path, capsys):
    (tmp_path / "rows").touch()
    options = ["--nets", "tiny", "--out", str(tmp_path / "rows" / "rows.jsonl")]
    assert cli.main(["bench", *options]) == 1
    assert re.fullmatch(r"dynexec bench: .*rows'\n", capsys.readouterr().err)


def test_bench_goes_on_after_an_error_of_one_network(tiny_nets, model, images, tmp_path, monkeypatch, capsys):
    found = run(model, images)
    monkeypatch.setitem(bench.NETS, "broken", nets.Net(raise_no_memory, 16, (2,)))
    monkeypatch.setattr(bench, "make_images", lambda batch, size: images if batch < 9 else raise_no_memory())
    monkeypatch.setattr(bench, "run_experiment", lambda *a, **k: found)
    args = arguments(tmp_path, "--nets", "broken", "tiny", "--batch", "9", "2")
    assert bench.main(args) == 1 and rows.read_rows(args.out) == found
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("RuntimeError: no memory for it")]
    assert [line.split(":")[0] for line in lines] == ["broken, batch 9", "broken, batch 2", "tiny, batch 9"]


def raise_no_memory():
    raise RuntimeError("no memory for it\nat all")


def test_interrupted_bench_says_what_is_written(tiny_nets, model, images, tmp_path, monkeypatch, capsys):
    found = run(model, images)

    def measure(*_, **options):
        if options["name"] == "other":
            raise KeyboardInterrupt
        return found

    monkeypatch.setitem(bench.NETS, "other", TINY)
    monkeypatch.setattr(bench, "run_experiment", measure)
    path = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "--nets", "tiny", "other", "--out", str(path)]) == 130
    assert rows.read_rows(path) == found
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"dynexec bench: interrupted, 1 rows written to {path}"


def test_bench_that_measures_nothing_fails(tiny_nets, tmp_path, capsys):
    bench.NETS["unpublished"] = nets.Net(tiny, 16, (2,))
    for more in (["unpublished", "--keep", "published"], ["absent"]):
        args = arguments(tmp_path, "--nets", *more)
        assert bench.main(args) == 1 and not args.out.exists()
        captured = capsys.readouterr()
        assert re.search(r"dynexec bench: nothing was measured, .*rows.jsonl was not written\n$", captured.err)
        assert not captured.out


def test_bench_refuses_keep_rates_for_networks_of_parts(nothing_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_system", lambda *a, **k: pytest.fail("it was measured"))
    for keeps in (["0.5"], ["0.5", "published"]):
        args = arguments(tmp_path, "--nets", "tiny", "arnet_resnet", "--keep", *keeps)
        assert bench.main(args) == 2
        assert re.fullmatch(r"dynexec bench: arnet_resnet: .* published ones: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("--batch", ("x", "0", "1.5"), "must be a whole number of 1 or more"),
        ("--threads", ("many", "0", "1025"), "must be a whole number from 1 to 1024"),
        ("--seconds", ("x", "nan", "inf", "-1"), "must be a finite number of 0 or more"),
    ],
)
def test_wrong_numbers_are_answered_with_what_is_expected(tmp_path, capsys, option, values, expected):
    for value in values:
        with pytest.raises(SystemExit):
            arguments(tmp_path, f"{option}={value}")
        assert capsys.readouterr().err.endswith(f"error: argument {option}: {expected}, got {value!r}\n")


def test_bench_fails_on_a_wrong_executor(tiny_nets, tmp_path, capsys, monkeypatch):
    real = experiment.run_experiment
    monkeypatch.setattr(bench, "run_experiment", lambda *a, **k: real(*a, executor=ShiftsColumns, **k))
    args = arguments(tmp_path, "--nets", "tiny", "--keep", "0.5")
    assert bench.main(args) == 1
    assert "dynexec on tiny differs from the reference" in capsys.readouterr().out
    assert rows.read_rows(args.out)[0]["failed"] == ["dynexec"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--keep", "1.5"), ("--keep", "half"), ("--batch", "0"), ("--threads", "0"), ("--nets", "x")],
        *[("--threads", "99999999999999"), ("--seconds", "nan"), ("--seconds", "-1"), ("--out", ".")],
    ],
)
def test_bench_refuses_wrong_arguments(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        arguments(tmp_path, option, value)
    assert option in capsys.readouterr().err


# Tables, plots, page


@pytest.fixture(scope="module")
def some_rows(model, images):
    return run(model, images, keeps=(0.5, 1.0))


def test_markdown_has_a_line_per_row(some_rows):
    def lines(rows):
        return [line for line in tables.markdown(rows).splitlines() if line.startswith("|")]

    text = tables.markdown(some_rows)
    assert len(lines(some_rows)) == 2 * (2 + len(some_rows))  # nobody knows what was lost without the dense network
    measured = {"total": 2.0, "row moves": 0.0, "rest": 2.0}
    assert lines([row | {"losses": measured} for row in some_rows]) == lines(some_rows)
    explained = [row | {"losses": measured | {"policy": 1.0}} for row in some_rows]
    assert len(lines(explained)) == 3 * (2 + len(some_rows))
    assert len({line.count("|") for line in lines(explained)}) == 3
    assert "| batch | keep | total | rest | policy |" in lines(explained)
    assert text.startswith("### tiny, 16x16, ") and "dense eager" in text


def test_noise_is_also_what_dynexec_differs_from_itself(some_rows):
    first = some_rows[0] | {"spread": 0.01, "keep": 0.5, "efficiency_own": 0.7}
    found = [first, first | {"keep": 1.0, "efficiency_own": 1.04}, first | {"batch": 99}]
    assert [round(row["spread"], 6) for row in tables.with_noise(found)] == [0.04, 0.04, 0.01]
    assert [round(row["spread"], 6) for row in tables.with_noise([found[0], found[1] | {"efficiency_own": None}])] == [
        0.01,
        0.01,
    ]
    ((_, members),) = tables.group_rows(found[:2])
    assert [tables.COLUMNS["noise"](row) for row in members] == ["4.0 %", "4.0 %"]


@pytest.mark.parametrize("value, text", [(999.6, "1,000"), (999.4, "999"), (12345.6, "12,346"), (0.12345, "0.123")])
def test_numbers_are_rounded_before_they_are_long(value, text):
    assert tables.rounded(value) == text


def test_generated_part_of_a_text_is_replaced():
    text = "a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n"
    assert tables.replace_generated(text, "x", "new\n") == text.replace("old", "new")
    for wrong in ("nothing", text + text, "<!-- end: x -->\n<!-- generated: x -->\n"):
        with pytest.raises(ValueError, match="once each"):
            tables.replace_generated(wrong, "x", "new\n")


def test_docs_are_up_to_date():
    """Fails where docs/performance.md is not what bench/tables.py makes of bench/results/."""
    docs = ROOT / "docs" / "performance.md"
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("result rows are not part of a source distribution")
    text = docs.read_text()
    found = rows.read_rows(ROOT / "bench" / "results")
    parts = {"bench": tables.markdown(found), "break-even": tables.markdown_table(*tables.break_even_table(found))}
    for name, content in parts.items():
        assert tables.replace_generated(text, name, content) == text, "run python bench/tables.py"


def test_break_even_is_between_the_rates_where_the_dense_network_overtakes(some_rows):
    keeps, first = [0.25, 0.5, 1.0], some_rows[0]

    def table(*realised):
        found = [first | {"keep": k, "realised": r, "decisions": "bernoulli"} for k, r in zip(keeps, realised)]
        return tables.break_even_table(found)[1]

    ((*_, least, even),) = table(2.0, 1.5, 1.01)
    assert even == "none" and least.startswith(f"1.01x (batch {first['batch']}, keep 1,")
    assert table(2.0, 1.2, 0.8)[0][-1] == "0.75" and table(0.9, 1.2, 1.5)[0][-1] == "0.25"
    other = [first | {"keep": 0.5, "realised": 0.7, "decisions": "bernoulli", "batch": first["batch"] + 1}]
    ((*_, least, even),) = tables.break_even_table([first | {"keep": 0.5, "realised": 2.0}, *other])[1]
    assert even == "0.50" and f"batch {first['batch'] + 1}" in least


def test_plots_are_pictures(some_rows, tmp_path):
    clip = [2, 3, 3, 1, 4]
    frames = {0: np.zeros((6, 8, 3), np.uint8), 4: np.full((6, 8, 3), 255, np.uint8)}
    for path in (
        plots.plot_speed_up(some_rows, tmp_path / "speed.png"),
        plots.plot_clip(clip, frames, tmp_path / "clip.png", num_blocks=4, seconds=[0.0, 0.1, 0.2, 0.3, 0.4]),
        plots.plot_clip(clip, {}, tmp_path / "bare.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no realised"):
        plots.plot_speed_up([some_rows[0] | {"realised": None}], tmp_path / "x.png")
    with pytest.raises(ValueError, match="must agree"):
        plots.plot_clip(clip, {7: frames[0]}, tmp_path / "x.png")


def report(tmp_path, *more):
    parser = argparse.ArgumentParser()
    page.add_arguments(parser)
    return parser.parse_args(["--out", str(tmp_path / "o" / "report.html"), *more])


def test_page_needs_no_other_file(some_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no profiles are
    for row in some_rows:
        rows.append_row(tmp_path / "rows.jsonl", row)
    (tmp_path / "out").mkdir()
    picture = plots.plot_clip([1, 2], {}, tmp_path / "out" / "clip.png")
    table = page.PageTable(("net", "fps"), (("<lite>", "12"), ("b", "13")), failed=(1,))
    section = page.Section("The clip", "One.\n\nTwo.", (table,), ((str(picture), "a clip"),))
    page.write_sections(tmp_path / "out" / "demo.json", [section])
    args = report(tmp_path, "--results", str(tmp_path / "rows.jsonl"), "--json")
    assert page.main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == 2 and printed["sections"][:2] == ["The clip", "Theoretical against realised speed-up"]
    html = args.out.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    assert "&lt;lite&gt;" in html and "<p>Two.</p>" in html and 'class="failed"' in html


def test_report_without_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert page.main(report(tmp_path)) == 1
    assert "nothing to report" in capsys.readouterr().out
