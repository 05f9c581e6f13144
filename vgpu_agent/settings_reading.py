"""Text becomes settings, by pydantic-settings. The only reader of the environment.

`load` either returns frozen settings or raises one SettingsError that names every wrong variable,
its value and what is allowed. What else is to be known of settings is in `settings`, which takes a
tenth of the time and memory to import.
"""

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from vgpu_agent.errors import SettingsError
from vgpu_agent.settings import (
    PREFIX,
    TABLE,
    TYPES,
    Settings,
    allowed,
    fits,
    kind_of,
    variable,
)


class _Variables(BaseSettings):
    """What all readings have in common."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        validate_default=True,
        # Values are plain text with parsers of our own, never JSON.
        enable_decoding=False,
        # One of the two is used by most commands.
        defer_build=True,
    )

    @field_validator("*")
    @classmethod
    def _fits_the_others(cls, value: Any, info: ValidationInfo) -> Any:
        if not fits(str(info.field_name), value, info.data):
            raise ValueError
        return value


class _GivenAlone(_Variables):
    """None of it comes from the environment."""

    @classmethod
    def settings_customise_sources(
        cls, *_: Any, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments alone."""
        return (sources["init_settings"],)


def _model(base: type[_Variables]) -> type[_Variables]:
    """A model with a field for each setting."""
    fields: dict[str, Any] = {name: (_validated(name), TABLE[name].default) for name in TABLE}
    return create_model(f"{base.__name__}Settings", __base__=base, **fields)


def _validated(name: str) -> Any:
    """Parse, then the annotated type, then check."""
    kind = kind_of(name)
    return Annotated[TYPES[name], BeforeValidator(kind.parsed), AfterValidator(kind.checked)]


_OfEnvironment = _model(_Variables)
_Given = _model(_GivenAlone)


def load() -> Settings:
    """The settings of this process. Raises SettingsError."""
    return _valid(_OfEnvironment, _given(os.environ))


def read(environment: Mapping[str, str], *names: str) -> Settings:
    """Settings of which only these are read; the others are defaults. Raises SettingsError."""
    given = {name: text for name, text in _given(environment).items() if name in names}
    return _valid(lambda: _Given.model_validate(given), given)


def assume(environment: Mapping[str, str]) -> Settings:
    """The settings with the default of every wrong variable."""
    given = _given(environment)
    while True:
        try:
            return embedded(**given)
        except ValidationError as error:
            if not given:
                raise  # the defaults fit each other
            wrong = {str(problem["loc"][0]) for problem in error.errors()} & given.keys()
            # A default that does not fit what is set is nobody's fault here: keep nothing then.
            given = {name: text for name, text in given.items() if wrong and name not in wrong}


def embedded(**given: Any) -> Settings:
    """Settings of which none comes from the environment: what `vgpu-agent dev` runs with.

    Raises ValidationError where they are wrong.
    """
    return _plain(_Given.model_validate(given))


def _plain(read: _Variables) -> Settings:
    return Settings(**dict(read))


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """The text of each field that is set, in any case of letters."""
    upper = {name.upper(): text for name, text in environment.items()}
    return {n: upper[variable(n)] for n in TABLE if variable(n) in upper}


def _valid(make: Callable[[], _Variables], given: Mapping[str, str]) -> Settings:
    """What is made. Raises SettingsError with a line for each wrong variable.

    The value is as it was set, not as far as it was parsed; a default may be what is wrong.
    """
    settings, problems = None, {}
    try:
        settings = _plain(make())
    except ValidationError as error:
        # A variable may be wrong in several ways.
        for name in (str(each["loc"][0]) for each in error.errors(include_context=False)):
            value = given.get(name, TABLE[name].default)
            problems[name] = f"{variable(name)}={value!r} is wrong; allowed: {allowed(name)}"
    # Set is set, also to the default: no validator sees that.
    if given.get("device_memory") and "replicas" in given:
        both = " and ".join(f"{variable(n)}={given[n]!r}" for n in ("replicas", "device_memory"))
        problems.setdefault("device_memory", f"{both}: only one of them is allowed")
    if settings is not None and not problems:
        return settings
    head = "1 setting is wrong:" if len(problems) == 1 else f"{len(problems)} settings are wrong:"
    raise SettingsError("\n  ".join([head, *problems.values()]))
