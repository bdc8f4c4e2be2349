"""Names of parts, what may be registered under them, and a user's own file that does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from data_prep.errors import UserError
from data_prep.files import sha256
from pipeline import engine, registry
from pipeline.build import method_line
from pipeline.config import ROOT
from pipeline.curriculum import COUNTS
from pipeline.data.batch import collate
from pipeline.ds_config import Triangle, load_ds_config
from pipeline.export import ExportInfo
from pipeline.latent.method import REGISTRIES, LatentConfig, LatentMethod
from pipeline.latent.parts import FEEDBACKS, HiddenState
from pipeline.loaded import check_plugin
from pipeline.model import LatentModel
from pipeline.plan import settings_hash, write_config
from pipeline.prompt import PromptConfig
from pipeline.recipe import load_config
from pipeline.registry import Registry, load_plugin
from tests.pipeline.tiny import FORMAT, Shape, make_row, tiny_models


def test_names_are_checked() -> None:
    with pytest.raises(
        ValidationError, match=r"no feedback is called hiden; did you mean hidden\? \(hidden, pause, none"
    ):
        LatentConfig(feedback="hiden")
    things: Registry[int] = Registry("thing", lambda part: None)
    things.add("one")(1)
    assert things["one"] == 1
    with pytest.raises(UserError, match="a thing called one exists already"):
        things.add("one")(2)


MEAN = """
from torch import Tensor
from pipeline.latent.parts import FEEDBACKS, Feedback, Reading

@FEEDBACKS.add("{name}")
class MeanOfFour(Feedback):
    def forward(self, reading: Reading) -> Tensor:
        hidden, there = reading.last(4)
        return (hidden * there[..., None]).sum(1, keepdim=True) / there.sum(1)[:, None, None]
"""


def test_a_plugin_adds_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line or a recipe, and before its names are checked."""
    monkeypatch.setattr(registry, "_loaded", {})
    for number, way in enumerate(("recipe", "option")):
        name, file = f"mean_{way}", tmp_path / f"idea{number}.py"
        file.write_text(MEAN.format(name=name))
        recipe = tmp_path / "recipe.yaml"
        text = f"latent: {{feedback: {name}}}\nmodel: {{path: x}}\ndata: {{path: x}}\n"
        recipe.write_text(text + (f"plugin: {file}\n" if way == "recipe" else ""))
        config = load_config(recipe, {"plugin": str(file)} if way == "option" else {})
        assert config.latent.feedback == name and name in FEEDBACKS
        load_plugin(file)  # again: nothing happens


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise ValueError('no')\n", r"bad.py, line 2: ValueError: no"),
        ("x = (\n", r"bad.py, line 1: SyntaxError"),
        ("import no_such_module\n", r"bad.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "from pipeline.latent.parts import *\nFEEDBACKS.add('pause')(Pause)\n",
            "a feedback called pause exists already",
        ),
        (None, "there is no such file"),
        ("import sys\nsys.exit(3)\n", r"bad.py, line 2: SystemExit: 3$"),
        ("x = 1\x00\n", r"bad.py: (SyntaxError|ValueError): source code string cannot contain null bytes"),
        ("x = 1\n", r"bad.py registers no part of the method"),
        ("FEEDBACKS.add('w')(3)", r"bad.py, line 4: feedback w: expected a class over Feedback, got 3 \(int\)"),
        ("FEEDBACKS.add('w')(Weighting)", r"feedback w: expected a class over Feedback, got the class Weighting"),
        ("FEEDBACKS.add(Pause)", r"line 4: a feedback needs a name: add\(\"name\"\), not add\(the class Pause\)"),
        ("FEEDBACKS.add('w')(type('W', (Feedback,), {}))", r"feedback w: the class W does not define forward"),
        (
            "FEEDBACKS.add('w')(type('W', (Pause,), {'width': '2'}))",
            r"feedback w: W.width is '2' \(str\), expected a wh",
        ),
        ("FEEDBACKS.add('w')(type('W', (Pause,), {'width': -1}))", r"feedback w: W.width is -1 \(int\)"),
        (
            "FEEDBACKS.add('w')(type('W', (Pause,), {'read_layers': 'all'}))",
            r"feedback w: W.read_layers is 'all' \(str\)",
        ),
        (
            "FEEDBACKS.add('w')(type('W', (Pause,), {'__init__': lambda self: None}))",
            r"feedback w: W.__init__ takes \(\), expected \(hidden_size\)",
        ),
        (
            "FEEDBACKS.add('w')(type('W', (Pause,), {'forward': lambda self, a, b: a}))",
            r"feedback w: W.forward takes \(self, a, b\), expected \(self, reading\)",
        ),
        ("AUXILIARIES.add('w')(Pause)", r"auxiliary loss w: expected a class over Auxiliary, got the class Pause"),
        (
            "AUXILIARIES.add('w')(type('W', (NoLoss,), {'forward': lambda self, trace: 0}))",
            r"auxiliary loss w: W.forward takes \(self, trace\), expected \(self, trace, batch\)",
        ),
        ("WEIGHTINGS.add('w')(lambda s, c, f: s)", r"weighting w: expected Weighting\(function\), got a function"),
        (
            "WEIGHTINGS.add('w')(Weighting(lambda s: s))",
            r"weighting w: its function takes \(s\), expected \(saliency, co",
        ),
        ("WEIGHTINGS.add('w')(Weighting(by_share, 'yes'))", r"weighting w: gradient is 'yes' \(str\)"),
        ("SELECTIONS.add('w')(lambda *_: None)", r"selection w: expected Selection\(ranking\), got a function"),
        (
            "SELECTIONS.add('w')(Selection(lambda s: s))",
            r"selection w: its ranking takes \(s\), expected \(saliency, cand",
        ),
        (
            "SELECTIONS.add('w')(Selection(None))",
            r"selection w: its ranking is None \(NoneType\), expected a function of",
        ),
        (
            "SELECTIONS.add('w')(Selection(lambda *_: 0, takes='half'))",
            r"selection w: takes is 'half' \(str\), expected one of k, all, none",
        ),
        ("COUNTS.add('w')(lambda stage: 1)", r"count w: it takes \(stage\), expected \(stage, steps\)"),
    ],
)
def test_bad_plugin(tmp_path: Path, text: str | None, said: str) -> None:
    """Every one names the file; what is added is checked where it is added."""
    imports = [f"from pipeline.{name} import *" for name in ("latent.parts", "latent.select", "curriculum")]
    if text is not None:
        adds = ".add(" in text and "import" not in text
        (tmp_path / "bad.py").write_text("\n".join([*imports, text]) if adds else text)
    with pytest.raises(UserError, match=said) as error:
        load_plugin(tmp_path / "bad.py")
    assert f"--plugin {tmp_path / 'bad.py'}" in str(error.value)


def test_a_syntax_error_elsewhere_is_not_the_plugin_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is the plugin's own."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_import.py").write_text("x = 1\ny = 2\nz = (\n")
    (tmp_path / "idea.py").write_text("\nimport broken_import\n")
    with pytest.raises(UserError, match=r"idea.py, line 2: SyntaxError: .*broken_import.py, line 3"):
        load_plugin(tmp_path / "idea.py")


def test_a_name_that_the_plugin_does_not_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_loaded", {})
    file = tmp_path / "idea.py"
    file.write_text(MEAN.format(name="mean_registered"))
    with pytest.raises(
        UserError, match=r"no selection is called mean_registered .* --plugin .*idea.py registers feedb"
    ):
        load_config(None, {"plugin": str(file), "latent.selection": "mean_registered", "model.path": "x"})


def test_the_plugin_is_hashed_as_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited later, its hash stays; nothing is written beside it."""
    monkeypatch.setattr(registry, "_loaded", {})
    file = tmp_path / "idea.py"
    file.write_text(MEAN.format(name="mean_hashed"))
    digest = sha256(file)
    assert load_plugin(file).sha256 == digest
    file.write_text("# another\n")
    assert load_plugin(file).sha256 == digest
    assert [path.name for path in tmp_path.iterdir()] == ["idea.py"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "class Odd(Feedback):\n    def __init__(self, size):\n        self.x = torch.nn.Linear(1, 1)\n"
            "    def forward(self, reading): ...\n",
            r"latent.feedback odd_part, line 4: AttributeError: cannot assign module before Module.__init__\(\) call",
        ),
        (
            "class Odd(Pause):\n    def __init__(self, d):\n        super().__init__(d)\n        self.width = 3\n",
            r"latent.feedback odd_part: width is 3 in its __init__, 1 in its class; say it in the class",
        ),
    ],
)
def test_parts_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, said: str) -> None:
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(FEEDBACKS, "_parts", dict(FEEDBACKS._parts))
    (tmp_path / "odd.py").write_text(f"from pipeline.latent.parts import *\n{part}\nFEEDBACKS.add('odd_part')(Odd)\n")
    load_plugin(tmp_path / "odd.py")
    with pytest.raises(UserError, match=said):
        LatentMethod(LatentConfig(feedback="odd_part"), 16)


class Gate(HiddenState):
    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.gate = torch.nn.Parameter(torch.tensor(1.0))


class Lazy(HiddenState):
    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.linear = torch.nn.LazyLinear(hidden_size)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            type("Four", (HiddenState,), {"read_layers": 4}),
            "latent.feedback four reads 4 layers .read_layers., the model has 2",
        ),
        (Gate, r"latent.feedback.gate is a parameter without dimensions; make it a vector of one: torch.ones\(1\)"),
        (Lazy, "latent.feedback.linear.weight has no shape before it is used"),
    ],
)
def test_parts_are_tried_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, part: type, said: str) -> None:
    monkeypatch.setitem(FEEDBACKS._parts, "four", part)
    monkeypatch.setattr(engine, "text_config", lambda *_: SimpleNamespace(hidden_size=64, num_hidden_layers=2))
    monkeypatch.setattr(engine, "load_model", lambda *_: pytest.fail("loaded first"))
    config = load_config(None, {"latent.feedback": "four", "model.path": "m", "data.path": "d"})
    ds = load_ds_config(ROOT / "ds_configs" / "zero3.json")
    with pytest.raises(UserError, match=said):
        engine.build_engine(config, ds, "m", Triangle(8, 1, 8, 1), None, torch.device("cpu"), None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (lambda stage, steps: stage.latents / 2, r"count odd returned 0.5 \(float\), expected a whole number"),
        (lambda stage, steps: [1][steps], r"curriculum.count odd: IndexError: list index out of range"),
    ],
)
def test_counts_are_asked_before_training(monkeypatch: pytest.MonkeyPatch, count: object, said: str) -> None:
    monkeypatch.setitem(COUNTS._parts, "odd", count)
    options = {"curriculum.count": "odd", "curriculum.stages": "[{latents: 1, skip: 1, steps: 1}]", "model.path": "x"}
    with pytest.raises(UserError, match=said):
        load_config(None, options | {"data.path": "x"})


# ---- what a run and its exports keep of it ----------------------------------------------------------------------
@pytest.fixture
def idea(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin's file, in a process that has run none."""
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(FEEDBACKS, "_parts", dict(FEEDBACKS._parts))
    path = tmp_path / "idea.py"
    path.write_text(MEAN.format(name="mean_kept"))
    return path


def options(idea: Path) -> dict[str, str]:
    return {"plugin": str(idea), "latent.feedback": "mean_kept", "model.path": "m", "data.path": "d"}


def test_the_run_keeps_the_text_that_it_was_trained_with(idea: Path, tmp_path: Path) -> None:
    """Whatever becomes of the file while it trains."""
    config, text = load_config(None, options(idea)), idea.read_text()
    before = settings_hash(config)
    idea.write_text(text + "# another\n")
    assert settings_hash(config) == before
    idea.unlink()
    assert settings_hash(config) == before
    write_config(config, tmp_path)
    assert (tmp_path / "plugin.py").read_text() == text


def test_start_up_line(idea: Path) -> None:
    line = method_line(load_config(None, options(idea) | {"latent.auxiliary": "norm", "latent.selection": "all"}))
    assert line == (
        "feedback mean_kept, selection all (all patches a step, by position), weighting copy, auxiliary loss norm times"
        f" 1, count stage; gradient bptt, positions mrope; plugin {idea} (SHA-256 {sha256(idea)[:12]})"
    )


def test_exports_ask_for_the_same_text(idea: Path, capsys: pytest.CaptureFixture) -> None:
    latent, folder = LatentConfig(), Path("export")
    info = ExportInfo(
        backbone="qwen2_vl", latent=latent, prompt=PromptConfig(), latents=3, stage=3, groups=3, adapter_of=None,
        revision=None, data="d", plugin="idea.py", plugin_hash=sha256(idea),
    )  # fmt: skip
    check_plugin(folder, info, False)  # none is taken: names decide
    load_plugin(idea)
    check_plugin(folder, info, False)
    other = info.model_copy(update={"plugin_hash": "0" * 64})
    with pytest.raises(UserError, match="idea.py is not the text of idea.py that export was trained with .its run"):
        check_plugin(folder, other, False)
    check_plugin(folder, other, True)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {idea} is not the text") and said.count("\n") == 1
    check_plugin(folder, other.model_copy(update={"plugin": None, "plugin_hash": None}), False)


FAILING = """from pipeline.latent.parts import *
from pipeline.latent.select import SELECTIONS, Selection
from beside_it import broken

class Odd(Feedback):
    def forward(self, reading):
        return broken(reading)

class Sum(Auxiliary):
    def forward(self, trace, batch):
        return trace.tips[-1] @ trace.tips[-1]

FEEDBACKS.add("odd_part")(Odd)
AUXILIARIES.add("odd_part")(Sum)
SELECTIONS.add("odd_part")(Selection(lambda s, *rest: s[..., 9999]))
WEIGHTINGS.add("odd_part")(Weighting(lambda s, *rest: s.nothing))
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("feedback", "latent.feedback odd_part, line 7: RuntimeError: not today"),
        ("auxiliary", r"latent.auxiliary odd_part, line 11: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("selection", "latent.selection odd_part, line 15: IndexError: index 9999 is out of bounds"),
        ("weighting", "latent.weighting odd_part, line 16: AttributeError: 'Tensor' object has no attribute 'nothing'"),
    ],
)
def test_a_failing_part_is_told_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    """In training too; files beside the plugin can be imported.  This project's own errors stay."""
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    for parts in REGISTRIES.values():
        monkeypatch.setattr(parts, "_parts", dict(parts._parts))
    (tmp_path / "beside_it.py").write_text("def broken(reading):\n    raise RuntimeError('not today')\n")
    (tmp_path / "odd.py").write_text(FAILING)
    load_plugin(tmp_path / "odd.py")
    backbone, stock = tiny_models()
    batch = collate([make_row(Shape([(2, 3)], latents=1), 0, stock)], FORMAT, 1)
    with pytest.raises(UserError, match=said):
        LatentModel(backbone, LatentConfig(num_patches=2, **{kind: "odd_part"}))(batch)
    monkeypatch.setattr(HiddenState, "forward", lambda self, reading: reading.nothing)
    with pytest.raises(AttributeError):
        LatentModel(backbone, LatentConfig(num_patches=2))(batch)
