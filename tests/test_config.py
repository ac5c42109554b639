"""Configs: YAML, overrides, messages."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config, Workers, identity, load_config, parse_args, run_job
from rayrm.errors import ConfigError
from rayrm.help import describe


class Red(Config):
    """A red thing."""

    type: Literal["red"] = "red"
    depth: int = Field(1, ge=0)
    """How red."""


class Blue(Config):
    """A blue thing."""

    type: Literal["blue"] = "blue"


class Paint(Config):
    """What to paint."""

    output: str = Field("/here", json_schema_extra=NOT_IDENTITY)
    """Where it goes."""
    colour: Annotated[Red | Blue, Field(discriminator="type")] = Red()
    """Which colour."""
    layers: list[int] = [1]


def test_words_override_the_file_and_are_read_as_yaml(tmp_path):
    path = tmp_path / "paint.yaml"
    path.write_text("colour: {type: red, depth: 3}\nlayers: [1]\n")
    config = load_config(Paint, path, ["colour.depth=5", "layers=[2, 3]"])
    assert config == Paint(colour=Red(depth=5), layers=[2, 3])


def test_identity_leaves_out_what_does_not_change_the_result():
    assert identity(Paint()) == {"colour": {"type": "red", "depth": 1}, "layers": [1]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["colour.type=green"], "'colour.type' is 'green', and only 'red', 'blue' exist"),
        (["colour.depth=1"], "'colour.type' is missing; `--help` lists the types."),
        (
            ["colour.type=red", "colour.depth=-1"],
            "'colour.red.depth' is -1: input should be greater than or equal to 0",
        ),
        (["shine=1"], "'shine' is not a field; `--help` lists the fields of Paint"),
        (["layers.x=1", "layers.x.y=1"], "reaches into 'x', which is 1 and has no 'y'"),
        (["a.yaml", "b.yaml"], "at most one config file"),
        (["missing.yaml"], "There is no config file at 'missing.yaml'"),
    ],
)
def test_a_fault_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match=".") as caught:
        parse_args(Paint, words)
    assert message in str(caught.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list, where a mapping is needed"):
        load_config(Paint, path)


def test_help_names_every_field_with_default_and_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(Paint, ["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and shown.strip() == describe(Paint).strip()
    assert "output: str  [default '/here']  Where it goes." in shown
    assert "colour.depth: int  [default 1]  How red." in shown
    assert "colour.* (type=blue)" in shown


class Nested(Config):
    """Paths at two levels."""

    model: str = Field("x/y", json_schema_extra={"identity": False, "input": True})
    """A model."""


class Paths(Config):
    """Paths of all kinds."""

    output: str
    """A folder."""
    sets: dict[str, str] = Field({}, json_schema_extra={"identity": False, "input": True})
    """Inputs by name."""
    parts: list[str] = Field([], json_schema_extra={"identity": False, "input": True})
    """Inputs in a row."""
    inner: Nested = Nested()
    """More."""


def test_local_paths_become_absolute_and_hub_ids_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    config = load_config(Paths, None, ["output=out", "sets.a=rows", "sets.b=s3://b/rows", "inner.model=owner/name"])
    assert config.output == str(tmp_path / "out")
    assert config.sets == {"a": str(tmp_path / "rows"), "b": "s3://b/rows"}
    assert config.inner.model == "owner/name"
    assert load_config(Paths, None, ["output=s3://b/out"]).output == "s3://b/out"
    assert load_config(Paths, None, ["output=o", "parts=[rows, owner/name]"]).parts == [
        str(tmp_path / "rows"),
        "owner/name",
    ]


class Team(Config):
    """A list of configs."""

    members: list[Nested]
    """The configs."""


def test_a_word_reaches_into_a_list_by_its_place(tmp_path):
    (tmp_path / "team.yaml").write_text("members: [{model: a}]")
    config = load_config(Team, tmp_path / "team.yaml", ["members.1.model=b/c", "members.0.model=d/e"])
    assert [member.model for member in config.members] == ["d/e", "b/c"]
    with pytest.raises(ConfigError, match=r"'members.5.model' names place 5 of a list of 1; the first one is 0"):
        load_config(Team, tmp_path / "team.yaml", ["members.5.model=b/c"])
    with pytest.raises(ConfigError, match=r"reaches into 'members', which is \[\{'model': 'a'\}\] and has no 'model'"):
        load_config(Team, tmp_path / "team.yaml", ["members.model=b/c"])


class Colours(Config):
    """Several colours."""

    colours: list[Annotated[Red | Blue, Field(discriminator="type")]]
    """Any of them."""


def test_help_tells_every_kind_that_a_list_holds():
    shown = describe(Colours)
    assert "colours: list  Any of them." in shown
    assert "colours[].* (type=red)  A red thing." in shown and "colours[].depth: int  [default 1]  How red." in shown
    assert "colours[].* (type=blue)  A blue thing." in shown


def test_a_job_tells_the_error_of_its_actor(capsys):
    class TaskError(ConfigError):
        cause = ConfigError("The model is broken.")

    def fail():
        raise ValueError("a long trace") from TaskError()

    with pytest.raises(SystemExit) as ended:
        run_job(fail)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "ConfigError: The model is broken.\n"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("rayrm.errors.CheckpointError: There is no head.", "CheckpointError: There is no head."),
        ("rayrm.client.sending.LateError: http://x has not answered.", "ServiceError: http://x has not answered."),
    ],
)
def test_a_job_tells_the_error_in_the_trace_of_an_actor_that_died(capsys, raised, told):
    def fail():
        trace = f"Traceback:\n  File 'x'\n{raised}\n"
        raise RuntimeError(f"The actor died because of an error raised in its creation task, {trace}")

    with pytest.raises(SystemExit):
        run_job(fail)
    assert capsys.readouterr().err == f"{told}\n"


def test_an_error_that_no_one_foresaw_keeps_its_trace():
    with pytest.raises(ZeroDivisionError):
        run_job(lambda: 1 / 0)


class Spoken(Config):
    """A config with languages, a bound and workers."""

    languages: tuple[str, ...] = ()
    """Codes."""
    bound: float | None = None
    """A number."""
    is_on: bool = False
    """A switch."""
    workers: Workers = Workers()
    """Actors."""


def test_norwegian_is_a_language_and_only_true_and_false_are_booleans(tmp_path):
    (tmp_path / "some.yaml").write_text("languages: [no, on, y]\nis_on: true\n")
    assert load_config(Spoken, tmp_path / "some.yaml") == Spoken(languages=("no", "on", "y"), is_on=True)
    assert load_config(Spoken, None, ["languages=[no,sv]"]).languages == ("no", "sv")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bound=.inf", "finite number"),
        ("bound=.nan", "finite number"),
        ("workers={num_workers: 4, max_workers: 2}", "max_workers 2 is less than num_workers 4"),
    ],
)
def test_values_that_could_not_act_are_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Spoken, None, [word])
