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


def unknown_setting_warnings(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each VGPU_* variable that is no setting, with the nearest name that is one."""
    known = {variable(name) for name in TABLE}
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known or _OF_SERVICE.match(f"{name}={value}"):
            continue
        nearest = difflib.get_close_matches(upper, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        yield f"{name}: unknown setting, ignored{hint}"
