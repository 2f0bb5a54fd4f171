"""What profiles write and the page shows: files that are checked, plots, and a section for each profile."""

import json
import os
import re
from dataclasses import replace

import pytest
from test_report import report

from dynexec import cli
from dynexec.measure import Part, Profile
from dynexec.report import page, profile_plots


def made_up(blocks, **changes):
    """A profile of that many blocks, of which every second one is dropped."""
    parts = [
        Part("planning", "planning", None, 4, 4, 0, 0.0, 1e-6, 1e-6),
        Part("conv1", "layer", None, 4, 4, 7, *[1e-4] * 3),
    ]
    for column in range(blocks):
        if column % 20 == 10:
            parts.append(Part(f"blocks.{column}", "shortcut", None, 4, 4, 5, *[2e-5] * 3))
        kept = 3 * (column % 2)
        parts.append(Part(f"blocks.{column}", "block", column, kept, 4, kept * 10, kept * 5e-5, kept * 1.2e-4, 4e-4))
    parts.append(Part("fc", "layer", None, 4, 4, 1, *[1e-5] * 3))
    found = Profile(
        executor="resident", samples=4, num_blocks=blocks, threads=1, rounds=2, kept=0.375, peak=1e11, bandwidth=2e10,
        flops=sum(part.flops for part in parts), dense_flops=40 * blocks + 12, measured=0.01, dense=0.02,
        parts=tuple(parts), losses={"planning": 1e-6, "row moves": -2e-4, "not explained": 3e-4}, moved=0, spans=(),
    )  # fmt: skip
    return replace(found, **changes)


def drawn(profile, tmp_path):
    return profile_plots.plot_parts(profile, tmp_path / "p")


# Files


def test_what_is_written_is_read(tmp_path):
    for number, profile in enumerate((made_up(9), made_up(54, moved=None), made_up(0))):
        path = tmp_path / f"{number}.json"
        profile.write_json(path)
        assert Profile.read_json(path) == profile


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: [found], "the file must be an object"),
        (lambda found: found.pop("peak"), "the file must have the entries .* missing or unknown: peak"),
        (lambda found: found.update(speed=1), "the file must have the entries .* missing or unknown: speed"),
        (lambda found: found.update(samples=True), "samples must be an int of 0 or more, got True"),
        (lambda found: found.update(flops=10**400), "flops must be an int of 0 or more, got 1000"),
        (lambda found: found.update(executor="\ud800"), "executor must be text, got"),
        (lambda found: found.update(executor=None), "executor must be text, got None"),
        (lambda found: found.update(parts={}), "parts must be a list, got {}"),
        (lambda found: found.update(measured=float("nan")), "measured must be a number of 0 or more, got nan"),
        (lambda found: found.update(losses={}), "losses must be an object that is not empty, got {}"),
        (lambda found: found.update(moved=0.5), "moved must be an int of 0 or more, or null, got 0.5"),
        (lambda found: found.update(dense_flops=0), "dense_flops must be 1 or more, got 0"),
        (lambda found: found["losses"].update(policy="1"), "losses.policy must be a finite number, got '1'"),
        (lambda found: found["parts"].__setitem__(2, 7), r"parts\[2\] must be an object, got 7"),
        (lambda found: found["parts"][3].pop("kind"), r"parts\[3\] must have the entries .* unknown: kind"),
        (lambda found: found["parts"][1].update(dense=-1), r"parts\[1\].dense must be a number of 0 or more, got -1"),
    ],
)
def test_a_bad_file_names_its_entry(change, message, tmp_path):
    found = json.loads(json.dumps(made_up(3).to_dict()))
    changed = change(found)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(changed if isinstance(changed, list) else found))
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        Profile.read_json(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_named(content, tmp_path):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match="bad.json must be JSON, as dynexec profile writes it"):
        Profile.read_json(tmp_path / "bad.json")


# Plots


@pytest.mark.parametrize("blocks, pictures", [(0, 1), (9, 1), (28, 1), (29, 2), (54, 2), (110, 4)])
def test_pictures_have_few_enough_parts(blocks, pictures, tmp_path, monkeypatch):
    seen, plot = [], profile_plots._plot_some

    def some(profile, numbers, path):
        seen.extend(numbers)
        assert len(numbers) <= 32
        return plot(profile, numbers, path) if blocks <= 9 else path

    monkeypatch.setattr(profile_plots, "_plot_some", some)
    profile = made_up(blocks)
    paths = drawn(profile, tmp_path)
    assert len(set(paths)) == pictures and seen == list(range(len(profile.parts)))
    if blocks <= 9:
        with open(paths[0], "rb") as file:
            assert file.read(4) == b"\x89PNG"


def test_bars_and_marks_are_where_the_numbers_say(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(profile_plots.Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    profile = made_up(4)
    drawn(profile, tmp_path)
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1e3 * part.measured for part in profile.parts])
    lines = [line.get_xdata() for line in axes.lines if line.get_marker() == "None"]
    assert [x[0] for x in lines] == pytest.approx(
        [1e3 * part.dense * part.samples / 4 for part in profile.parts if part.samples]
    )
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == pytest.approx([1e3 * part.roofline for part in profile.parts if part.roofline])
    assert [text.get_text() for text in axes.get_yticklabels()][:3] == ["planning", "conv1", "blocks.0"]
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert labels == {"stem", "blocks", "head", "planning", "theoretical", "roofline"}


def test_names_are_no_formulas(tmp_path):
    first, *others = made_up(3).parts
    profile = made_up(3, parts=(replace(first, name=r"$\bad$"), *others), losses={r"$\worse$": 0.1})
    assert all(map(os.path.exists, drawn(profile, tmp_path)))
    assert os.path.exists(profile_plots.plot_losses(profile, tmp_path / "losses.png"))


def test_layers_are_stem_head_or_between():
    kinds = ["planning", "layer", "layer", "shortcut", "block", "layer", "other", "block", "layer", "policy"]
    parts = [Part(str(number), kind, None, 1, 1, 0, 0.0, 0.0, 0.0) for number, kind in enumerate(kinds)]
    assert profile_plots.group_parts(parts) == [
        "planning", "stem", "stem", "shortcuts", "blocks", "layers between blocks", "blocks", "blocks", "head",
        "policy",
    ]  # fmt: skip


# The page


def test_a_section_for_each_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no results of a demo are
    for name, blocks in (("one", 3), ("two", 33)):
        made_up(blocks).write_json(tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in ("two", "one")]
    args = report(tmp_path, "--results", str(tmp_path / "none"), "--profiles", *paths, "--json")
    (tmp_path / "none").mkdir()
    assert page.main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["profiles"] == 2 and printed["rows"] == 0
    assert printed["sections"] == ["Where the time went: two", "Where the time went: one"]
    html = args.out.read_text()
    assert len(re.findall(r'<img src="data:image/png;base64,', html)) == (2 + 1) + (1 + 1)
    assert html.count("<td>blocks.32</td>") == 1 and html.count("<td>blocks.1</td>") == 2
    assert "Measured 10.000 ms" in html and "moves 0.00 MB" in html


def test_profiles_in_out_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made_up(3).write_json("out/profile_a.json")
    made_up(3, moved=None).write_json("out/profile.json")
    (tmp_path / "out" / "other.json").write_text("{}")
    assert cli.main(["report"]) == 0
    assert "2 sections, 0 bench rows, 2 profiles" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").read_text().count("rows moves 0.00 MB") == 1  # of the one that counted
    (tmp_path / "out" / "profile_b.json").write_text("{}")
    assert cli.main(["report"]) == 1
    assert "profile_b.json: the file must have the entries" in capsys.readouterr().err


def test_files_of_something_else_are_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "demo.json").write_text('[{"title": "a"}]')
    (tmp_path / "null.jsonl").write_text("null")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    (tmp_path / "dict.json").write_text("{}")
    moved = {"title": "a", "text": "b", "tables": [], "figures": [["gone.png", "c"]]}
    (tmp_path / "moved.json").write_text(json.dumps([moved]))
    for options, message in (
        (["--results", str(tmp_path / "rows.jsonl")], "rows.jsonl, line 1: "),
        (["--results", str(tmp_path / "null.jsonl")], "null.jsonl, line 1: row must be a dict, got NoneType"),
        (["--results", str(tmp_path / "bytes.jsonl")], "bytes.jsonl is no text: "),
        (["--demo", str(tmp_path / "absent.json")], "No such file or directory: .*absent.json"),
        (["--demo", str(tmp_path / "moved.json")], "moved.json names a picture that is not there: .*gone.png"),
        (["--demo", str(tmp_path / "dict.json")], "dict.json is not what .*: TypeError: it must hold a list, got dict"),
        (["--results", str(tmp_path / "absent.jsonl")], "No such file or directory: .*absent.jsonl"),
        (["--demo", str(tmp_path / "demo.json")], "demo.json is not what dynexec demo writes: KeyError: 'tables'"),
    ):
        args = report(tmp_path, *options)
        assert page.main(args) == 1 and not args.out.exists()
        assert re.search("^dynexec report: .*" + message, capsys.readouterr().err)
