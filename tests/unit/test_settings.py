from dataclasses import fields

import pytest

from shardserve.errors import ConfigError
from shardserve.settings import Settings

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


@pytest.mark.parametrize("name", ["COLLECTIVE", "LOG_LEVEL"])
def test_choice_that_is_none(name):
    with pytest.raises(ConfigError, match=rf"{name.lower()}='fast' is none of "):
        Settings.from_environment({f"SHARDSERVE_{name}": "fast"})


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


def test_what_kubernetes_sets_for_a_service_of_our_name_is_left_alone():
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_5500_TCP", "PORT_5500_TCP_ADDR")
    assert Settings.from_environment({f"SHARDSERVE_{name}": "x" for name in names}) == Settings()
