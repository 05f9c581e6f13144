"""VGPU_* variables that are no setting."""

import difflib
import re
from collections.abc import Iterator, Mapping

from vgpu_agent.settings import PREFIX, TABLE, variable

# What Kubernetes puts into a pod for each Service of the namespace; a Service whose name begins
# with "vgpu" makes variables that look like ours. NAME_PORT is recognized by its value.
_OF_SERVICE = re.compile(
    r"VGPU(_[A-Z0-9_]+)?_(SERVICE_HOST=|SERVICE_PORT(_[A-Z0-9_]+)?="
    r"|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=|PORT=(tcp|udp|sctp)://)"
)


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """VGPU_* variables that are no setting, each with the nearest name that is one."""
    known = {variable(name) for name in TABLE}
    return {
        name: next(iter(difflib.get_close_matches(name.upper(), known, n=1)), None)
        for name, value in sorted(environment.items())
        if name.upper().startswith(PREFIX)
        and name.upper() not in known
        and not _OF_SERVICE.match(f"{name}={value}")
    }


def unknown_setting_warnings(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each VGPU_* variable that is no setting."""
    for name, nearest in unknown_variables(environment).items():
        hint = f"; did you mean {nearest}?" if nearest else ""
        yield f"{name}: unknown setting, ignored{hint}"
