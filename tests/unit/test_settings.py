import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest

from shardserve.errors import ConfigError
from shardserve.settings import CHOICES, PREFIX, Settings, warn_of_unknown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
ROW = re.compile(r"\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
NUMBERS = [field.name for field in fields(Settings) if field.type != "str"]


def test_defaults():
    assert Settings.from_environment({}) == Settings()
    # 0 is for what is worked out, and can't be given.
    assert all(getattr(Settings(), name) > 0 for name in NUMBERS if name != "agent_threads")


def test_every_field_has_its_variable():
    environment = {f"SHARDSERVE_{name.upper()}": "7" for name in NUMBERS}
    environment |= {"SHARDSERVE_COLLECTIVE": "gloo", "SHARDSERVE_LOG_LEVEL": "DEBUG"}
    settings = Settings.from_environment(environment)
    assert all(getattr(settings, name) == 7 for name in NUMBERS)
    assert (settings.collective, settings.log_level) == ("gloo", "DEBUG")


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("text", ["fast", ""])
def test_choice_that_is_none(name, text):
    variable = f"SHARDSERVE_{name.upper()}"
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({variable: text})
    assert str(caught.value) == f"environment variable {variable}={text!r} is none of {', '.join(CHOICES[name])}"


@pytest.mark.parametrize(
    ("name", "greatest"),
    [
        ("QUEUE_LIMIT", 2**31 - 1),
        ("MAX_REQUEST_BYTES", 2**50),
        ("STEP_TIMEOUT", 10**6),
        ("PEER_TIMEOUT", 65534),
        ("TIMELINE_STEPS", 2**18),
    ],
)
def test_the_greatest_value(name, greatest):
    variable = f"SHARDSERVE_{name}"
    assert getattr(Settings.from_environment({variable: str(greatest)}), name.lower()) == greatest
    for text in (str(greatest + 1), "99999999999999999999999"):
        with pytest.raises(ConfigError) as caught:
            Settings.from_environment({variable: text})
        assert str(caught.value) == f"environment variable {variable}={text!r} is more than {greatest}"


def test_numbers():
    settings = Settings.from_environment(
        {"SHARDSERVE_STEP_TIMEOUT": "0.25", "SHARDSERVE_MAX_RESTARTS": "3", "HOME": "/"}
    )
    assert (settings.step_timeout, settings.max_restarts) == (0.25, 3)
    assert settings.form_timeout == Settings().form_timeout


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "1s", "nan", "inf"])
def test_time_that_is_none(text):
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({"SHARDSERVE_STEP_TIMEOUT": text})
    assert str(caught.value) == f"environment variable SHARDSERVE_STEP_TIMEOUT={text!r} is not a positive float"


@pytest.mark.parametrize("text", ["2.5", "many", "0", "-3", "0x10", ""])
def test_count_that_is_none(text):
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({"SHARDSERVE_MAX_RESTARTS": text})
    assert str(caught.value) == f"environment variable SHARDSERVE_MAX_RESTARTS={text!r} is not a positive int"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STEP_TIMEOT", "STEP_TIMEOUT"),
        ("TIMEOUT", "STEP_TIMEOUT"),
        ("MAX_RESTART", "MAX_RESTARTS"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("JOIN_SECRET", "JOIN_SECRET_FILE"),
        ("step_timeout", "STEP_TIMEOUT"),
    ],
)
def test_a_misspelt_variable_is_named_with_what_was_meant(name, meant):
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({f"SHARDSERVE_{name}": "7"})
    said = f"environment variable SHARDSERVE_{name} is no setting; did you mean SHARDSERVE_{meant}?"
    assert str(caught.value) == said


def test_what_kubernetes_sets_for_a_service_of_our_name_is_left_alone(caplog):
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_5500_TCP", "PORT_5500_TCP_ADDR")
    # Of a service shardserve-grpc.
    names += tuple(f"GRPC_{name}" for name in names)
    # Of shardserve-timeline and the like, whose names are nearly settings.
    names += ("TIMELINE_PORT", "WEIGHTS_PORT", "COMPILE_SERVICE_HOST", "MAX_RESTARTS_PORT")
    environment = {f"SHARDSERVE_{name}": "x" for name in names}
    assert Settings.from_environment(environment) == Settings()
    warn_of_unknown(environment)
    assert not caplog.records


def test_a_variable_that_looks_like_ours_is_named(caplog):
    environment = {"SHARDSERVE_FOO": "1", "SHARDSERVE_STEP_TIMEOUT": "1", "FOO": "1", "SHARDSERVE_SUPPORT": "1"}
    with caplog.at_level(logging.WARNING):
        warn_of_unknown(environment)
    assert [record.getMessage() for record in caplog.records] == [
        f"environment variable SHARDSERVE_{name} is no setting, and ignored" for name in ("FOO", "SUPPORT")
    ]


def test_the_page_has_every_setting_with_its_default_and_no_other():
    documented = {name: default for name, default, _, _ in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    assert set(documented) == {PREFIX + field.name.upper() for field in fields(Settings)}
    for field in fields(Settings):
        default = documented[PREFIX + field.name.upper()]
        assert default == _as_told(field), field.name


def test_every_row_of_the_page_says_what_and_who():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{PREFIX}")]
    assert len(lines) == len(fields(Settings))
    assert all(all(cell.strip() for cell in ROW.fullmatch(line).groups()) for line in lines)


def _as_told(field):
    if field.type == "str":
        return f"`{field.default}`" if field.default else "none"
    if field.type == "float":
        return f"{field.default:g} s"
    if field.name.endswith("_bytes"):
        name, unit = next((name, unit) for name, unit in reversed(UNITS.items()) if field.default % unit == 0)
        return f"{field.default // unit} {name}"
    return str(field.default)
