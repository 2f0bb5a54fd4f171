"""The bench proves before it times, its arithmetic is right, and what it writes can be read."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from dynexec import convert, decide
from dynexec.measure import timing
from dynexec.models import blockdrop_resnet
from dynexec.report import baselines, bench, experiment, nets, page, plots, rows, tables

ROOT = Path(__file__).parents[1]
EAGER = (baselines.MaskedEager, baselines.DenseEager, baselines.NaiveGather, baselines.GroupByPolicy)


@pytest.fixture(autouse=True, scope="module")
def private_cost_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(depth=(2, 2)):
    return blockdrop_resnet(depth, (8, 16), num_classes=5)


TINY = nets.Net(tiny, 16, (2,), published=nets.Published(kept=3.0, policies=2))


@pytest.fixture(scope="module")
def model():
    return nets.build(TINY)


@pytest.fixture(scope="module")
def images():
    return nets.make_images(4, 16)


def converted(style):
    model = toys.STYLES[style]()
    return model, convert(model).num_blocks


def settings(keeps=(0.5,), batch=4, num_blocks=4):
    return [experiment.draw_decisions(keep, num_blocks, batch) for keep in keeps]


def run(model, images, keeps=(0.5,), **options):
    options = {"name": "tiny", "baselines": EAGER, "seconds": 0} | options
    blocks = experiment.num_blocks(model)
    return experiment.run_experiment(model, images, settings(keeps, len(images), blocks), **options)


# Baselines


@pytest.mark.parametrize("style", toys.STYLES)
@pytest.mark.parametrize("baseline", [*EAGER, baselines.DenseFrozen, baselines.Dynexec], ids=lambda b: b.name)
def test_baselines_compute_the_same(style, baseline):
    model, num_blocks = converted(style)
    images = toys.images(5)
    candidate = baseline(model, images, threads=1)
    choices = [torch.rand(5, num_blocks) < 0.5, torch.zeros(5, num_blocks) > 0, torch.ones(5, num_blocks) > 0]
    for decisions in choices:
        with torch.inference_mode(), decide(torch.ones_like(decisions) if baseline.dense else decisions):
            expected = model(images)
        with torch.inference_mode():
            torch.testing.assert_close(candidate(images, decisions), expected, rtol=1e-4, atol=1e-4)


def test_baselines_leave_the_model_alone(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("baseline", [baselines.OnnxRuntime, baselines.OpenVino], ids=lambda b: b.name)
@pytest.mark.parametrize("own", [True, False])
def test_exported_baselines_compute_the_same(model, baseline, own):
    if baseline.missing():
        pytest.skip(baseline.missing())
    network = model if own else converted("mobilenet")[0]
    images = nets.make_images(3, 16)
    with torch.inference_mode():
        expected = getattr(network, "backbone", network)(images)
        output = baseline(network, images, threads=1)(images, None)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_compiled_baseline_computes_the_same():
    if baselines.DenseCompiled.missing():
        pytest.skip(baselines.DenseCompiled.missing())
    model, images = nets.build(nets.Net(lambda: tiny((1,) * 2), 8, (2,))), nets.make_images(2, 8)
    with torch.inference_mode():
        output = baselines.DenseCompiled(model, images, threads=1)(images, None)
        torch.testing.assert_close(output, model.backbone(images), rtol=1e-4, atol=1e-4)


def test_missing_packages_and_failures_are_said(model, images):
    class Absent(baselines.DenseEager):
        name, needs = "absent", ("no_such_package",)

    class Broken(baselines.DenseEager):
        name = "broken"

        def prepare(self, model, images, threads):
            raise NotImplementedError("no such layer\nand more")

    (row,) = run(model, images, baselines=(*EAGER, Absent, Broken))
    assert row["unavailable"] == {
        "absent": "not installed: no_such_package",
        "broken": "NotImplementedError: no such layer",
    }
    assert "not installed" in tables.markdown([row])


# The gate


class IgnoresDecisions(baselines.Dynexec):
    def __call__(self, images, decisions):
        return super().__call__(images, torch.ones_like(decisions))


class ShiftsColumns(baselines.Dynexec):
    def __call__(self, images, decisions):
        return super().__call__(images, decisions.roll(1, 1))


class SwapsSamples(baselines.Dynexec):
    def __call__(self, images, decisions):
        return super().__call__(images, decisions).flip(0)


class LosesOneSample(baselines.Dynexec):
    def __call__(self, images, decisions):
        logits = super().__call__(images, decisions).clone()
        logits[-1] = float("nan")
        return logits


@pytest.mark.parametrize("wrong", [IgnoresDecisions, ShiftsColumns, SwapsSamples, LosesOneSample])
def test_gate_catches_a_wrong_executor(model, images, wrong):
    (row,) = run(model, images, executor=wrong)
    assert row["failed"] == ["dynexec"]
    assert "dynexec" not in row["milliseconds"] and "masked eager" in row["milliseconds"]
    assert (row["realised"], row["efficiency"], row["saved_share"], row["planning_share"]) == (None,) * 4
    assert row["realised_against"] == {}
    assert "WRONG: dynexec" in tables.markdown([row])
    rows.check_row(json.loads(json.dumps(row, allow_nan=False)))


def test_gate_catches_a_wrong_baseline(model, images):
    class Fast(baselines.DenseEager):
        name = "fast"

        def __call__(self, images, decisions):
            return torch.zeros(len(images), 5)

    (row,) = run(model, images, baselines=(*EAGER, Fast))
    assert row["failed"] == ["fast"] and "fast" not in row["milliseconds"]
    assert row["strongest_dense"] == "dense eager" and row["realised"] is not None


def test_gate_passes_a_right_executor(model, images):
    for row in run(model, images, keeps=(0.0, 0.5, 1.0)):
        assert row["failed"] == [] and row["max_error"]["dynexec"] < 1e-5
        assert row["realised"] > 0


def test_gate_needs_decisions_that_matter(images):
    model = nets.build(TINY)
    for block in (block for segment in model.backbone.blocks for block in segment):
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
    with pytest.raises(ValueError, match="prove nothing"):
        run(model, images)


# The arithmetic


def times(**medians):
    return {name.replace("_", " "): {"median": value} for name, value in medians.items()}


def test_strongest_dense_is_the_fastest_that_is_not_ours():
    dense = ("dense eager", "dense compiled", "OpenVINO")
    measured = times(dense_eager=9.0, dense_compiled=5.0, dense_frozen=1.0, masked_eager=0.5)
    assert rows.strongest_dense(measured, dense) == "dense compiled"
    assert rows.strongest_dense(measured | times(OpenVINO=4.0), dense) == "OpenVINO"
    assert rows.strongest_dense(times(dense_frozen=1.0), dense) is None


def test_speed_up_arithmetic():
    measured = times(dense_eager=12.0, dense_compiled=10.0, masked_eager=15.0, dense_frozen=8.0, dynexec=5.0)
    row = rows.speed_up(measured, 400, 160, ("dense eager", "dense compiled"))
    assert row["strongest_dense"] == "dense compiled"
    assert row["theoretical"] == pytest.approx(2.5)
    assert row["realised"] == pytest.approx(2.0)
    assert row["efficiency"] == pytest.approx(0.8)
    assert row["efficiency_own"] == pytest.approx(8.0 / 5.0 / 2.5)
    assert row["saved_share"] == pytest.approx(0.5 / 0.6)
    assert row["own_dense"] == pytest.approx(1.25)
    expected = {"dense eager": 2.4, "dense compiled": 2.0, "masked eager": 3.0, "dense frozen": 1.6}
    assert row["realised_against"] == pytest.approx(expected)


def test_speed_up_without_dense_or_saving():
    row = rows.speed_up(times(dynexec=5.0, masked_eager=10.0), 400, 400, ())
    assert row["realised_against"] == {"masked eager": 2.0}
    absent = ("strongest_dense", "realised", "efficiency", "efficiency_own", "saved_share", "own_dense")
    assert all(row[key] is None for key in absent)
    assert rows.speed_up(times(dense_eager=5.0, dynexec=5.0), 4, 4, ("dense eager",))["saved_share"] is None


def test_policy_is_charged_where_it_runs(model, images):
    flops = experiment.count_flops(model, images)
    bernoulli = experiment.draw_decisions(0.5, 4, 4)
    published = experiment.draw_decisions(0.75, 4, 4, policies=2)
    found = experiment.run_experiment(
        model, images, [bernoulli, published], name="tiny", baselines=(baselines.MaskedEager,), seconds=0
    )
    for row, setting, policy in zip(found, (bernoulli, published), (0, flops.policy), strict=True):
        block = torch.tensor(flops.block)
        needed = [flops.fixed + policy + float((draw * block).sum(1).double().mean()) for draw in setting.draws]
        assert row["flops_needed"] == pytest.approx(np.mean(needed))
        assert row["flops_dense"] == flops.dense
        assert row["kept"] == pytest.approx(torch.stack(setting.draws).float().mean().item())


def test_times_are_per_forward_and_policies_run_where_charged(model, images, monkeypatch):
    ran = []

    class Counted(baselines.Dynexec):
        def prepare(self, model, images, threads):
            super().prepare(model, images, threads)
            self.policy = lambda images: ran.append(len(images))

    def fake_compare(calls, **options):
        for key, call in calls.items():
            ran.clear()
            call()
            draws = 8 if key[1] and "published" in key[1] else 0
            assert len(ran) == (draws if key[0] == "dynexec" else 0), key
        seconds = {"masked eager": 2.0, "dense eager": 1.0, "dense frozen": 0.2, "dynexec": 0.4, "planning": 0.004}
        timings = {key: timing.Timing((seconds[key[0]],) * 3, (0.8,) * 3) for key in calls}
        return timing.Comparison(timings, 0.01, 3)

    monkeypatch.setattr(experiment, "compare", fake_compare)
    chosen = [experiment.draw_decisions(0.5, 4, 1), experiment.draw_decisions(0.5, 4, 1, policies=2)]
    chosen_baselines = (baselines.MaskedEager, baselines.DenseEager, baselines.DenseFrozen)
    found = experiment.run_experiment(
        model, images[:1], chosen, name="tiny", baselines=chosen_baselines, executor=Counted, seconds=0
    )
    for row, masked in zip(found, (2000.0, 2000.0 / 8), strict=True):  # the policy runs in the second: once per draw
        assert row["milliseconds"]["dense eager"]["median"] == pytest.approx(1000.0)
        assert row["milliseconds"]["masked eager"]["median"] == pytest.approx(masked)
        assert row["milliseconds"]["dynexec"]["median"] == pytest.approx(400.0 / 8)
        assert row["milliseconds"]["dynexec"]["cpu"] == pytest.approx(100.0)
        assert row["planning_share"] == pytest.approx(0.01)
        assert row["strongest_dense"] == "dense eager" and row["own_dense"] == pytest.approx(5.0)
        assert row["realised"] == pytest.approx(20.0) and row["draws"] == 8 and row["rounds"] == 3
        total, *causes = row["losses"].values()
        assert total == pytest.approx(50 - 200 * row["flops_needed"] / row["flops_dense"]) == pytest.approx(sum(causes))
        assert row["losses"]["planning"] == pytest.approx(0.5)


def test_error_is_relative_and_never_nan():
    reference = torch.tensor([1.0, -4.0])
    assert experiment.relative_error(reference, reference) == 0.0
    assert experiment.relative_error(torch.tensor([2.0, -4.0]), reference) == pytest.approx(0.25)
    for wrong in (torch.tensor([float("nan"), -4.0]), torch.tensor([1.0]), torch.tensor([float("inf"), -4.0])):
        assert experiment.relative_error(wrong, reference) == float("inf")


# Decisions and networks


@pytest.mark.parametrize(("batch", "draws"), [(1, 8), (3, 3), (8, 1), (64, 1)])
def test_decisions_are_the_same_every_time(batch, draws):
    first, second = (experiment.draw_decisions(0.3, 20, batch) for _ in range(2))
    assert len(first.draws) == draws
    assert all(draw.shape == (batch, 20) and draw.dtype == torch.bool for draw in first.draws)
    assert all(torch.equal(a, b) for a, b in zip(first.draws, second.draws, strict=True))


def test_decisions_follow_the_keep_rate():
    assert abs(torch.stack(experiment.draw_decisions(0.3, 50, 400).draws).float().mean() - 0.3) < 0.02
    assert torch.stack(experiment.draw_decisions(1.0, 50, 4).draws).all()
    assert not torch.stack(experiment.draw_decisions(0.0, 50, 4).draws).any()
    published = experiment.draw_decisions(0.3, 50, 400, policies=10)
    assert published.kind == "published" and len(torch.unique(published.draws[0], dim=0)) == 10
    with pytest.raises(ValueError, match="between 0 and 1"):
        experiment.draw_decisions(1.5, 50, 4)


def test_networks_are_the_same_every_time_and_lively():
    first, second = nets.build(TINY), nets.build(TINY)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    logits = first.backbone(nets.make_images(8, 16))
    assert logits.isfinite().all() and logits.std(0).mean() > 0.05 * logits.abs().max()
    assert first.backbone.bn1.running_mean.abs().max() > 0 and first.backbone.bn1.momentum == 0.1


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


# The command


def arguments(tmp_path, *more):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    names = ["masked eager", "dense eager"]
    fixed = ["--baselines", *names, "--seconds", "0", "--out", str(tmp_path / "rows.jsonl"), "--batch", "2"]
    return parser.parse_args([*fixed, *more])


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
    assert "2 rows in" in captured.out and "efficiency" in captured.out
    assert "absent: not installed: no_such_package" in captured.err


def test_bench_json_and_append(tiny_nets, tmp_path, capsys):
    for more, expected in (([], 1), (["--append"], 2), ([], 1)):
        args = arguments(tmp_path, "--nets", "tiny", "--keep", "0.5", "--json", *more)
        assert bench.main(args) == 0
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(printed) == 1 and rows.check_row(printed[0])
        assert len(args.out.read_text().splitlines()) == expected


def test_bench_fails_on_a_wrong_executor(tiny_nets, tmp_path, capsys, monkeypatch):
    real = experiment.run_experiment
    monkeypatch.setattr(bench, "run_experiment", lambda *a, **k: real(*a, executor=ShiftsColumns, **k))
    args = arguments(tmp_path, "--nets", "tiny", "--keep", "0.5")
    assert bench.main(args) == 1
    assert "dynexec on tiny differs from the reference" in capsys.readouterr().out
    assert rows.read_rows(args.out)[0]["failed"] == ["dynexec"]


@pytest.mark.parametrize(
    ("option", "value"), [("--keep", "1.5"), ("--keep", "half"), ("--batch", "0"), ("--threads", "0"), ("--nets", "x")]
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
    text = tables.markdown(some_rows)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 * (2 + len(some_rows)) and len({line.count("|") for line in lines}) == 3
    assert text.startswith("### tiny, 16x16, ") and "dense eager" in text


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
    content = tables.markdown(rows.read_rows(ROOT / "bench" / "results"))
    assert tables.replace_generated(text, "bench", content) == text, "run python bench/tables.py"


def test_plots_are_pictures(some_rows, tmp_path):
    clip = [2, 3, 3, 1, 4]
    frames = {0: np.zeros((6, 8, 3), np.uint8), 4: np.full((6, 8, 3), 255, np.uint8)}
    for path in (
        plots.plot_speed_up(some_rows, tmp_path / "speed.png"),
        plots.plot_speed_up(some_rows, tmp_path / "masked.png", against="masked eager"),
        plots.plot_clip(clip, frames, tmp_path / "clip.png", num_blocks=4, seconds=[0.0, 0.1, 0.2, 0.3, 0.4]),
        plots.plot_clip(clip, {}, tmp_path / "bare.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no realised"):
        plots.plot_speed_up(some_rows, tmp_path / "x.png", against="nobody")
    with pytest.raises(ValueError, match="must agree"):
        plots.plot_clip(clip, {7: frames[0]}, tmp_path / "x.png")


def report(tmp_path, *more):
    parser = argparse.ArgumentParser()
    page.add_arguments(parser)
    fixed = ["--out", str(tmp_path / "o" / "report.html"), "--demo", str(tmp_path / "demo" / "demo.json")]
    return parser.parse_args([*fixed, *more])


def test_page_needs_no_other_file(some_rows, tmp_path, capsys):
    for row in some_rows:
        rows.append_row(tmp_path / "rows.jsonl", row)
    (tmp_path / "demo").mkdir()
    picture = plots.plot_clip([1, 2], {}, tmp_path / "demo" / "clip.png")
    table = page.PageTable(("net", "fps"), (("<lite>", "12"), ("b", "13")), failed=(1,))
    section = page.Section("The clip", "One.\n\nTwo.", (table,), ((str(picture), "a clip"),))
    page.write_sections(tmp_path / "demo" / "demo.json", [section])
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
